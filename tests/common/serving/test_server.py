"""A visit to a real server: what a client is told, what its commands do, and that a seed gives the same world again."""

import asyncio
import io
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from common.cogvideox.streaming import VideoStream
from common.data.video_writer import write_video


def test_welcome_status_stats_and_frames(play, tiny_world_model):
    async def scenario(player, server):
        welcome = await player.receive()
        assert welcome["type"] == "welcome" and welcome["version"] == 1 and welcome["model"] == "stage4"
        assert welcome["signals"] == ["D", "DL", "DR", "B", "BL", "BR", "N", "NL", "NR"]
        assert (welcome["height"], welcome["width"], welcome["fps"]) == (32, 48, 64.0)
        assert welcome["clips"] == [] and welcome["prompts"] and welcome["limits"]["message_bytes"] == 4096
        status = await player.shows(you_drive=True, state="running", progress=1.0)
        assert status["driver"] == welcome["client"] and status["waiting"] == 0 and status["seed"] == 7
        assert status["prompt"] == "a red car" and status["recording"] is False
        header, jpeg = await player.frame()
        image = Image.open(io.BytesIO(jpeg))
        assert image.size == (48, 32) and image.layer == [("R", 1, 1), ("G", 1, 1), ("B", 1, 1)] or image.mode == "RGB"
        assert header.signal == 6 and header.signal_id == 0  # neutral until a key is pressed
        await player.send(type="ping", time=12.25)
        assert (await player.until("pong"))["time"] == 12.25
        stats = await player.until("stats")
        names = {"type", "fps", "chunk_ms", "serve_ms", "key_to_read_ms", "dropped", "memory_mib", "queue"}
        assert set(stats) == names and stats["chunk_ms"] > 0 and stats["memory_mib"] > 50
        numbers = [header.number for header, _ in player.frames]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))

    play(scenario)


def test_a_signal_is_read_by_the_next_shift_and_held(play, tiny_world_model):
    async def scenario(player, server):
        await player.frame()
        began = time.perf_counter()
        await player.signal("DL")
        header, _ = await player.frame(lambda header: header.signal_id == 1)
        assert header.signal == 1
        for _ in range(12):
            header, _ = await player.frame()
            assert (header.signal, header.signal_id) == (1, 1)
        await player.signal("B")
        assert (await player.frame(lambda header: header.signal_id == 2))[0].signal == 3
        stats = await player.until("stats")
        assert 0 < stats["key_to_read_ms"] <= 1000 * (time.perf_counter() - began)

    play(scenario)


async def drive(player, seed, signals=("D", "DL", "N"), prompt=None):
    """The first frames of a new stream of this seed; the command changes while it is paused, so its frame is known."""
    await player.signal(signals[0])
    message = {"seed": seed} | ({"prompt": prompt} if prompt else {})
    stream = await player.new_stream(**message)
    while [header.stream for header, _ in player.frames].count(stream) < 9:
        await player.frame()
    return [jpeg for header, jpeg in player.frames if header.stream == stream][:9]


def test_seed_and_prompt_fix_a_stream_and_frames_begin_at_zero(play):
    async def scenario(player, server):
        first = await drive(player, 5)
        again = await drive(player, 5)
        other_seed = await drive(player, 6)
        other_prompt = await drive(player, 5, prompt="a blue car in deep snow")
        assert first == again and first[-1] != other_seed[-1] and first[-1] != other_prompt[-1]
        stream = player.frames[-1][0].stream
        headers = [header for header, _ in player.frames if header.stream == stream]
        assert [header.number for header in headers[:9]] == list(range(9))
        assert [header.is_first for header in headers[:3]] == [True, False, False]
        await player.shows(seed=5, state="running", prompt="a blue car in deep snow")
        await player.send(type="reset")  # no seed: one is drawn
        while player.status["seed"] == 5:
            await player.receive()

    play(scenario)


def test_pause_holds_the_world_and_goes_on_without_a_gap(play):
    async def scenario(player, server):
        await player.frame()
        await player.send(type="pause", paused=True)
        await player.shows(state="paused")
        shifts = server.room.engine._history.shift
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                while True:
                    await player.frame()
        assert server.room.engine._history.shift <= shifts + 2
        await player.send(type="pause", paused=False)
        await player.shows(state="running")
        await player.frame()
        numbers = [header.number for header, _ in player.frames]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))

    play(scenario)


