// Recording a drive, downloading it, and replaying a control log.

const $ = (id) => document.getElementById(id);

const BETWEEN = 500; // ms from one download to the next: a browser takes two at once for one that was cancelled

export function setUpRecordings(send, toast) {
  let isRecording = false, since = 0, largestLog = Infinity;

  function link(path, text) {
    const anchor = document.createElement("a");
    anchor.href = path; // it holds a secret name and needs no token
    anchor.download = path.split("/").pop();
    anchor.textContent = text;
    return anchor;
  }

  function toggle() {
    if (!$("record").disabled) send({ type: "record", on: !isRecording });
  }

  function showTime() {
    const seconds = Math.floor((performance.now() - since) / 1000);
    const text = isRecording ? `Stop ${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}` : "Record";
    const label = $("record").lastElementChild;
    if (label.textContent !== text) label.textContent = text;
  }

  $("record").addEventListener("click", toggle);
  setInterval(showTime, 500);

  $("replay").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    event.target.value = ""; // so that the same file can be chosen again
    if (!file) return;
    if (file.size > largestLog) return toast(`${file.name} is too large for a control log.`);
    let log;
    try {
      log = JSON.parse(await file.text());
    } catch {
      return toast(`${file.name} is not a control log: it is no JSON.`);
    }
    send({ type: "replay", log });
    $("stage").focus({ preventScroll: true });
  });

  return {
    toggle,
    offer({ limits }) {
      largestLog = limits?.replay_bytes ?? Infinity;
    },
    follow(status) {
      if (status.recording && !isRecording) since = performance.now();
      isRecording = Boolean(status.recording);
      $("record").setAttribute("aria-pressed", String(isRecording));
      showTime();
    },
    // A finished recording: downloaded at once, and listed, in case the browser would not have that.
    add({ video, log, frames }, fps) {
      const item = document.createElement("li");
      const length = document.createElement("span");
      length.textContent = `${(frames / fps).toFixed(1)} s`;
      const links = [link(video, "mp4"), link(log, "control log")];
      item.append(length, ...links);
      $("recordings").prepend(item);
      links.forEach((anchor, i) => setTimeout(() => anchor.click(), i * BETWEEN));
    },
    enable(driving) {
      $("record").disabled = $("replay").disabled = !driving;
    },
  };
}
