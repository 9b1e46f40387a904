"""Drives a served world by a script: the same protocol as the page, without a screen.

    python -m common.serving.client --url ws://127.0.0.1:8000 --control "D*32,DL*16,D*16" --output drive.mp4

Starts a new stream, holds each signal for as many frames as the control string says, and writes what arrived as an mp4
and, beside it, a JSON of timings: how evenly frames came, and how long from a command to the first frame that obeys
it. --replay takes the control log of a recording instead.
"""

import argparse
import asyncio
import io
import json
import logging
import queue
import threading
import time
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import numpy as np

from common.config.command_line import ArgumentParser, positive_number, refuse_unwritable, whole_number
from common.config.errors import UserError, one_line, run_cli
from common.data.control_signals import parse_control_string, read_control_file
from common.data.video_writer import VideoWriter
from common.serving.protocol import VERSION, ProtocolError, to_json, unpack_frame

logger = logging.getLogger(__name__)
PING_SECONDS = 0.5


def socket_address(url: str, token: str | None) -> str:
    """The WebSocket of a server given in any of the usual ways: ws://…/ws, http://…, with a token or without."""
    parts = urlsplit(url if "//" in url else f"//{url}")
    scheme = {"": "ws", "http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
    if scheme not in ("ws", "wss") or not parts.netloc:
        raise UserError(f"--url {url}: write for example ws://127.0.0.1:8000")
    query = dict(parse_qsl(parts.query)) | ({"token": token} if token else {})
    return urlunsplit((scheme, parts.netloc, "/ws" if parts.path in ("", "/") else parts.path, urlencode(query), ""))


def percentiles(values: list[float]) -> dict[str, float] | None:
    """Median, p90, p99 and maximum, each one of `values` (the smallest that is no less than so many of them)."""
    if not values:
        return None
    found = np.percentile(values, [50, 90, 99, 100], method="inverted_cdf")
    return {name: round(float(value), 2) for name, value in zip(("p50", "p90", "p99", "max"), found, strict=True)}


class VideoSink:
    """Decodes JPEGs and writes them in a thread, so that receiving, which is being timed, never waits for it."""

    def __init__(self, path: Path, fps: float):
        self._path, self._fps, self._error = path, fps, None
        self._jpegs: queue.Queue[bytes | None] = queue.Queue()
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def add(self, jpeg: bytes) -> None:
        self._jpegs.put(jpeg)

    def close(self) -> None:
        self._jpegs.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _write(self) -> None:
        from PIL import Image

        try:
            with VideoWriter(self._path, self._fps) as video:
                while (jpeg := self._jpegs.get()) is not None:
                    video.write(np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))[None])
        except Exception as error:
            self._error = error


