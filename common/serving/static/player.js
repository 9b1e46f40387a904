// The page: what the server says becomes what is shown, what the user does becomes messages.

import { Connection, unpackFrame } from "./protocol.js";
import { Controls, describe, directionsOf, signalOf, takesKeys } from "./controls.js";
import { Latency, Screen } from "./screen.js";
import { setUpRecordings } from "./recordings.js";
import { setUpWorld } from "./world.js";

const $ = (id) => document.getElementById(id);
const token = new URLSearchParams(location.search).get("token");

let link = "connecting"; // or "open", "lost", "refused"
let retryAt = 0;
let refusal = "";
let welcome = { signals: [], fps: 16, model: "" };
let status = null; // the server's last
let stats = {};
let frame = null; // the one on the screen
let newestId = 0;
let lastSent = null; // the signal that the server has from us; null when it has none

const screen = new Screen($("stage"), $("screen"), showFrame);
const latency = new Latency();
const controls = new Controls($("pad"), steer);
const connection = new Connection(address(), { onOpen, onMessage, onFrame, onLost });
const world = setUpWorld(send, () => $("stage").focus({ preventScroll: true }));
const recordings = setUpRecordings(send, toast);

function address() {
  const url = new URL("/ws", location);
  url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  if (token) url.searchParams.set("token", token);
  return url;
}

function send(message) {
  const sent = connection.send(message);
  if (!sent) toast("Not connected: nothing was sent.");
  return sent;
}

// From the server

function onOpen() {
  link = "open";
  lastSent = null;
  latency.forget();
  render();
}

function onLost(event, attempt, wait) {
  // 1008 is how a server says "not you", and 1013 that it is full. Trying again does no harm.
  link = event.code === 1008 || event.code === 1013 ? "refused" : attempt > 1 && !status ? "unreached" : "lost";
  refusal = event.reason;
  retryAt = performance.now() + wait;
  screen.playout.clear();
  controls.release();
  render();
}

const handlers = {
  welcome(message) {
    welcome = message;
    status = frame = null;
    screen.setSize(message.width, message.height, message.fps);
    world.offer(message);
    recordings.offer(message);
  },
  status(message) {
    const drove = status?.you_drive;
    const news = message.state !== "loading" && message.state !== "error" && message.message;
    if (news && news !== status?.message) toast(news); // the other two states show it
    status = message;
    if (!message.you_drive) lastSent = null;
    if (Boolean(drove) !== message.you_drive) latency.forget();
    world.follow(message);
    recordings.follow(message);
    steer();
  },
  stats(message) { stats = message; },
  recording(message) { recordings.add(message, welcome.fps); },
  error(message) { toast(message.message); },
};

function onMessage(message) {
  handlers[message.type]?.(message);
  render();
}

function onFrame(buffer) {
  const unpacked = unpackFrame(buffer, welcome.signals);
  if (!unpacked) return;
  screen.push(unpacked);
}

// To the screen

function showFrame(shown) {
  const isFirst = frame?.stream !== shown.stream;
  frame = shown;
  if (status?.you_drive) latency.seen(shown.readId, newestId);
  setText($("commanded"), shown.signal ?? "–");
  setText($("commanded-words"), shown.signal ? describe(shown.signal) : "");
  const lit = directionsOf(shown.signal);
  for (const button of $("pad").querySelectorAll("button")) button.classList.toggle("on", lit.includes(button.dataset.direction));
  if (isFirst) render();
}

// Sends what is held down, if that is news to the server.
function steer() {
  const held = controls.held();
  const signal = signalOf(held);
  for (const button of $("pad").querySelectorAll("button")) {
    setAttribute(button, "aria-pressed", String(held.has(button.dataset.direction)));
  }
  setText($("held"), signal);
  setText($("held-words"), describe(signal));
  if (status?.you_drive) {
    if (signal === lastSent || !welcome.signals.includes(signal)) return;
    const time = performance.now();
    if (!connection.send({ type: "signal", signal, id: newestId + 1, time })) return;
    newestId += 1;
    lastSent = signal;
    latency.sent(newestId, time);
  } else if (held.size && status && status.driver === null) {
    connection.send({ type: "wheel", take: true }); // nobody drives: whoever presses a key does
  }
}

