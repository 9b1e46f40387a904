"""A double of the live server for tests of the page: says what it is told to, keeps what it hears, sends stripes.

It shows states that the real one passes through too quickly, or only when something is broken.
"""

import io
import json
import mimetypes
import struct
import threading
import time

import numpy as np
from PIL import Image
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection, serve

from common.serving.app import HEADERS, STATIC

SIGNALS = ["D", "DL", "DR", "B", "BL", "BR", "N", "NL", "NR"]
BURST = 8  # frames that a window shift finishes


def stripes(height: int, width: int, num_frames: int = 32) -> np.ndarray:
    """uint8 [N, height, width, 3]: diagonal stripes that move, different in every frame."""
    place = np.arange(width)[None, :] + np.arange(height)[:, None]
    moving = (place[None] + 2 * np.arange(num_frames)[:, None, None]) * (2 * np.pi / 64)
    return np.stack([127 + 120 * np.sin(moving + shift) for shift in (0.0, 2.0, 4.0)], axis=-1).astype(np.uint8)


class FakeServer:
    """Context manager. `address` is the page's; `status` what `tell` sends; `heard` the messages so far."""

    def __init__(self, video: np.ndarray | None = None, fps: int = 16, port: int = 0):
        video = stripes(64, 96) if video is None else video
        self.fps = fps
        self.pictures = [encode_jpeg(picture) for picture in video]
        self.height, self.width = video.shape[1:3]
        self.heard: list[dict] = []
        self.status = {
            "type": "status", "state": "running", "progress": 1.0, "message": "", "driver": 1, "you_drive": True,
            "waiting": 0, "seed": 7, "prompt": "A red car drives through a dry desert of warm sand at sunset.",
            "recording": False,
        }  # fmt: skip
        self.downloads: dict[str, bytes] = {}  # path → what is there
        self.signal, self.newest_id, self.stream, self.number = 6, 0, 0, 0
        self.connections: set[ServerConnection] = set()
        self.requested: list[str] = []  # paths, as asked for
        self.port, self.refusal = port, None  # (code, reason) with which connections are closed

    def __enter__(self) -> "FakeServer":
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def _open(self) -> None:
        self._server = serve(self._serve, "127.0.0.1", self.port, process_request=self._answer, compression=None)
        self.port = self._server.socket.getsockname()[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """As a server that is killed: nobody is told."""
        self._server.shutdown()
        for connection in list(self.connections):
            connection.socket.close()
        self._thread.join(timeout=5)

    def reopen(self) -> None:
        self._open()

    def _answer(self, connection: ServerConnection, request: Request) -> Response | None:
        path, _, _ = request.path.partition("?")
        self.requested.append(request.path)
        if path == "/ws":
            return None
        if path in self.downloads:
            return response(200, self.downloads[path], "application/octet-stream")
        file = STATIC / ("index.html" if path == "/" else path.removeprefix("/static/"))
        if not file.is_file():
            return response(404, b"", "text/plain")
        return response(200, file.read_bytes(), mimetypes.guess_type(file.name)[0] or "text/plain")

    def _serve(self, connection: ServerConnection) -> None:
        welcome = {
            "type": "welcome", "version": 1, "client": 1, "model": "test picture", "signals": SIGNALS, "fps": self.fps,
            "height": self.height, "width": self.width, "clips": ["00000", "00001"],
            "prompts": ["A blue car drives through green grassland with round hills in steady rain."],
        }  # fmt: skip
        try:
            if self.refusal:
                connection.close(*self.refusal)
            connection.send(json.dumps(welcome))
            connection.send(json.dumps(self.status))
            self.connections.add(connection)
            threading.Thread(target=self._stream, args=(connection,), daemon=True).start()
            for text in connection:
                self._hear(connection, json.loads(text))
        except (ConnectionClosed, OSError):
            pass
        finally:
            self.connections.discard(connection)

    def _hear(self, connection: ServerConnection, message: dict) -> None:
        if message["type"] == "ping":
            connection.send(json.dumps({"type": "pong", "time": message["time"]}))
            return
        self.heard.append(message)
        if message["type"] == "signal":
            self.signal, self.newest_id = SIGNALS.index(message["signal"]), message["id"]
        elif message["type"] == "reset":
            self.stream += 1

    def _stream(self, connection: ServerConnection) -> None:
        """A burst of frames every half second, as long as the status says running."""
        try:
            while connection in self.connections:
                if self.status["state"] == "running":
                    for _ in range(BURST):
                        connection.send(self._frame())
                    stats = {"fps": self.fps, "chunk_ms": 212.0, "key_to_read_ms": 21.0, "memory_mib": 640.0}
                    connection.send(json.dumps({"type": "stats", "serve_ms": 1.0, "dropped": 0, "queue": 0, **stats}))
                time.sleep(BURST / self.fps)
        except (ConnectionClosed, OSError):
            pass

    def _frame(self) -> bytes:
        header = struct.pack("<BbBBIII", 1, self.signal, 0, 0, self.number, self.newest_id, self.stream)
        self.number += 1
        return header + self.pictures[self.number % len(self.pictures)]

    def send(self, **message: object) -> None:
        for connection in list(self.connections):
            connection.send(json.dumps(message))

    def tell(self, **changes: object) -> None:
        """Changes the status and sends it."""
        self.status = {**self.status, **changes}
        self.send(**self.status)

    def messages(self, kind: str) -> list[dict]:
        return [message for message in self.heard if message["type"] == kind]

    def wait_for(self, kind: str, count: int = 1, seconds: float = 30.0) -> list[dict]:
        """The messages of a kind, as soon as there are so many."""
        deadline = time.monotonic() + seconds
        while len(self.messages(kind)) < count:
            assert time.monotonic() < deadline, f"no {count} messages {kind!r}; heard {self.heard}"
            time.sleep(0.01)
        return self.messages(kind)


def encode_jpeg(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def response(code: int, body: bytes, kind: str) -> Response:
    fields = {"Content-Type": kind, "Content-Length": str(len(body)), **HEADERS}
    return Response(code, {200: "OK", 404: "Not Found"}[code], Headers(fields), body)
