"""Recordings: an mp4 and a control log, kept on the server for a while, and replayed to the same frames."""

import asyncio
import hashlib
import io
import json
import shutil
import urllib.error
import urllib.request
from dataclasses import replace

import decord
import numpy as np
import pytest
from PIL import Image

from common.serving import recording as recording_module
from common.serving.recording import RecordingStore
from tests.common.serving.live_server import PATIENCE


def fetch(server, path):
    with urllib.request.urlopen(f"http://{server.address}{path}", timeout=PATIENCE) as answer:
        return answer.read(), answer.headers


async def recorded(player, frames, **message):
    """Starts a stream with `message`, records it from its first frame on, drives, and → what the server made of it.

    With a reset it drives about and changes the prompt; a replay is only watched.
    """
    await player.frame()
    earlier = list(player.told)
    await player.send(**message)
    await player.send(type="record", on=True)
    await player.shows(recording=True)
    first = await player.frame(lambda header: header.is_first)
    plan = {8: "DL", 20: "B", 26: "NR", 27: "D"} if message["type"] == "reset" else {}
    while (header := (await player.frame())[0]).number < frames:
        if header.number in plan:
            await player.signal(plan[header.number])
        if header.number == 14 and plan:
            await player.send(type="prompt", prompt="snow and fog")
    await player.send(type="record", on=False)
    told = [message for message in player.told if message["type"] == "recording"]  # it may have ended by itself
    message = told[-1] if told and told[-1] not in earlier else await player.until("recording")
    await player.shows(recording=False)
    return first[0].stream, message


def hashes(player, stream):
    """Hash of each JPEG of a stream by its frame's number: equal if and only if all pixels are."""
    return {
        header.number: hashlib.sha256(jpeg).hexdigest() for header, jpeg in player.frames if header.stream == stream
    }


def test_a_recording_is_a_video_with_a_log_whose_replay_gives_the_same_frames(play, tmp_path):
    async def scenario(player, server):
        await player.signal("DR")
        stream, message = await recorded(player, 48, type="reset", seed=11, prompt="a blue car at night")
        video, headers = await asyncio.to_thread(fetch, server, message["video"])
        assert "attachment" in headers["content-disposition"] and headers["content-type"] == "video/mp4"
        (tmp_path / "drive.mp4").write_bytes(video)
        log = json.loads((await asyncio.to_thread(fetch, server, message["log"]))[0])
        assert log["seed"] == 11 and log["prompt"] == "a blue car at night" and log["start"] == "text"
        assert log["model"] == "stage4" and log["frames"] == message["frames"] >= 48 and log["first_frame"] == 0
        assert [signal for _, signal in log["shifts"]] == ["DR", "DL", "B", "NR", "D"] or len(log["shifts"]) >= 3
        assert log["shifts"][0] == [0, "DR"] and log["prompts"][0][1] == "snow and fog" and log["complete"]

        await player.signal("BL")  # what is held now is not what the replay reads
        again, second = await recorded(player, 48, type="replay", log=log)
        first_hashes, second_hashes = hashes(player, stream), hashes(player, again)
        both = sorted(set(first_hashes) & set(second_hashes) & set(range(log["frames"])))
        assert len(both) >= 48 and len({first_hashes[n] for n in both}) > 40
        assert [first_hashes[n] for n in both] == [second_hashes[n] for n in both]
        relog = json.loads((await asyncio.to_thread(fetch, server, second["log"]))[0])
        until = min(log["end"], relog["end"])
        for name in ("shifts", "prompts"):
            assert [c for c in relog[name] if c[0] < until] == [c for c in log[name] if c[0] < until]
        return [jpeg for header, jpeg in player.frames if header.stream == stream]

    jpegs = play(scenario)
    reader = decord.VideoReader(str(tmp_path / "drive.mp4"), width=64, height=64)
    assert len(reader) >= 48 and reader.get_avg_fps() == pytest.approx(64)
    assert np.asarray(Image.open(io.BytesIO(jpegs[0]))).shape == (32, 48, 3)


def test_after_its_end_a_replay_goes_on_live_and_says_so(play):
    log = {
        "model": "stage4", "seed": 2, "prompt": "x", "start": "text", "fps": 64, "shifts": [[0, "B"]], "prompts": [],
        "end": 8, "settings": "",
    }  # fmt: skip

    async def scenario(player, server):
        log["settings"] = server.room.info.settings
        await player.signal("D")
        old = (await player.frame())[0].stream
        await player.send(type="replay", log=log)
        await player.shows(state="replaying", seed=2)
        assert "replay says which prompts" in await player.refused(type="prompt", prompt="y")
        await player.shows(state="running", seed=2)
        await player.frame(lambda header: header.stream > old and header.signal == 0)
        signals = [header.signal for header, _ in player.frames if header.stream > old and header.number < 33]
        assert set(signals) == {3} and len(signals) == 33
        for changes, words in (
            ({"model": "another"}, "made with the model another, here runs stage4"),
            ({"settings": ""}, "cannot be replayed: size is 48x32 (in the log: not given), "),
            ({"settings": log["settings"].replace("device=cpu", "device=cuda")}, ": device is cpu (in the log: cuda)"),
            ({"complete": False}, "not complete"),
            ({"start": "clip"}, "a clip that this server does not have"),
            ({"shifts": [[0, "UP"]]}, "a signal that the model does not have"),
        ):
            assert words in await player.refused(type="replay", log=log | changes)

    play(scenario)