class Driver:
    """A drive over an open connection: `await drive()`, then `figures`.

    Args:
        socket: a websockets connection.
        control: one signal a raw frame; None watches a replay.
        command: the message that starts the stream, of type reset or replay.
        frames: numbers of the stream's frames that are written; the drive is over with the last or one after it.
    """

    def __init__(self, socket, control: list[str] | None, command: dict, frames: range, output: Path):
        self.socket, self.control, self.command, self.frames = socket, control, command, frames
        self.output = output
        self.welcome: dict = {}
        self.status: dict = {}
        self.stats: list[dict] = []
        self.arrivals: list[tuple[int, float]] = []  # number of a frame, when it came
        self.key_to_frame: list[float] = []
        self.round_trips: list[float] = []
        self._asked: dict[int, float] = {}  # signal id → when it was sent, until a frame has read it
        self._signal: str | None = None
        self._last_id = 0
        self._is_over = False
        self._stream: int | None = None
        self._sink: VideoSink | None = None

    async def send(self, **message: object) -> None:
        await self.socket.send(to_json(message))

    async def drive(self, patience: float) -> None:
        """Takes the wheel, starts the stream, and drives to the end. A `UserError` if that cannot be."""
        try:
            await asyncio.wait_for(self._take_the_wheel(), patience)
        except TimeoutError:
            who = "the model is still loading" if self.status.get("state") == "loading" else "somebody else drives"
            raise UserError(f"after {patience:g} s {who}; --patience waits longer") from None
        pings = asyncio.create_task(self._ping())
        try:
            if self.control:
                await self._hold(self.control[0])
            self.started = time.perf_counter()
            await self.send(**self.command)
            while not self._is_over:
                await self._receive()
                if self.status.get("state") == "error":
                    raise UserError(f"the world has stopped: {self.status['message']}")
                if not self.status["you_drive"]:
                    raise UserError("the wheel was given to somebody else")
            if not self.arrivals:
                raise UserError("none of the frames came through: the server drops those that a client is too slow for")
        finally:
            pings.cancel()
            if self._sink:
                self._sink.close()

    async def _take_the_wheel(self) -> None:
        """Until this client drives, and a frame (or an error) shows which stream is the old one."""
        has_asked = False
        while not self.status.get("you_drive") or (self._stream is None and self.status["state"] != "error"):
            await self._receive(is_driving=False)
            if self.status and not self.status["you_drive"] and not has_asked:
                has_asked = True
                await self.send(type="wheel", take=True)
        self.status["state"] = "loading"

    async def _ping(self) -> None:
        while True:
            await self.send(type="ping", time=1000 * time.perf_counter())
            await asyncio.sleep(PING_SECONDS)

    async def _hold(self, signal: str) -> None:
        if signal != self._signal:
            self._signal = signal
            self._last_id += 1
            self._asked[self._last_id] = time.perf_counter()
            await self.send(type="signal", signal=signal, id=self._last_id, time=1000 * time.perf_counter())

    async def _receive(self, is_driving: bool = True) -> None:
        message = await self.socket.recv()
        now = time.perf_counter()
        if isinstance(message, bytes):
            await self._frame(*unpack_frame(message), now, is_driving)
            return
        message = json.loads(message)
        kind = message.get("type")
        if kind == "welcome":
            self._greet(message)
        elif kind == "status":
            self.status = message
        elif kind == "stats" and self.arrivals:
            self.stats.append(message)
        elif kind == "pong":
            self.round_trips.append(1000 * now - message["time"])
        elif kind == "error":
            raise UserError(f"the server says: {message['message']}")

    def _greet(self, welcome: dict) -> None:
        self.welcome = welcome
        if welcome["version"] != VERSION:
            raise ProtocolError(
                f"the server speaks version {welcome['version']} of the protocol, this client {VERSION}"
            )
        unknown = sorted(set(self.control or ()) - set(welcome["signals"]))
        if unknown:
            raise UserError(f"the model has no signal {unknown[0]}; it has {', '.join(welcome['signals']) or 'none'}")

    async def _frame(self, header, jpeg: bytes, now: float, is_driving: bool) -> None:
        if not is_driving:
            self._stream = header.stream
            return
        if self._stream is not None and header.stream <= self._stream:
            return  # still of the old stream
        self._is_over = header.number >= self.frames[-1]  # the server may have dropped the last one
        if header.number not in self.frames:
            return
        if self._sink is None:
            self._sink = VideoSink(self.output, self.welcome["fps"])
        self._sink.add(jpeg)
        self.arrivals.append((header.number, now))
        for signal_id in [known for known in self._asked if known <= header.signal_id]:
            self.key_to_frame.append(1000 * (now - self._asked.pop(signal_id)))
        if self.control and header.number + 1 in self.frames:
            await self._hold(self.control[header.number + 1])

    def figures(self) -> dict:
        """Timings in milliseconds."""
        times = [moment for _, moment in self.arrivals]
        intervals = [1000 * (after - before) for before, after in zip(times, times[1:], strict=False)]
        seconds = times[-1] - times[0]
        server = {
            name: percentiles([stats[name] for stats in self.stats if stats[name]])
            for name in ("fps", "chunk_ms", "serve_ms", "key_to_read_ms", "memory_mib", "queue")
        }
        return {
            "model": self.welcome["model"],
            **{name: self.welcome[name] for name in ("width", "height")},
            **{name: self.status[name] for name in ("seed", "prompt")},
            "frames": len(times),
            "missing_frames": len(self.frames) - len(times),
            "seconds": round(seconds, 3),
            "fps": round((len(times) - 1) / seconds, 3) if seconds else 0.0,
            "start_ms": round(1000 * (times[0] - self.started), 1),
            "late_frames": sum(interval > 1500 / self.welcome["fps"] for interval in intervals),
            "frame_interval_ms": percentiles(intervals),
            "key_to_frame_ms": percentiles(self.key_to_frame[1:]),  # the first waits for the start
            "round_trip_ms": percentiles(self.round_trips),
            "server": server,
        }


