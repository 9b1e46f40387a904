"""Drives as files: an mp4 and its control log, written on the server under names that only the server chooses."""

import logging
import queue
import secrets
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from common.config.errors import UserError, one_line
from common.data.video_writer import VideoWriter
from common.serving.playout import Frame
from common.serving.protocol import MAX_REPLAY_BYTES

logger = logging.getLogger(__name__)
MAX_WAITING = 128  # frames, eight seconds: an encoder that is so late is too slow for this machine
WHOLE_FILE = ("-movflags", "+faststart")  # plays and seeks everywhere, and nobody reads the file before it is finished


class RecordingStore:
    """A temporary directory with the newest recordings, gone with `close`."""

    def __init__(self, keep: int = 8):
        self.keep = keep
        self._directory = tempfile.TemporaryDirectory(prefix="drives-")
        self._files: dict[str, Path] = {}  # name as in the address → file, oldest first

    def new_name(self) -> str:
        """128 random bits: who knows the name was told it, so a recording's address needs no token."""
        return secrets.token_hex(16)

    def path(self, name: str) -> Path:
        """Where the server is to write."""
        return Path(self._directory.name) / name

    def publish(self, name: str) -> None:
        """From now on both files of a recording can be fetched, and the oldest one no more."""
        for suffix in (".mp4", ".json"):
            self._files[name + suffix] = self.path(name + suffix)
        while len(self._files) > 2 * self.keep:
            oldest = next(iter(self._files))
            self._files.pop(oldest).unlink(missing_ok=True)

    def find(self, name: str) -> Path | None:
        """The file of that name, if the server has made it. What a client sends is only ever compared."""
        return self._files.get(name)

    def close(self) -> None:
        self._files.clear()
        self._directory.cleanup()


class Recording:
    """A recording of one stream, encoded in a thread of its own; `add` never waits.

    Args:
        stream: number of the stream; with the first frame of another one the recording ends.
        max_frames: after so many it ends.
        on_end: called once, from the recording's thread, with the message for the client (and an error, or None).
    """

    def __init__(
        self,
        store: RecordingStore,
        stream: int,
        fps: float,
        max_frames: int,
        on_end: Callable[[dict | None, str | None], None],
    ):
        self.store, self.stream, self.fps, self.max_frames, self._on_end = store, stream, fps, max_frames, on_end
        self.is_over = False
        self._num_frames = 0
        self._lock = threading.Lock()
        self._frames: queue.Queue[Frame | None] = queue.Queue(MAX_WAITING + 1)
        self._thread = threading.Thread(target=self._write, name="recording", daemon=True)
        self._thread.start()

    def add(self, frame: Frame) -> None:
        with self._lock:
            if self.is_over or frame.stream < self.stream:
                return
            if frame.stream > self.stream or self._frames.qsize() >= MAX_WAITING:
                self._end()
                return
            self._frames.put_nowait(frame)
            self._num_frames += 1
            if self._num_frames >= self.max_frames:
                self._end()

    def end(self) -> None:
        """No more frames; `on_end` follows when the file is finished."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if not self.is_over:
            self.is_over = True
            self._frames.put_nowait(None)  # one place is kept free for it

    def join(self, timeout: float = 10.0) -> None:
        self.end()
        self._thread.join(timeout)

    def _write(self) -> None:
        try:
            message, error = self._write_files(), None
        except Exception as reason:
            if not isinstance(reason, UserError):
                logger.exception("a recording failed")
            message, error = None, f"the recording failed: {one_line(reason)[:200]}"
            self.end()
        self._on_end(message, error)

    def _write_files(self) -> dict:
        name, first, last = self.store.new_name(), None, None
        with VideoWriter(self.store.path(f"{name}.mp4"), self.fps, options=WHOLE_FILE) as video:
            while (frame := self._frames.get()) is not None:
                first, last = first or frame, frame
                video.write(frame.pixels[None])
        if first is None:
            raise UserError("it was ended before its first frame")
        log = last.history.log(last.shift + 1, first.number, video.num_frames)
        text = log.model_dump_json()
        if len(text.encode()) > MAX_REPLAY_BYTES - 100:  # the message around it
            text = log.model_copy(update={"complete": False}).model_dump_json()
        self.store.path(f"{name}.json").write_text(text + "\n")
        self.store.publish(name)
        files = {"video": f"/recordings/{name}.mp4", "log": f"/recordings/{name}.json"}
        return {"type": "recording", **files, "frames": video.num_frames}
