// The form that says which world: words for the prompt, where a drive starts, and its seed.

import { BIOMES, COLORS, WEATHERS, composeCaption, readCaption } from "./captions.js";

const $ = (id) => document.getElementById(id);

// send(message) → whether it went; leave() gives the focus back to the road
export function setUpWorld(send, leave) {
  const prompt = $("prompt");
  const parts = { biome: $("biome"), weather: $("weather"), color: $("color") };
  let edited = false; // by the user; until then the box follows the stream's prompt

  fill(parts.biome, Object.keys(BIOMES));
  fill(parts.weather, Object.keys(WEATHERS));
  fill(parts.color, COLORS);

  function setPrompt(text) {
    prompt.value = text;
    for (const [part, word] of Object.entries(readCaption(text))) if (word) parts[part].value = word;
  }

  for (const select of Object.values(parts)) {
    select.addEventListener("change", () => {
      prompt.value = composeCaption(parts.biome.value, parts.weather.value, parts.color.value);
      edited = true;
    });
  }
  prompt.addEventListener("input", () => (edited = true));
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!$("apply").disabled) apply();
  });
  $("examples").addEventListener("change", (event) => {
    if (event.target.value) setPrompt(event.target.value);
    edited = true;
    event.target.selectedIndex = 0; // it is a menu, not a setting
  });

  function apply() {
    if (!prompt.value.trim()) return prompt.focus();
    if (send({ type: "prompt", prompt: prompt.value.trim() })) done();
  }

  function reset() {
    const seed = $("seed").value === "" ? Math.floor(1e6 * Math.random()) : Number($("seed").value);
    const message = { type: "reset", start: $("start").value, seed };
    if (prompt.value.trim()) message.prompt = prompt.value.trim();
    if (send(message)) done();
  }

  function done() {
    edited = false;
    leave(); // arrow keys are to drive again, not to change a field
  }

  $("apply").addEventListener("click", apply);
  $("world").addEventListener("submit", (event) => {
    event.preventDefault();
    reset();
  });

  return {
    offer({ prompts = [], clips = [] }) {
      fill($("start"), ["text", ...clips], ["the prompt", ...clips]);
      fill($("examples"), ["", ...prompts], ["Examples", ...prompts]);
      $("examples").hidden = !prompts.length;
    },
    follow(status) {
      if (!edited && status.prompt && status.prompt !== prompt.value) setPrompt(status.prompt);
      $("seed-now").textContent = Number.isInteger(status.seed) ? `· now ${status.seed}` : "";
    },
    enable(driving) {
      $("apply").disabled = $("reset").disabled = !driving;
    },
  };
}

function fill(select, values, names = values) {
  const chosen = select.value;
  select.replaceChildren(...values.map((value, i) => new Option(names[i], value)));
  if (values.includes(chosen)) select.value = chosen;
}
