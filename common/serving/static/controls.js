// Keyboard and fingers to one of the nine signals. A signal is a chord: what is held down together.

const KEYS = {
  ArrowUp: "up", ArrowDown: "down", ArrowLeft: "left", ArrowRight: "right",
  KeyW: "up", KeyS: "down", KeyA: "left", KeyD: "right",
};

const WORDS = { D: "drive", B: "brake", N: "coast", L: "left", R: "right" };

export function signalOf(held) {
  const along = held.has("up") - held.has("down");
  const across = held.has("left") - held.has("right");
  return (along > 0 ? "D" : along < 0 ? "B" : "N") + (across > 0 ? "L" : across < 0 ? "R" : "");
}

// "DL" → "drive left"; a model with signals of its own has its own names
export function describe(signal) {
  return /^[DBN][LR]?$/.test(signal ?? "") ? [...signal].map((letter) => WORDS[letter]).join(" ") : signal ?? "none";
}

// Which directions a shown signal lights up
export function directionsOf(signal) {
  const lit = { D: "up", B: "down", L: "left", R: "right" };
  return /^[DBN][LR]?$/.test(signal ?? "") ? [...signal].map((letter) => lit[letter]).filter(Boolean) : [];
}

// While one of these has the focus, arrow keys and letters belong to it.
export function takesKeys(element) {
  return Boolean(element?.closest?.("textarea, input, select, dialog"));
}

export class Controls {
  // `pad` holds buttons with data-direction; onChange() is called whenever what is held changes.
  constructor(pad, onChange) {
    this.pad = pad;
    this.onChange = onChange;
    this.keys = new Set(); // codes of keys that are down
    this.pointers = new Map(); // pointer id → direction
    this.pressed = new Map(); // button that Space or Enter holds down → direction
    addEventListener("keydown", (event) => this.keyDown(event));
    addEventListener("keyup", (event) => this.keyUp(event));
    // A key that is let go in another window is never reported here.
    addEventListener("blur", () => this.release());
    document.addEventListener("visibilitychange", () => document.hidden && this.release());
    document.addEventListener("focusin", (event) => takesKeys(event.target) && this.release());
    for (const type of ["pointerdown", "pointermove", "pointerup", "pointercancel", "lostpointercapture"]) {
      pad.addEventListener(type, (event) => this.pointer(event));
    }
    pad.addEventListener("focusout", (event) => this.pressed.delete(event.target) && this.onChange());
    pad.addEventListener("contextmenu", (event) => event.preventDefault()); // what a long press opens
  }

  held() {
    const codes = [...this.keys].map((code) => KEYS[code]);
    return new Set([...codes, ...this.pointers.values(), ...this.pressed.values()]);
  }

  release() {
    if (!this.keys.size && !this.pointers.size && !this.pressed.size) return;
    this.keys.clear();
    this.pointers.clear();
    this.pressed.clear();
    this.onChange();
  }

  keyDown(event) {
    const button = event.target.closest?.("[data-direction]");
    if (button && (event.code === "Space" || event.code === "Enter")) {
      event.preventDefault();
      if (!event.repeat) this.pressed.set(button, button.dataset.direction);
    } else if (KEYS[event.code] && !event.ctrlKey && !event.altKey && !event.metaKey && !takesKeys(event.target)) {
      event.preventDefault(); // the page must not scroll
      if (event.repeat || this.keys.has(event.code)) return;
      this.keys.add(event.code);
    } else {
      return;
    }
    if (!event.repeat) this.onChange();
  }

  keyUp(event) {
    const button = event.target.closest?.("[data-direction]");
    const released = event.code === "Space" || event.code === "Enter" ? this.pressed.delete(button) : this.keys.delete(event.code);
    if (released) this.onChange();
  }

  // Fingers may slide from one button to the next, and several may be down at once.
  pointer(event) {
    const isDown = event.type === "pointerdown" || (event.type === "pointermove" && this.pointers.has(event.pointerId));
    if (event.type === "pointerdown" && event.button !== 0) return;
    const before = this.pointers.get(event.pointerId);
    let direction;
    if (isDown) {
      event.preventDefault();
      if (event.type === "pointerdown") this.pad.setPointerCapture(event.pointerId);
      const under = document.elementFromPoint(event.clientX, event.clientY);
      direction = under?.closest("[data-direction]")?.dataset.direction ?? (event.type === "pointermove" ? before : undefined);
    }
    if (direction) this.pointers.set(event.pointerId, direction);
    else this.pointers.delete(event.pointerId);
    if (direction !== before) this.onChange();
  }
}
