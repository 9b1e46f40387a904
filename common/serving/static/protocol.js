// The wire: frames as the server packs them, and a WebSocket that comes back when it is lost.

const HEADER_BYTES = 16;

// Little-endian: u8 version, i8 signal (-1 is none), u8 flags, u8 zero, u32 frame, u32 newest signal id read, u32 stream;
// then a JPEG.
export function unpackFrame(buffer, signals) {
  const view = new DataView(buffer);
  if (buffer.byteLength <= HEADER_BYTES || view.getUint8(0) !== 1) return null;
  return {
    signal: signals[view.getInt8(1)] ?? null,
    isFirst: (view.getUint8(2) & 1) === 1,
    number: view.getUint32(4, true),
    readId: view.getUint32(8, true),
    stream: view.getUint32(12, true),
    jpeg: new Blob([new Uint8Array(buffer, HEADER_BYTES)], { type: "image/jpeg" }),
  };
}

const FIRST_WAIT = 500, LONGEST_WAIT = 8000; // ms between attempts; doubles each time
const PING_EVERY = 2000, SILENCE = 12000; // a connection that says nothing for so long is taken for dead

export class Connection {
  // handlers: onMessage(object), onFrame(ArrayBuffer), onOpen(), onLost({code, reason}, attempt, waitInMs)
  constructor(url, handlers) {
    this.url = url;
    this.handlers = handlers;
    this.attempt = 0;
    this.roundTrip = null;
    this.socket = null;
    setInterval(() => this.watch(), PING_EVERY);
    addEventListener("online", () => this.retryNow());
  }

  open() {
    clearTimeout(this.timer);
    const socket = new WebSocket(this.url);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    this.heard = performance.now();
    socket.onopen = () => this.handlers.onOpen();
    socket.onmessage = (event) => {
      this.heard = performance.now();
      if (event.data instanceof ArrayBuffer) {
        this.handlers.onFrame(event.data);
        return;
      }
      const message = JSON.parse(event.data);
      if (message.type === "welcome") this.attempt = 0; // only a server that talks to us counts as reached
      if (message.type === "pong") this.roundTrip = this.heard - message.time;
      else this.handlers.onMessage(message);
    };
    socket.onclose = (event) => this.lost(socket, event);
  }

  lost(socket, event) {
    if (socket !== this.socket) return; // an older one that was given up already
    this.socket = null;
    this.roundTrip = null;
    const wait = Math.min(LONGEST_WAIT, FIRST_WAIT * 2 ** this.attempt) * (0.9 + 0.2 * Math.random());
    this.attempt += 1;
    this.timer = setTimeout(() => this.open(), wait);
    this.handlers.onLost(event, this.attempt, wait);
  }

  retryNow() {
    if (!this.socket) this.open();
  }

  watch() {
    const socket = this.socket;
    if (!socket) return;
    if (performance.now() - this.heard > SILENCE) {
      socket.close();
      this.lost(socket, { code: 0, reason: "the server fell silent" });
    } else {
      this.send({ type: "ping", time: performance.now() });
    }
  }

  // Returns whether it could be sent. Nothing is kept for later: an old command is worse than none.
  send(message) {
    if (this.socket?.readyState !== WebSocket.OPEN) return false;
    this.socket.send(JSON.stringify(message));
    return true;
  }
}