// What the card over the picture says, and what the pill in the head
function situation() {
  const seconds = Math.max(1, Math.ceil((retryAt - performance.now()) / 1000));
  const again = { text: `Trying again in ${seconds} s.`, button: ["Try now", () => connection.retryNow()] };
  if (link === "refused") return { state: "error", pill: "Refused", title: "The server does not let you in", ...again, text: /token/.test(refusal) ? "It asks for a token: open the whole address, with ?token=… at its end." : `It says: ${refusal}` };
  if (link === "unreached") return { state: "lost", pill: "Not reachable", title: "The server does not answer", ...again };
  if (link === "lost") return { state: "lost", pill: "Connection lost", title: "Connection lost", ...again };
  if (link === "connecting" || !status) return { state: "connecting", pill: "Connecting", title: "Connecting", spinner: true };
  const { state, message } = status;
  if (state === "loading" && frame) return { state, pill: "Starting", badge: "Starting a new drive" };
  if (state === "loading") return { state, pill: "Loading", title: "Loading the model", text: message, progress: status.progress };
  if (state === "error") return { state, pill: "Error", title: "The world has stopped", text: message, button: status.you_drive && ["Start a new drive", () => send({ type: "reset" })] };
  if (state === "paused") return { state, pill: "Paused", title: "Paused", button: status.you_drive && ["Go on", togglePause] };
  if (!frame) return { state, pill: "Starting", title: "Starting the drive", text: message, spinner: true };
  if (state === "replaying") return { state, pill: "Replaying", badge: "Replaying a control log" };
  if (status.you_drive) return { state, pill: "You drive" };
  if (status.driver === null) return { state, pill: "Nobody drives", badge: "Nobody drives. Press a key to take the wheel." };
  if (status.waiting > 0) return { state: "waiting", pill: `Number ${status.waiting} in line`, badge: `Somebody else drives. You are number ${status.waiting} in line for the wheel.` };
  return { state: "waiting", pill: "Watching", badge: "Somebody else drives. You are watching." };
}

function render() {
  const now = situation();
  document.body.dataset.state = now.state;
  setText($("status"), now.pill);
  setText($("model"), welcome.model);

  $("card").hidden = !now.title;
  $("stage").classList.toggle("dim", Boolean(now.title));
  setText($("card-title"), now.title ?? "");
  setText($("card-text"), now.text ?? "");
  $("card-spinner").hidden = !now.spinner;
  $("card-progress").hidden = now.progress === undefined;
  $("card-progress").value = now.progress ?? 0;
  $("card-button").hidden = !now.button;
  if (now.button) setText($("card-button"), now.button[0]);
  $("card-button").onclick = now.button ? now.button[1] : null;
  $("badge").hidden = !now.badge;
  setText($("badge"), now.badge ?? "");

  const open = link === "open" && status !== null;
  const driving = open && status.you_drive;
  const paused = open && status.state === "paused";
  const queued = open && !driving && status.waiting > 0;
  $("pad").classList.toggle("idle", !driving);
  $("pause").disabled = !driving || !["running", "paused", "replaying"].includes(status.state);
  setAttribute($("pause"), "aria-pressed", String(paused));
  setText($("pause").lastElementChild, paused ? "Go on" : "Pause");
  $("wheel").disabled = !open;
  setAttribute($("wheel"), "aria-pressed", String(driving));
  const free = open && status.driver === null;
  setText($("wheel").lastElementChild, driving ? "Leave the wheel" : queued ? "Leave the line" : free ? "Take the wheel" : "Wait for the wheel");
  world.enable(driving);
  recordings.enable(driving && status.state !== "loading");
}

function renderStats() {
  const count = (value, unit, digits = 0) => (Number.isFinite(value) ? `${value.toFixed(digits)} ${unit}`.trim() : "–");
  setText($("stat-shown"), count(screen.shown.perSecond(), "fps", 1));
  setText($("stat-fps"), count(stats.fps, "fps", 1));
  setText($("stat-chunk"), count(stats.chunk_ms, "ms"));
  setText($("stat-read"), count(stats.key_to_read_ms, "ms"));
  setText($("stat-network"), count(connection.roundTrip ?? NaN, "ms", 1));
  setText($("stat-dropped"), count((stats.dropped ?? 0) + screen.playout.skipped, ""));
  setText($("stat-memory"), count(stats.memory_mib, "MiB"));
  const { last, median } = latency;
  setText($("stat-latency"), last === null ? "–" : `${last.toFixed(0)} ms (median ${median.toFixed(0)})`);
}

// A live region speaks when its text is set, even to what it was.
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function setAttribute(element, name, value) {
  if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

function toast(text) {
  const note = document.createElement("p");
  note.textContent = text;
  $("toasts").replaceChildren(...[...$("toasts").children].slice(-2), note);
  setTimeout(() => note.remove(), 7000);
}

// From the user

function togglePause() {
  if (!$("pause").disabled) send({ type: "pause", paused: status.state !== "paused" });
}

function toggleWheel() {
  const has = status.you_drive || status.waiting > 0;
  send({ type: "wheel", take: !has });
}

addEventListener("keydown", (event) => {
  if (event.key === "Escape" && takesKeys(event.target)) return $("stage").focus({ preventScroll: true });
  if (takesKeys(event.target) || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.code === "KeyP") togglePause();
  if (event.code === "KeyR") recordings.toggle();
});
$("pause").addEventListener("click", togglePause);
$("wheel").addEventListener("click", toggleWheel);

const narrow = matchMedia("(max-width: 760px)");
let allStats = !narrow.matches;
function showStats() {
  $("stats").classList.toggle("short", !allStats);
  setAttribute($("toggle-stats"), "aria-pressed", String(allStats));
}
$("toggle-stats").addEventListener("click", () => { allStats = !allStats; showStats(); });

if (document.fullscreenEnabled) {
  $("fullscreen").hidden = false;
  $("fullscreen").addEventListener("click", () => {
    if (document.fullscreenElement) document.exitFullscreen();
    else $("stage").parentElement.requestFullscreen();
  });
}

showStats();
render();
setInterval(() => { renderStats(); if (link !== "open") render(); }, 500);
connection.open();
