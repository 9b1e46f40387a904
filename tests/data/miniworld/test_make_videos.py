"""The files: a real codec, the index format, captions that name what is seen, and going on after an interruption."""

import json

import imageio_ffmpeg
import numpy as np
import pytest

from common.data.control_signals import CONTROL_TOKENS
from common.data.index import read_index
from common.data.video import Video
from data.miniworld import make_videos as make_videos_module
from data.miniworld.captions import BIOME_WORDS, COLORS, WEATHER_WORDS, make_caption
from data.miniworld.looks import random_look
from data.miniworld.make_videos import make_jobs, make_videos, parse_arguments
from data.miniworld.render import render
from data.miniworld.simulator import simulate


def run(folder, *more):
    return make_videos(parse_arguments(["--output_dir", str(folder), "--num_workers", "0", *map(str, more)]))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    run(folder, "--num_clips", 2, "--num_frames", 21)
    return folder


def test_file_has_the_frames_rate_and_size_asked_for(world):
    probe = imageio_ffmpeg.read_frames(str(world / "videos" / "00000.mp4"))
    header = next(probe)
    probe.close()
    assert header["fps"] == 16 and header["size"] == (96, 64) and header["codec"] == "h264"
    assert imageio_ffmpeg.count_frames_and_secs(str(world / "videos" / "00000.mp4"))[0] == 21


def test_decoded_video_is_what_was_drawn_and_truth_what_was_simulated(world):
    job = make_jobs(parse_arguments(["--output_dir", str(world), "--num_clips", "2", "--num_frames", "21"]))[1]
    car = simulate(job.signals(), job.clip_seed())
    drawn = render(car, random_look(job.clip_seed())[0]).astype(float)
    decoded = Video(job.video).read(np.arange(21), 64, 96).permute(0, 2, 3, 1).numpy().astype(float)
    psnr = 10 * np.log10(255**2 / np.square(drawn - decoded).mean())
    assert psnr > 30
    with np.load(job.truth) as truth:
        np.testing.assert_allclose(truth["speed"], car.speed, rtol=1e-6)
        np.testing.assert_allclose(truth["yaw_rate"], car.yaw_rate, rtol=1e-6, atol=1e-9)


def test_index_has_the_fields_of_the_format(world):
    entries = json.loads((world / "index.json").read_text())["list"]
    assert [entry["path"] for entry in entries] == ["videos/00000.mp4", "videos/00001.mp4"]
    for entry in entries:
        assert set(entry) == {"path", "caption", "control_signal_seq", "valid_frame_idx"}
        signals = entry["control_signal_seq"].split(",")
        assert len(signals) == 21 and set(signals) <= set(CONTROL_TOKENS) and entry["valid_frame_idx"] == 0
    assert entries[0]["control_signal_seq"] != entries[1]["control_signal_seq"]
    records = read_index(world / "index.json", world, needs_control=True)
    assert records[1].control == entries[1]["control_signal_seq"].split(",")


def test_second_run_keeps_what_is_complete_and_draws_the_same(world, tmp_path):
    first, second = (world / "videos" / f"0000{i}.mp4" for i in range(2))
    bytes_before, time_before = second.read_bytes(), first.stat().st_mtime_ns
    (world / "truth" / "00001.npz").unlink()  # as if killed before the clip was complete
    second.write_bytes(b"half")
    run(world, "--num_clips", 2, "--num_frames", 21)
    assert first.stat().st_mtime_ns == time_before
    assert second.read_bytes() == bytes_before
    assert not list(world.rglob(".*partial*"))


def test_other_settings_draw_anew_and_other_index_names_stand_beside(tmp_path):
    run(tmp_path, "--num_clips", 1, "--num_frames", 5)
    before = (tmp_path / "videos" / "00000.mp4").read_bytes()
    run(tmp_path, "--num_clips", 1, "--num_frames", 5, "--seed", 1, "--index_name", "heldout.json")
    assert (tmp_path / "videos" / "00000.mp4").read_bytes() == before
    assert (tmp_path / "videos_heldout" / "00000.mp4").read_bytes() != before
    run(tmp_path, "--num_clips", 1, "--num_frames", 9)
    assert len(Video(tmp_path / "videos" / "00000.mp4")) == 9


def test_an_interruption_leaves_no_index_of_clips_that_were_drawn_over(tmp_path, monkeypatch):
    run(tmp_path, "--num_clips", 2, "--num_frames", 5)
    draw = make_videos_module.make_clip

    def interrupted(job):
        if job.video.name == "00001.mp4":
            raise KeyboardInterrupt
        draw(job)

    monkeypatch.setattr(make_videos_module, "make_clip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--num_clips", 2, "--num_frames", 5, "--seed", 1)
    assert not (tmp_path / "index.json").exists()
    monkeypatch.undo()
    run(tmp_path, "--num_clips", 2, "--num_frames", 5, "--seed", 1)
    assert len(read_index(tmp_path / "index.json", tmp_path, needs_control=True)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height", "60"], "multiples of 16"),
        (["--num_clips", "0"], "at least 1"),
        (["--index_name", "x/y.json"], "without a folder"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *arguments)


def test_captions_have_20_to_60_words_and_name_everything():
    names = {
        "desert": "desert", "grass": "grass", "snow": "snow", "city": "city", "forest": "forest", "coast": "coast",
        "clear": "clear", "clouds": "clouds", "rain": "rain", "fog": "fog", "sunset": "sunset",
    }  # fmt: skip
    captions = set()
    for biome in BIOME_WORDS:
        for weather in WEATHER_WORDS:
            for color in COLORS:
                for seed in range(4):
                    caption = make_caption(biome, weather, color, np.random.default_rng(seed))
                    assert 20 <= len(caption.split()) <= 60, caption
                    words = caption.lower()
                    assert names[biome] in words and names[weather] in words and color in words.split(), caption
                    others = [c for c in COLORS if c != color and f"{c} car" in words]
                    assert not others
                    captions.add(caption)
    assert len(captions) > 0.8 * 4 * len(BIOME_WORDS) * len(WEATHER_WORDS) * len(COLORS)
