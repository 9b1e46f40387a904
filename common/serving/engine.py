"""The world: a model that makes frames in a thread of its own, and a second thread that hands them out on time.

Nobody waits for a viewer in here. A shift starts as late as it can without the picture standing still, so that it
reads the newest command: when the frames that wait will last just as long as the next shift is expected to take.
"""

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from common.cogvideox.streaming import VideoStream
from common.config.errors import UserError, is_out_of_memory, one_line
from common.serving.history import History
from common.serving.model import FROM_TEXT, ModelInfo, Progress, Start, TextEmbeds, WorldModel
from common.serving.playout import Frame, Playout
from common.serving.prompt_desk import PromptDesk
from common.serving.protocol import NULL_SIGNAL

logger = logging.getLogger(__name__)
LEAD = 1.1  # a shift is expected to take this much more than the slowest of the recent ones …
LEAD_SECONDS = 0.01  # … and so much longer
RECENT = 16
Load = Callable[[Progress], WorldModel]


@dataclass(frozen=True)
class Held:
    """The command in force, who gave it under which id, and when it arrived."""

    signal: str | None
    id: int = 0
    client: int | None = None
    arrived: float = 0.0


class Engine:
    """Owns the model. All methods may be called from any thread and return at once, but for `stop`.

    Args:
        info: of the model.
        load: makes the model; called in the world's thread.
        start: the first stream.
        on_frame: (frame, when its turn came) in the second thread; it must not wait for anybody.
        on_change: what `status` says has changed; from any thread.
    """

    def __init__(
        self,
        info: ModelInfo,
        load: Load,
        start: Start,
        on_frame: Callable[[Frame, float], None],
        on_change: Callable[[], None],
    ):
        self.info, self._load, self._on_frame, self._on_change = info, load, on_frame, on_change
        self.condition = threading.Condition()
        self.playout = Playout(info.fps, self.condition)
        self.stream_number = 0
        self._restart: Start | None = start
        self._start = start
        self._model: WorldModel | None = None
        self._is_closing = self._is_watched = False
        self._held, self._read = Held(info.neutral), Held(info.neutral)
        self._prompts = PromptDesk(self.condition, lambda message: self._show(message=message))
        self._history = History(info, start)
        self._status = {"state": "loading", "progress": 0.0, "message": "", "prompt": start.prompt}
        self._chunk_seconds: deque[float] = deque(maxlen=RECENT)
        self._waits: deque[float] = deque(maxlen=4 * RECENT)  # from a command's arrival until a shift read it
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._make, self._hand_out)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, timeout: float = 30.0) -> None:
        """Ends the threads after the shift that is being made."""
        with self.condition:
            self._is_closing = True
            self.playout.close()
        for thread in self._threads:
            thread.join(timeout)
        self._prompts.close()

    # What the driver does

    def signal(self, name: str | None, signal_id: int, client: int) -> None:
        if name is not None:
            self.info.index(name)
        with self.condition:
            self._held = Held(name, signal_id, client, time.perf_counter())

    def let_go(self) -> None:
        """Nobody holds the wheel: neutral."""
        with self.condition:
            self._held = Held(self.info.neutral)

    def pause(self, paused: bool) -> None:
        with self.condition:
            self.playout.pause(paused)
            self._held = replace(self._held, arrived=time.perf_counter())  # a pause is no delay
        self._on_change()

    def watch(self, is_watched: bool) -> None:
        """Without anybody who looks the world stands still and costs nothing."""
        with self.condition:
            self._is_watched = is_watched
            self.condition.notify_all()

    def restart(self, prompt: str | None = None, seed: int | None = None, start: str | None = None, log=None) -> None:
        """A new stream as soon as the shift that is being made is over. Without a seed one is drawn; what else is None
        stays as it was."""
        seed = secrets.randbelow(2**31) if seed is None else seed
        with self.condition:
            old = self._restart or replace(self._start, prompt=self._status["prompt"])
            self._restart = Start(prompt or old.prompt, seed, start or old.start, log)
            self.stream_number += 1
            self._prompts.forget()  # they were meant for the old stream
            self.playout.clear()
            self.playout.pause(False)
        self._show("loading", 0.5 if self._model else 0.0, "starting a new world")

    def change_prompt(self, prompt: str) -> None:
        """Encoded aside, then swapped in between two shifts; the newest of several requests counts."""
        with self.condition:
            if self._restart is not None:
                self._restart = replace(self._restart, prompt=prompt)
            elif self._status["state"] == "error":  # for the stream that the next reset starts
                self._status["prompt"] = prompt
            else:
                self._prompts.ask(prompt, self._model)
                return
        self._on_change()

    # What it says of itself

    def status(self) -> dict:
        with self.condition:
            status = dict(self._status)
            start = self._restart or self._start
            if self._restart:
                status["prompt"] = start.prompt
            if status["state"] == "running" and self.playout.is_paused:
                status["state"] = "paused"
            elif status["state"] == "running" and self._history.is_replaying:
                status["state"] = "replaying"
            return {**status, "seed": start.seed}

    @property
    def is_replaying(self) -> bool:
        with self.condition:
            return (self._restart or self._start).log is not None and (
                self._restart is not None or self._history.is_replaying
            )

    def stats(self) -> dict:
        with self.condition:
            chunk, waits = list(self._chunk_seconds), list(self._waits)
            queue = len(self.playout)
        return {
            "chunk_ms": round(1000 * median(chunk), 1) if chunk else 0.0,
            "key_to_read_ms": round(1000 * median(waits), 1) if waits else 0.0,
            "memory_mib": round(self._model.memory_bytes() / 2**20) if self._model else 0,
            "queue": queue,
        }

    def _show(self, state: str | None = None, progress: float | None = None, message: str = "", **rest: str) -> None:
        with self.condition:
            given = {"state": state, "progress": progress, "message": message, **rest}
            self._status |= {name: value for name, value in given.items() if value is not None}
        self._on_change()

    # The world's thread

    def _make(self) -> None:
        while not self._is_closing:
            try:
                if self._model is None:
                    self._model = self._load(lambda progress, message: self._show("loading", progress, message))
                self._play_stream()
            except Exception as error:
                self._fail(error)
                with self.condition:
                    self.condition.wait_for(lambda: self._is_closing or self._restart is not None)

    def _fail(self, error: Exception) -> None:
        """One line for the clients, the whole trace for the log; the next `restart` begins anew."""
        if not isinstance(error, UserError):
            logger.exception("the world has stopped")
        message = "out of memory" if is_out_of_memory(error) else one_line(error)[:300] or type(error).__name__
        with self.condition:
            if self._model is not None and self._history.shift == 0:  # its clip may be what failed: the next, without
                self._start = replace(self._start, start=FROM_TEXT)
            if self._model is None:  # or the same would be tried again and again
                self._start, self._restart = self._restart or self._start, None
            self.playout.clear()
        self._show("error", 0.0, message)

    def _play_stream(self) -> None:
        """One stream, until another is asked for."""
        with self.condition:
            start, self._restart = self._restart, None
            number = self.stream_number
            self._start, self._history = start, History(self.info, start)
            history = self._history
        self._show("loading", 0.95, "starting a new world", prompt=start.prompt)
        history.settings = self.info.settings_from(start.start)  # of the clip as it is before it is read
        prompts = {text: self._model.encode(text) for text in {start.prompt, *self._replayed_prompts(start)}}
        stream = self._model.open(start, prompts[start.prompt], self._read_signal)
        was_replaying = history.is_replaying
        while self._wait_for_turn():
            self._apply_prompt(stream, prompts)
            began = time.perf_counter()
            chunk = next(stream)
            if history.shift > 0 or not self._chunk_seconds:  # the first of a stream samples its window as well
                self._chunk_seconds.append(time.perf_counter() - began)
            self._put(chunk, number)
            history.shift += 1
            if history.shift == 1 or was_replaying != history.is_replaying:
                was_replaying = history.is_replaying
                self._show("running", 1.0)

    @staticmethod
    def _replayed_prompts(start: Start) -> list[str]:
        return [prompt for _, prompt in start.log.prompts] if start.log else []

    def _wait_for_turn(self) -> bool:
        """Sleeps until the next shift has to start; False when this stream is over."""
        with self.condition:
            while not self._is_closing and self._restart is None:
                wait = self._seconds_to_wait()
                if wait is not None and wait <= 0:
                    return True
                self.condition.wait(wait)
            return False

    def _seconds_to_wait(self) -> float | None:
        """None: until something changes. There are never more than two chunks, whatever was expected."""
        if self._history.shift == 0:
            return 0.0
        if self.playout.is_paused or not self._is_watched or len(self.playout) > self.info.frames_per_chunk:
            return None
        return self.playout.seconds_left() - (LEAD * max(self._chunk_seconds) + LEAD_SECONDS)

    def _apply_prompt(self, stream: VideoStream, prompts: dict[str, TextEmbeds]) -> None:
        change = self._prompts.take()
        replayed = self._history.replayed_prompt()
        if replayed is not None:
            change = (replayed, prompts[replayed])
        if change is not None:
            prompt, embeds = change
            stream.change_prompt(*embeds)
            self._history.note_prompt(prompt)
            self._show(prompt=prompt)

    def _read_signal(self) -> str | int:
        """What the pipeline asks for right before a shift's first forward."""
        history = self._history
        with self.condition:
            held, before = self._held, self._read
            if history.read_shift == history.shift:  # a stream that begins from text asks twice in its first shift
                held = before
            elif history.is_replaying:
                held = Held(history.replayed_signal())
            elif (held.client, held.id) != (before.client, before.id) and held.client is not None:
                self._waits.append(time.perf_counter() - held.arrived)
            self._read = held
        history.note_signal(held.signal)
        return NULL_SIGNAL if held.signal is None else held.signal

    def _put(self, chunk: np.ndarray, number: int) -> None:
        held, history = self._read, self._history
        index = self.info.index(held.signal) if self.info.signals else NULL_SIGNAL
        frames = [
            Frame(pixels, number, history.num_frames + i, history.shift, index, held.id, held.client, history)
            for i, pixels in enumerate(chunk)
        ]
        history.num_frames += len(chunk)
        with self.condition:
            if self._restart is None:
                self.playout.put(frames, median(self._chunk_seconds) / self.info.frames_per_chunk)

    # The thread that hands frames out

    def _hand_out(self) -> None:
        while (frame := self.playout.take()) is not None:
            try:
                self._on_frame(frame, time.perf_counter())
            except Exception:
                logger.exception("a frame was lost")
