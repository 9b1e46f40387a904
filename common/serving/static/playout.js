// From frames as they arrive, a burst per shift of the model's window, to frames at an even pace.
//
// A frame is due one period after the one before it. A burst that comes late moves everything after it back by as much,
// so the queue holds just what the worst recent delay needs; when it has not run low for a while, playing goes 10 % to
// 25 % faster until the surplus is gone. A generator slower than its frame rate is played at the rate that it reaches.

const RATE_WINDOW = 4000; // ms of arrivals that the rate is measured over
const SURPLUS_WINDOW = 1500; // ms in which the queue must not have run low
const EARLY = 4; // ms: a screen shows pictures at its own beat, and half a beat early is nearer than half a beat late

export class Playout {
  constructor(fps = 16) {
    this.fps = fps;
    this.skipped = 0; // frames thrown away here, because they came faster than they can be shown
    this.clear();
  }

  clear() {
    this.queue?.forEach(release);
    this.queue = [];
    this.bursts = []; // [{time, count}]
    this.lastArrival = -Infinity;
    this.due = 0;
    this.lowest = 0;
    this.lowestSince = 0;
    this.hurry = 1;
  }

  // `frame` gets its `image` later, when it is decoded; its place in the queue is that of its arrival.
  push(frame, now) {
    if (frame.stream !== this.stream) {
      this.clear(); // a new drive: what is left of the old one would only delay it
      this.stream = frame.stream;
    }
    const gap = now - this.lastArrival;
    this.lastArrival = now;
    if (gap > RATE_WINDOW / 2) this.bursts = []; // a pause says nothing about the rate
    if (gap > 500 / this.fps) {
      this.bursts.push({ time: now, count: 0 });
      while (now - this.bursts[0].time > RATE_WINDOW) this.bursts.shift();
    }
    this.bursts.at(-1).count += 1;
    this.queue.push(frame);
    const counts = this.bursts.map((b) => b.count).sort((a, b) => a - b);
    const burst = Math.max(4, counts[counts.length >> 1]); // the usual one, not what a stalled network lets go at once
    if (this.queue.length > 2 * burst + 1) {
      const surplus = this.queue.splice(0, this.queue.length - burst);
      surplus.forEach(release);
      this.skipped += surplus.length;
    }
  }

  // a frame that cannot be decoded
  discard(frame) {
    this.queue = this.queue.filter((other) => other !== frame);
  }

  // ms from one shown frame to the next
  period() {
    const first = this.bursts[0], last = this.bursts.at(-1);
    let rate = this.fps;
    if (first && last.time - first.time > 500) {
      const frames = this.bursts.slice(0, -1).reduce((sum, b) => sum + b.count, 0);
      rate = (1000 * frames) / (last.time - first.time);
    }
    return (1000 / Math.min(Math.max(rate, 0.5), this.fps)) * this.hurry;
  }

  // The frame to show now, or null. Ask once per screen refresh.
  next(now) {
    this.lowest = Math.min(this.lowest, this.queue.length);
    if (now - this.lowestSince > SURPLUS_WINDOW) {
      this.hurry = this.lowest >= 2 ? Math.max(0.75, 1 - 0.05 * this.lowest) : 1;
      this.lowest = this.queue.length;
      this.lowestSince = now;
    }
    if (!this.queue.length || now < this.due - EARLY || !this.queue[0].image) return null;
    const period = this.period();
    this.due = now - this.due > period ? now + period : this.due + period;
    return this.queue.shift();
  }
}

function release(frame) {
  frame.gone = true; // for a picture that is still being decoded
  frame.image?.close();
}