async def run(args: argparse.Namespace) -> dict:
    """Connects, drives, → figures."""
    from websockets.asyncio.client import connect
    from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI

    control, command, frames = what_to_drive(args)
    address = socket_address(args.url, args.token)
    try:
        async with connect(address, compression=None, max_size=2**24, proxy=None, close_timeout=1) as socket:
            driver = Driver(socket, control, command, frames, args.output)
            await driver.drive(args.patience)
            return driver.figures()
    except ConnectionClosed as error:
        reason = error.rcvd.reason if error.rcvd else ""
        raise UserError(f"the server closed the connection{f': {reason}' if reason else ''}") from error
    except (OSError, InvalidURI, InvalidHandshake) as error:
        raise UserError(f"--url {args.url}: cannot connect ({one_line(error)[:150]})") from error


def what_to_drive(args: argparse.Namespace) -> tuple[list[str] | None, dict, range]:
    """(one signal a frame, the message that starts the stream, which of its frames to write).

    A replayed stream begins where the recorded one began, which may be long before the recording.
    """
    if args.replay:
        try:
            log = json.loads(args.replay.read_text(encoding="utf-8"))
            first, count = int(log["first_frame"]), int(log["frames"])
            if first < 0 or count < 1:
                raise ValueError(f"it has {count} frames from {first} on")
            return None, {"type": "replay", "log": log}, range(first, first + count)
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = "Record on the page downloads one; the client's own file beside its mp4 is none"
            raise UserError(
                f"--replay {args.replay}: is no control log of a recording ({one_line(error)}); {what}"
            ) from error
    given = args.control_file
    control = read_control_file(given) if given else parse_control_string(args.control, where="--control")
    command = {"type": "reset", "prompt": args.prompt, "seed": args.seed, "start": args.start}
    return control, {name: value for name, value in command.items() if value is not None}, range(len(control))


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--url", default="ws://127.0.0.1:8000", help="of the server")
    parser.add_argument("--token", help="if the server asks for one")
    drive = parser.add_mutually_exclusive_group(required=True)
    drive.add_argument("--control", help='control string, signal*raw frames: "D*32,DL*16,D*16"')
    drive.add_argument("--control_file", type=Path, help="text file with a control string; # starts a comment")
    drive.add_argument("--replay", type=Path, help="control log (JSON) of a recording")
    parser.add_argument("--prompt", help="by default the one that the server shows")
    parser.add_argument("--seed", type=whole_number(0), help="by default drawn by the server")
    parser.add_argument("--start", help='"text", or the name of one of the server\'s clips')
    parser.add_argument("--patience", type=positive_number, default=120.0, help="seconds to wait for model and wheel")
    parser.add_argument(
        "--output", type=Path, default=Path("drive.mp4"), help="mp4 file to write; timings go beside it"
    )
    args = parser.parse_args()
    if args.output.suffix != ".mp4" or args.output.is_dir():
        raise UserError(f"--output {args.output}: give a file whose name ends in .mp4")
    refuse_unwritable(args.output.parent, "--output")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    figures = asyncio.run(run(args))
    args.output.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    latency = (figures["key_to_frame_ms"] or {}).get("p50", "–")
    told = "%s: %d frames, %.2f a second; %s ms from key to frame"
    logger.info(told, args.output, figures["frames"], figures["fps"], latency)


if __name__ == "__main__":
    run_cli(main)