def test_a_replay_from_a_clip_needs_that_clip_at_that_rate(play, tiny_world_model, tiny_world, tmp_path, monkeypatch):
    clip = tmp_path / "meadow.mp4"
    shutil.copy(tiny_world / "videos" / "00000.mp4", clip)
    info = replace(tiny_world_model.info, clips={"meadow": clip}, fps=16.0)
    monkeypatch.setattr(tiny_world_model, "info", info)

    async def scenario(player, server):
        def log():
            return json.loads(server.room.engine._history.log(2, 0, 5).model_dump_json())

        await player.frame()
        from_text = log()
        await player.new_stream(start="meadow", seed=1)
        from_clip = log()
        await player.new_stream(type="replay", log=from_clip)
        assert log()["settings"] == from_clip["settings"] != from_text["settings"]
        old = from_clip | {"settings": info.settings}
        assert "fps is 16.0 (in the log: not given), clip is" in await player.refused(type="replay", log=old)
        server.room.info = replace(info, fps=8.0)
        assert ": fps is 8.0 (in the log: 16.0)" in await player.refused(type="replay", log=from_clip)
        await player.new_stream(type="replay", log=from_text)  # a prompt gives the same frames at any rate
        server.room.info = info
        shutil.copy(tiny_world / "videos" / "00001.mp4", clip)
        assert "replayed: the clip is another" in await player.refused(type="replay", log=from_clip)
        clip.unlink()
        assert "replayed: the clip is another" in await player.refused(type="replay", log=from_clip)
        await player.frame()

    play(scenario, info=info)


def test_a_recording_ends_at_its_greatest_length(play, monkeypatch):
    monkeypatch.setattr("common.serving.room.RECORDING_SECONDS", 0.25)  # 16 frames

    async def scenario(player, server):
        _, message = await recorded(player, 20, type="reset", seed=1)
        assert message["frames"] == 16

    play(scenario)


@pytest.mark.parametrize("end", [{"type": "reset", "seed": 1}, {"type": "wheel", "take": False}])
def test_a_recording_ends_with_its_stream_and_with_its_driver(play, end):
    async def scenario(player, server):
        await player.send(type="record", on=True)
        await player.shows(recording=True)
        assert "a recording is running" in await player.refused(type="record", on=True)
        for _ in range(20):  # more than may have waited from before
            await player.frame()
        async with server.player() as second:
            await second.send(type="wheel", take=True)
            await second.shows(waiting=1)
            await player.send(**end)
            assert (await player.until("recording"))["frames"] > 0
            await player.shows(recording=False)

    play(scenario)


def test_only_what_the_server_made_can_be_fetched(serve):
    server = serve()
    for path in ("/recordings/..%2f..%2fetc%2fpasswd", "/recordings/x.mp4", "/recordings/", "/recordings/%00", "/ws"):
        with pytest.raises(urllib.error.HTTPError) as error:
            fetch(server, path)
        assert error.value.code == 404 and b"Traceback" not in error.value.read()


def test_a_store_keeps_the_newest_and_leaves_nothing_behind():
    store = RecordingStore(keep=2)
    names = [store.new_name() for _ in range(3)]
    for name in names:
        for suffix in (".mp4", ".json"):
            store.path(name + suffix).write_bytes(b"x")
        store.publish(name)
    directory = store.path("x").parent
    assert [store.find(f"{name}.mp4") is not None for name in names] == [False, True, True]
    assert len(list(directory.iterdir())) == 4 and len(names[0]) == 32
    assert store.find("../x") is None and store.find(names[1]) is None
    store.close()
    assert not directory.exists() and store.find(f"{names[2]}.mp4") is None


def test_a_recording_that_cannot_be_written_is_told_and_the_world_goes_on(play, monkeypatch):
    class FullDisk:
        def __init__(self, *_, **__):
            raise OSError("no space left")

    monkeypatch.setattr(recording_module, "VideoWriter", FullDisk)

    async def scenario(player, server):
        await player.frame()
        assert "no space left" in await player.refused(type="record", on=True)
        await player.shows(recording=False)
        await player.frame()

    play(scenario)
