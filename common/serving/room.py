"""The room around the world: who is there, who drives, and what everybody is told.

All but the frames' encoding happens in the event loop; the engine is only told, never waited for.
"""

import asyncio
import contextlib
import io
import logging
import time
from collections import deque
from statistics import median

from fastapi import WebSocket
from PIL import Image

from common.serving import protocol
from common.serving.client_session import ClientSession, Outgoing
from common.serving.commands import obey
from common.serving.engine import Engine, Load
from common.serving.model import ModelInfo, Start
from common.serving.playout import Frame
from common.serving.protocol import ProtocolError, parse_message
from common.serving.recording import Recording, RecordingStore
from common.serving.wheel import Wheel

logger = logging.getLogger(__name__)
MAX_CLIENTS = 32
RECORDING_SECONDS = 600
EXAMPLES = (
    "A red car drives through green grassland with round hills under a clear sky.",
    "A white car drives through a wide sandy desert with red mesas at sunset.",
    "A blue car drives through a night city of lit towers in steady rain.",
)


def encode_jpeg(frame: Frame) -> bytes:
    """Full colour resolution: with subsampling the thin lines of small pictures smear."""
    out = io.BytesIO()
    Image.fromarray(frame.pixels).save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


class Room:
    """One world and its clients. Made anew for each start of the server.

    Args:
        info, load, start: see `Engine`.
        idle_seconds: see `Wheel`.
        examples: prompts that clients may offer.
    """

    def __init__(
        self, info: ModelInfo, load: Load, start: Start, idle_seconds: float = 30.0, examples: tuple = EXAMPLES
    ):
        self.info, self.examples = info, examples
        self.engine = Engine(info, load, start, self._hand_out, self._changed)
        self.wheel = Wheel(idle_seconds)
        self.store = RecordingStore()
        self.clients: dict[int, ClientSession] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ticker: asyncio.Task | None = None
        self._num_clients_ever = 0
        self._recording: Recording | None = None
        self._left: deque[float] = deque(maxlen=64)  # when frames were handed out
        self._serve_seconds: deque[float] = deque(maxlen=64)

    async def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.engine.start()
        self._ticker = asyncio.create_task(self._tick())

    async def close(self) -> None:
        self._ticker.cancel()
        await asyncio.to_thread(self.engine.stop)
        if self._recording:
            await asyncio.to_thread(self._recording.join)
        self.store.close()

    # From the engine's threads

    def _hand_out(self, frame: Frame, began: float) -> None:
        outgoing = Outgoing(frame, encode_jpeg(frame), began)
        if (recording := self._recording) is not None:
            recording.add(frame)
        self._call(self._deliver, outgoing)

    def _changed(self) -> None:
        self._call(self.tell_status)

    def _call(self, function, *arguments) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody is left to be told
            self._loop.call_soon_threadsafe(function, *arguments)

    # In the event loop

    def _deliver(self, outgoing: Outgoing) -> None:
        self._left.append(outgoing.began)
        for client in self.clients.values():
            client.offer(outgoing)

    def _sent(self, outgoing: Outgoing) -> None:
        self._serve_seconds.append(time.perf_counter() - outgoing.began)

    def _welcome(self, client: ClientSession) -> dict:
        limits = {
            "message_bytes": protocol.MAX_MESSAGE_BYTES,
            "replay_bytes": protocol.MAX_REPLAY_BYTES,
            "prompt_chars": protocol.MAX_PROMPT_CHARS,
            "seed": protocol.MAX_SEED,
            "recording_seconds": RECORDING_SECONDS,
            "idle_seconds": self.wheel.idle_seconds,
        }
        about = {name: getattr(self.info, name) for name in ("signals", "fps", "height", "width")}
        return {
            "type": "welcome",
            "version": protocol.VERSION,
            "client": client.id,
            "model": self.info.name,
            **about,
            "prompts": list(self.examples),
            "clips": list(self.info.clips),
            "limits": limits,
        }

    def tell_status(self) -> None:
        if not self.clients:
            return
        status = {"type": "status", **self.engine.status(), "driver": self.wheel.driver, "recording": self.is_recording}
        for client in self.clients.values():
            waiting = self.wheel.waiting
            place = waiting.index(client.id) + 1 if client.id in waiting else 0
            client.say({**status, "you_drive": client.id == self.wheel.driver, "waiting": place})

    def _fps(self) -> float:
        now = time.perf_counter()
        recent = [moment for moment in self._left if now - moment < 2.5]
        return round((len(recent) - 1) / (recent[-1] - recent[0]), 2) if len(recent) > 1 else 0.0

    async def _tick(self) -> None:
        """Four times a second the wheel's clock, once a second the figures."""
        ticks = 0
        while True:
            await asyncio.sleep(0.25)
            ticks += 1
            driver = self.wheel.driver
            self.wheel.expire(time.monotonic())
            self.after_wheel(driver)
            if ticks % 4 == 0 and self.clients:
                serve = median(self._serve_seconds) if self._serve_seconds else 0.0
                stats = {"type": "stats", "fps": self._fps(), "serve_ms": round(1000 * serve, 2), **self.engine.stats()}
                for client in self.clients.values():
                    client.say({**stats, "dropped": client.dropped})

    def after_wheel(self, driver_before: int | None) -> None:
        """The wheel was passed on: the old driver's command, pause and recording end with it."""
        if self.wheel.driver == driver_before:
            return
        self.engine.let_go()
        if driver_before is not None:
            self.end_recording()
            self.engine.pause(False)
        self.tell_status()

    # One client

    async def serve(self, websocket: WebSocket) -> None:
        """A client's whole visit; the connection is accepted already."""
        if len(self.clients) >= MAX_CLIENTS:
            await websocket.close(1013, "the room is full")
            return
        self._num_clients_ever += 1
        client = ClientSession(websocket, self._num_clients_ever, self._sent)
        client.say(self._welcome(client))
        self.clients[client.id] = client
        self.engine.watch(True)
        self.wheel.join(client.id, time.monotonic())
        self.tell_status()
        writer = asyncio.create_task(client.write())
        reader = asyncio.create_task(self._read(client))
        try:
            await asyncio.wait([writer, reader], return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self.clients[client.id]
            self._leave(client)
            for task in (writer, reader):
                task.cancel()
            _, ended = await asyncio.gather(writer, reader, return_exceptions=True)  # the writer: with its connection
        farewell = (1008, ended) if isinstance(ended, str) else None  # why it is shown the door
        if isinstance(ended, Exception):
            logger.error("client %d asked for what the server failed at", client.id, exc_info=ended)
            farewell = (1011, "the server failed at this; its log says why")
        if farewell:
            with contextlib.suppress(Exception):  # who does not read does not learn it
                await asyncio.wait_for(websocket.close(*farewell), timeout=2)

    def _leave(self, client: ClientSession) -> None:
        driver = self.wheel.driver
        self.wheel.leave(client.id, time.monotonic())
        self.after_wheel(driver)
        self.engine.watch(bool(self.clients))
        self.tell_status()

    async def _read(self, client: ClientSession) -> str | None:
        """Does what the client asks for until it leaves (None), or has to (why)."""
        while True:
            event = await client.websocket.receive()
            if event["type"] == "websocket.disconnect":
                return None
            if client.is_flooding():
                return "too many messages"
            try:
                obey(self, client, parse_message(event.get("text")))
            except ProtocolError as error:
                client.error(str(error))
                if client.is_abusive():
                    return "too many wrong messages"

    # Recordings

    @property
    def is_recording(self) -> bool:
        return self._recording is not None and not self._recording.is_over

    def record(self, client: ClientSession) -> None:
        """Records the stream from now on; the client is told where the files are when the recording has ended."""
        if self._recording is not None:
            client.error("a recording is running or being finished; try again in a moment")
            return

        def finished(message: dict | None, error: str | None) -> None:
            self._call(self._recorded, client, message, error)

        most = round(RECORDING_SECONDS * self.info.fps)
        self._recording = Recording(self.store, self.engine.stream_number, self.info.fps, most, finished)

    def end_recording(self) -> None:
        if self._recording is not None:
            self._recording.end()

    def _recorded(self, client: ClientSession, message: dict | None, error: str | None) -> None:
        self._recording = None
        if message is not None:
            client.say(message)
        else:
            client.error(error)
        self.tell_status()
