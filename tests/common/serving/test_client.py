"""The headless client: a scripted drive against a real server, its video and its timings."""

import asyncio
import io
import json
import threading

import decord
import numpy as np
import pytest
from PIL import Image

from common.config.errors import UserError
from common.serving import client
from common.serving.client import Driver, percentiles, socket_address
from common.serving.protocol import VERSION, FrameHeader, pack_header, to_json


@pytest.fixture
def run_client(monkeypatch, tmp_path):
    """Runs the program; → (video, timings)."""

    def run(server, *words, output="drive.mp4"):
        path = tmp_path / output
        arguments = ["client", "--url", f"ws://{server.address}", "--output", str(path), *map(str, words)]
        monkeypatch.setattr("sys.argv", arguments)
        client.main()
        return decord.VideoReader(str(path), width=64, height=64), json.loads(path.with_suffix(".json").read_text())

    return run


def test_a_scripted_drive_gives_a_video_and_timings(serve, run_client):
    server = serve()
    control = "D*24,DL*16,N*12,NR*20"
    video, figures = run_client(server, "--control", control, "--seed", 5, "--prompt", "a blue car")
    assert len(video) == 72 == figures["frames"] and video.get_avg_fps() == pytest.approx(64)
    assert figures["seed"] == 5 and figures["prompt"] == "a blue car" and figures["missing_frames"] == 0
    assert figures["key_to_frame_ms"]["p50"] > 0 and figures["round_trip_ms"]["p50"] > 0
    assert figures["frame_interval_ms"]["p50"] <= figures["frame_interval_ms"]["p99"]
    log = server.room.engine._history.log(10**6, 0, 0)
    assert [signal for _, signal in log.shifts][:4] == ["D", "DL", "N", "NR"]


def test_a_replay_and_a_control_file(serve, run_client, tmp_path):
    server = serve()
    drive = tmp_path / "drive.txt"
    drive.write_text("D*8 # straight\nB*8")
    video, figures = run_client(server, "--control_file", drive, output="file.mp4")
    assert len(video) == 16
    log = server.room.engine._history.log(5, 0, 17).model_dump_json()
    (tmp_path / "log.json").write_text(log)
    video, replayed = run_client(server, "--replay", tmp_path / "log.json", output="again.mp4")
    assert len(video) == 17 and replayed["seed"] == figures["seed"]
    # A recording that began with frame 6: the stream begins anew, the video with that frame.
    (tmp_path / "log.json").write_text(server.room.engine._history.log(5, 6, 11).model_dump_json())
    part, replayed = run_client(server, "--replay", tmp_path / "log.json", output="part.mp4")
    assert len(part) == 11 == replayed["frames"] and replayed["missing_frames"] == 0
    difference = [np.abs(part[0].asnumpy().astype(int) - video[n].asnumpy()).mean() for n in (0, 6)]
    assert difference[1] < difference[0]


class LossySocket:
    """A server that has dropped frames: in the new stream those of these numbers alone come through."""

    def __init__(self, numbers):
        jpeg = io.BytesIO()
        Image.new("RGB", (64, 64)).save(jpeg, "JPEG")
        welcome = {"type": "welcome", "version": VERSION, "signals": ["D"], "fps": 16, "model": "m"}
        status = {"type": "status", "you_drive": True, "state": "running", "seed": 1, "prompt": "p"}
        frames = [(1, 70), *((2, number) for number in numbers)]
        headers = [FrameHeader(0, number == 0, number, 0, stream) for stream, number in frames]
        frames = [pack_header(header) + jpeg.getvalue() for header in headers]
        self.messages = [to_json(welcome | {"width": 64, "height": 64}), to_json(status), *frames]

    async def send(self, message):
        pass

    async def recv(self):
        assert self.messages, "it waits for a frame that never comes"
        return self.messages.pop(0)


@pytest.mark.parametrize(
    "numbers, missing", [([0, 1, 2, 3], 0), ([0, 2, 3], 1), ([1, 2, 9], 2), ([0, 1, 4, 5], 2), ([0, 3], 2)]
)
def test_a_drive_ends_when_its_last_frame_is_lost(tmp_path, numbers, missing):
    driver = Driver(LossySocket(numbers), ["D"] * 4, {"type": "reset"}, range(4), tmp_path / "drive.mp4")
    asyncio.run(driver.drive(patience=60))
    assert driver.figures()["missing_frames"] == missing and driver.figures()["frames"] == 4 - missing


def test_of_a_replay_what_comes_before_the_recording_is_not_missed(tmp_path):
    driver = Driver(LossySocket([3, 4, 6, 8]), None, {"type": "replay"}, range(4, 8), tmp_path / "drive.mp4")
    asyncio.run(driver.drive(patience=60))
    assert driver.figures()["frames"] == 2 == driver.figures()["missing_frames"]


def test_a_drive_without_any_frame_says_so(tmp_path):
    driver = Driver(LossySocket([4]), ["D"] * 4, {"type": "reset"}, range(4), tmp_path / "drive.mp4")
    with pytest.raises(UserError, match="none of the frames came through"):
        asyncio.run(driver.drive(patience=60))


def test_it_waits_for_the_wheel_and_for_a_model_that_loads(serve, run_client, refused, tmp_path, tiny_world_model):
    is_open = threading.Event()
    server = serve(load=lambda progress: is_open.wait(60) and tiny_world_model)
    words = ["--url", server.address, "--output", tmp_path / "x.mp4", "--control", "D*8", "--patience", 0.5]
    assert "after 0.5 s the model is still loading" in refused(client.main, *words)
    is_open.set()
    assert len(run_client(server, "--control", "D*8")[0]) == 8


def test_what_goes_wrong_is_one_line(serve, refused, tmp_path):
    server = serve(token="correct horse battery")
    words = ["--url", f"http://{server.address}/", "--output", tmp_path / "x.mp4"]
    drive = [*words, "--control", "D*8"]
    assert "the server closed the connection: a token is needed" in refused(client.main, *drive)
    drive += ["--token", "correct horse battery"]
    assert "reset.start: unknown" in refused(client.main, *drive, "--start", "beach")
    assert "unknown control token 'UP'" in refused(client.main, *words, "--control", "UP*8")
    assert "is no control log" in refused(client.main, *words, "--replay", tmp_path / "none.json")
    (tmp_path / "empty.json").write_text('{"first_frame": 3, "frames": 0}')
    assert "is no control log" in refused(client.main, *words, "--replay", tmp_path / "empty.json")
    assert "write for example ws://" in refused(client.main, *drive, "--url", "ftp://x")
    assert "cannot connect" in refused(client.main, *drive, "--url", "ws://127.0.0.1:1")
    assert "one of the arguments" in refused(client.main, *words)
    assert "ends in .mp4" in refused(client.main, *drive, "--output", tmp_path / "x.avi")
    assert not list(tmp_path.glob("*.mp4"))


def test_addresses_and_percentiles():
    for url in ("ws://a:1", "http://a:1", "a:1", "ws://a:1/ws", "a:1/"):
        assert socket_address(url, None) == "ws://a:1/ws"
    assert socket_address("https://a/?token=x%20y", None) == "wss://a/ws?token=x+y"
    assert socket_address("a:1", "x y") == "ws://a:1/ws?token=x+y"
    assert percentiles([]) is None
    assert percentiles([float(n) for n in range(1, 101)]) == {"p50": 50, "p90": 90, "p99": 99, "max": 100}