def test_the_prompt_changes_in_mid_stream_without_a_stall(play, tiny_world_model, monkeypatch):
    """Even when encoding takes long: it happens aside."""
    encode, begun, may_end = tiny_world_model.encode, threading.Event(), threading.Event()

    def slow_encode(prompt):
        if prompt == "snow and fog":
            begun.set()
            may_end.wait(60)
        return encode(prompt)

    monkeypatch.setattr(tiny_world_model, "encode", slow_encode)

    async def scenario(player, server):
        await player.frame()
        await player.send(type="prompt", prompt="snow and fog")
        await asyncio.to_thread(begun.wait, 60)
        shifts = server.room.engine._history.shift
        while server.room.engine._history.shift < shifts + 4:
            await player.frame()
        assert player.status["prompt"] == "a red car"
        may_end.set()
        await player.shows(prompt="snow and fog")
        while not server.room.engine._history.log(10**6, 0, 0).prompts:
            await player.frame()
        stream = {header.stream for header, _ in player.frames}
        assert len(stream) == 1
        log = server.room.engine._history.log(10**6, 0, 0)
        assert [prompt for _, prompt in log.prompts] == ["snow and fog"] and log.prompts[0][0] > 0

    play(scenario)


def test_an_exception_in_the_world_is_told_in_one_line_and_a_reset_begins_anew(play, monkeypatch):
    advance, is_broken = VideoStream.advance, []

    def fail_sometimes(stream):
        if is_broken:
            raise RuntimeError("the device\nis on fire")
        return advance(stream)

    monkeypatch.setattr(VideoStream, "advance", fail_sometimes)

    async def scenario(player, server):
        await player.frame()
        is_broken.append(True)
        status = await player.shows(state="error")
        assert status["message"] == "the device is on fire"
        await player.send(type="ping", time=1)
        await player.until("pong")
        await player.send(type="reset")
        await player.shows(state="loading")
        await player.shows(state="error")  # still broken
        is_broken.clear()
        await player.send(type="reset", seed=3)
        await player.shows(state="running", seed=3, message="")
        await player.frame(lambda header: header.is_first)

    play(scenario)


def test_a_model_that_cannot_be_loaded_is_an_error_and_a_reset_tries_again(play, tiny_world_model):
    tries = []

    def load(progress):
        tries.append(None)
        progress(0.3, "reading")
        if len(tries) == 1:
            raise OSError("no such disk")
        return tiny_world_model

    async def scenario(player, server):
        await player.shows(state="error", message="no such disk")
        await player.send(type="prompt", prompt="a green car")  # nothing runs yet that could be told
        await player.shows(state="error", message="no such disk", prompt="a green car")
        await player.send(type="reset")
        await player.shows(state="running", prompt="a green car")
        await player.frame()
        assert len(tries) == 2

    play(scenario, load=load)


def test_clients_see_the_progress_of_loading_and_may_ask_for_a_prompt_meanwhile(play, tiny_world_model):
    def load(progress):
        time.sleep(0.2)
        progress(0.4, "reading the weights")
        time.sleep(0.5)
        return tiny_world_model

    async def scenario(player, server):
        assert (await player.receive())["type"] == "welcome"
        await player.shows(state="loading", progress=0.4, message="reading the weights")
        await player.send(type="prompt", prompt="a green car")
        await player.shows(state="running", prompt="a green car")

    play(scenario, load=load)


def test_a_stream_starts_from_a_clip(play, tiny_world_model, tiny_world, monkeypatch):
    clip = tiny_world / "videos" / "00000.mp4"
    info = replace(tiny_world_model.info, clips={"meadow": clip}, fps=16.0, height=32, width=64)
    monkeypatch.setattr(tiny_world_model, "info", info)

    async def scenario(player, server):
        assert (await player.receive())["clips"] == ["meadow"]
        stream = await player.new_stream(start="meadow", seed=1)
        _, jpeg = next(pair for pair in player.frames if pair[0].stream == stream)
        assert np.asarray(Image.open(io.BytesIO(jpeg))).shape == (32, 64, 3)
        assert "reset.start: unknown" in await player.refused(type="reset", start="../../etc/passwd")
        assert "reset.start: unknown" in await player.refused(type="reset", start=str(clip))

    play(scenario, info=info)


def test_after_a_clip_that_is_too_short_a_reset_begins_from_text(play, tiny_world_model, tmp_path, monkeypatch):
    clip = tmp_path / "short.mp4"
    write_video(clip, np.zeros((5, 32, 48, 3), np.uint8), 16)
    info = replace(tiny_world_model.info, clips={"short": clip}, fps=16.0)
    monkeypatch.setattr(tiny_world_model, "info", info)

    async def scenario(player, server):
        await player.frame()
        await player.send(type="reset", start="short")
        assert "short.mp4" in (await player.shows(state="error"))["message"]
        await player.send(type="reset")
        await player.shows(state="running")

    play(scenario, info=info)


def test_the_world_rests_when_nobody_looks(play, serve):
    server = serve()

    async def visit(player, server):
        await player.frame()

    play(visit, server)
    time.sleep(0.3)
    shifts = server.room.engine._history.shift
    time.sleep(0.4)
    assert server.room.engine._history.shift == shifts
    play(visit, server)
    assert server.room.engine._history.shift >= shifts
