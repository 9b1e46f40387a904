"""One connected client: what waits to be sent to it, and how its patience for mistakes runs out."""

import asyncio
import time
from collections import deque

from fastapi import WebSocket

from common.serving.playout import Frame
from common.serving.protocol import FrameHeader, pack_header, to_json

MAX_FRAMES_WAITING = 8
MAX_TEXTS_WAITING = 32
MESSAGES_A_SECOND, MESSAGES_AT_ONCE = 100, 200  # key repeat is about 30 a second
MISTAKES_FORGIVEN, FORGIVEN_AFTER = 10, 10.0  # so many within so many seconds


class Outgoing:
    """A frame encoded once for all clients. `began` is when its turn to be shown came."""

    def __init__(self, frame: Frame, jpeg: bytes, began: float):
        self.frame, self.jpeg, self.began = frame, jpeg, began

    def message_for(self, client: int) -> bytes:
        """Header and JPEG. Signal ids mean something to the client that gave them only; others read 0."""
        frame = self.frame
        signal_id = frame.signal_id if frame.client == client else 0
        header = FrameHeader(frame.signal, frame.number == 0, frame.number, signal_id, frame.stream)
        return pack_header(header) + self.jpeg


class ClientSession:
    """The outbox of a client, bounded in every direction: old frames are dropped and counted, of status and stats only
    the newest is kept, and nobody ever waits for the client but its own writer.

    Args:
        on_sent: called with each frame that went out without having had to wait behind another one.
    """

    def __init__(self, websocket: WebSocket, client_id: int, on_sent):
        self.websocket, self.id, self._on_sent = websocket, client_id, on_sent
        self.dropped = 0
        self.last_signal_id = -1
        self.last_signal: str | None = None
        self._frames: deque[Outgoing] = deque()
        self._texts: deque[dict] = deque(maxlen=MAX_TEXTS_WAITING)
        self._newest: dict[str, dict] = {}  # messages of which only the newest counts, by type
        self._wake = asyncio.Event()
        self._mistakes: deque[float] = deque(maxlen=MISTAKES_FORGIVEN + 1)
        self._credit, self._credited_at = float(MESSAGES_AT_ONCE), time.monotonic()

    def offer(self, outgoing: Outgoing) -> None:
        self._frames.append(outgoing)
        if len(self._frames) > MAX_FRAMES_WAITING:
            self._frames.popleft()
            self.dropped += 1
        self._wake.set()

    def say(self, message: dict) -> None:
        if message["type"] in ("status", "stats"):
            self._newest[message["type"]] = message
        else:
            self._texts.append(message)
        self._wake.set()

    def error(self, text: str) -> None:
        self.say({"type": "error", "message": text})

    async def write(self) -> None:
        """Sends what waits, until it is cancelled or the connection is gone."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._texts or self._newest or self._frames:
                if self._texts:
                    await self.websocket.send_text(to_json(self._texts.popleft()))
                elif self._newest:
                    await self.websocket.send_text(to_json(self._newest.pop(next(iter(self._newest)))))
                else:
                    outgoing, is_alone = self._frames.popleft(), not self._frames
                    await self.websocket.send_bytes(outgoing.message_for(self.id))
                    if is_alone:
                        self._on_sent(outgoing)

    def is_flooding(self) -> bool:
        """Counts a message; True when there are more of them than any driver would send."""
        now = time.monotonic()
        self._credit = min(self._credit + (now - self._credited_at) * MESSAGES_A_SECOND, MESSAGES_AT_ONCE) - 1
        self._credited_at = now
        return self._credit < 0

    def is_abusive(self) -> bool:
        """Counts a mistake; True when there were too many of late."""
        self._mistakes.append(time.monotonic())
        return len(self._mistakes) > MISTAKES_FORGIVEN and self._mistakes[-1] - self._mistakes[0] < FORGIVEN_AFTER
