"""The short queue between the world and its viewers, and the clock by which frames leave it."""

import threading
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from common.serving.history import History

CATCH_UP = 0.9  # a late clock makes frames at most a ninth faster until it is on time again …
MAX_LATENESS = 0.5  # … and forgets what it is late by more than this, in seconds


@dataclass(frozen=True)
class Frame:
    """A frame on its way out: uint8 pixels [h,w,3] and where it comes from."""

    pixels: np.ndarray
    stream: int
    number: int
    shift: int
    signal: int  # index, −1 for none
    signal_id: int  # newest id read by the shift that made it, and whose it was
    client: int | None
    history: History


class Playout:
    """Frames wait here until they are due, 1/fps seconds apart; a world that is slower sets its own even pace.

    Args:
        fps: frames a second.
        condition: guards all state and is notified of every change; shared with the world's thread, which waits on it
            for the moment to make more frames.
    """

    def __init__(self, fps: float, condition: threading.Condition):
        self.interval, self.condition = 1 / fps, condition
        self.is_paused = self._is_closed = False
        self._frames: deque[Frame] = deque()
        self._ideal: float | None = None  # when the next frame is due by the clock; None: whenever it is there
        self._due = 0.0  # when it may leave at the earliest
        self._spacing = CATCH_UP * self.interval

    def __len__(self) -> int:
        return len(self._frames)

    def put(self, frames: list[Frame], seconds_per_frame: float) -> None:
        """Appends a chunk; `seconds_per_frame` is what the world needs of late to make one."""
        with self.condition:
            self._frames.extend(frames)
            is_slow = seconds_per_frame > self.interval
            self._spacing = max(CATCH_UP * self.interval, 0.97 * seconds_per_frame if is_slow else 0.0)
            self.condition.notify_all()

    def seconds_left(self) -> float:
        """Until the frames that wait have left and the next one is due. Call it with the condition held."""
        now = time.perf_counter()
        return max(self._due - now, 0.0) + len(self._frames) * max(self.interval, self._spacing)

    def take(self) -> Frame | None:
        """Waits for the next frame to be due; None once closed."""
        with self.condition:
            while not self._is_closed:
                wait = None
                if self._frames and not self.is_paused:
                    now = time.perf_counter()
                    wait = self._due - now
                    if wait <= 0:
                        return self._leave(now)
                self.condition.wait(wait)
            return None

    def _leave(self, now: float) -> Frame:
        ideal = now if self._ideal is None else max(self._ideal, now - MAX_LATENESS)
        self._ideal = ideal + self.interval
        self._due = max(self._ideal, now + self._spacing)
        self.condition.notify_all()
        return self._frames.popleft()

    def clear(self) -> None:
        with self.condition:
            self._frames.clear()
            self._ideal, self._due = None, 0.0
            self.condition.notify_all()

    def pause(self, paused: bool) -> None:
        with self.condition:
            self.is_paused = paused
            self._ideal = None  # the time that stood still is not made up for
            self.condition.notify_all()

    def close(self) -> None:
        with self.condition:
            self._is_closed = True
            self.condition.notify_all()
