// The canvas: pictures decoded, played evenly, scaled by a whole number of screen pixels; and what is measured there.

import { Playout } from "./playout.js";

export class Screen {
  constructor(stage, canvas, onShown) {
    this.stage = stage;
    this.canvas = canvas;
    this.onShown = onShown;
    this.context = canvas.getContext("2d", { alpha: false });
    this.playout = new Playout();
    this.shown = new Rate();
    new ResizeObserver(() => this.fit()).observe(stage);
    requestAnimationFrame((now) => this.refresh(now));
  }

  setSize(width, height, fps) {
    this.playout.fps = fps;
    if (this.canvas.width !== width || this.canvas.height !== height) {
      this.canvas.width = width; // this also clears it
      this.canvas.height = height;
    }
    this.stage.style.setProperty("--aspect", `${width} / ${height}`);
    this.fit();
  }

  // Whole screen pixels per picture pixel keep small pictures crisp; a large picture rather fills the room there is.
  fit() {
    const { width, height } = this.canvas;
    const dots = devicePixelRatio;
    const most = Math.min(this.stage.clientWidth / width, this.stage.clientHeight / height) * dots;
    const scale = most >= 3 ? Math.floor(most) : most;
    this.canvas.classList.toggle("smooth", scale !== Math.floor(scale));
    this.canvas.style.width = `${(width * scale) / dots}px`;
    this.canvas.style.height = `${(height * scale) / dots}px`;
    // the margins, for what lies over the picture's corners
    this.stage.style.setProperty("--margin-x", `${(this.stage.clientWidth - (width * scale) / dots) / 2}px`);
    this.stage.style.setProperty("--margin-y", `${(this.stage.clientHeight - (height * scale) / dots) / 2}px`);
  }

  push(frame) {
    if (document.hidden) return; // nobody looks: on return the newest frames are shown, not those that piled up
    this.playout.push(frame, performance.now());
    createImageBitmap(frame.jpeg).then(
      (image) => (frame.gone ? image.close() : (frame.image = image)),
      () => this.playout.discard(frame),
    );
  }

  refresh(now) {
    requestAnimationFrame((time) => this.refresh(time));
    const frame = this.playout.next(now);
    if (!frame) return;
    this.context.drawImage(frame.image, 0, 0, this.canvas.width, this.canvas.height);
    frame.image.close();
    this.shown.count();
    this.onShown(frame);
  }
}

// Events per second over the last two seconds
export class Rate {
  constructor() {
    this.times = [];
  }

  count() {
    this.times.push(performance.now());
    if (this.times.length > 400) this.times.shift();
  }

  perSecond(window = 2000) {
    const since = performance.now() - window;
    const times = this.times.filter((time) => time > since);
    return times.length < 2 ? 0 : (1000 * (times.length - 1)) / (times.at(-1) - times[0]);
  }
}

// From sending a signal to showing the first frame that was made knowing it, in ms
export class Latency {
  constructor() {
    this.last = null;
    this.values = [];
    this.forget();
  }

  // of signals that no frame will answer any more
  forget() {
    this.waiting = new Map(); // id → time sent
  }

  sent(id, time) {
    this.waiting.set(id, time);
  }

  // `readId` is a shown frame's. Beyond our newest it is not ours but that of whoever drove before.
  seen(readId, newestId) {
    if (readId > newestId) return;
    for (const [id, time] of this.waiting) {
      if (id > readId) continue;
      this.waiting.delete(id);
      this.last = performance.now() - time;
      this.values = [...this.values.slice(-30), this.last];
    }
  }

  get median() {
    return [...this.values].sort((a, b) => a - b)[this.values.length >> 1];
  }
}
