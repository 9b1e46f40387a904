"""An animated GIF of a drive, read back with Pillow."""

import json
import sys

import numpy as np
import pytest
from PIL import Image, ImageSequence

from common.config.errors import UserError
from common.data.video_writer import write_video
from common.tools import gif


@pytest.fixture
def drive(tmp_path):
    """Two seconds at 16 fps that grow brighter; straight on for one of them, then to the left."""
    shades = np.linspace(20, 230, 33).astype(np.uint8)
    write_video(tmp_path / "drive.mp4", np.broadcast_to(shades[:, None, None, None], (33, 64, 96, 3)), 16)
    control = ",".join(["D"] * 16 + ["DL"] * 17)
    (tmp_path / "drive.json").write_text(json.dumps({"control": control}))
    return tmp_path / "drive.mp4"


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["gif", *map(str, words)])
    gif.main()


def frames_of(path):
    with Image.open(path) as image:
        return [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(image)]


def lit(frame):
    """Which of the four keys are drawn in the colour of a held one."""
    held = (frame[..., 0] > 220) & (frame[..., 1] > 170) & (frame[..., 2] < 110)
    side = 96 // 12
    corners = [(4 + c * (side + 2), 96 - 4 - (2 - r) * (side + 2), letter) for c, r, letter, _ in gif.KEYS]
    return "".join(letter for left, top, letter in corners if held[top : top + side, left : left + side].any())


def test_shows_the_video_in_its_own_time_and_the_keys_held(drive, tmp_path, monkeypatch, capsys):
    run(monkeypatch, drive, "--output", tmp_path / "drive.gif", "--seconds", 2, "--fps", 8, "--height", 96)
    frames = frames_of(tmp_path / "drive.gif")
    assert len(frames) == 16 and frames[0].shape == (96, 144, 3) and "16 frames" in capsys.readouterr().out
    shades = np.linspace(20, 230, 33)[::2]
    assert all(abs(np.median(frame) - shade) < 6 for frame, shade in zip(frames, shades, strict=False))
    assert [lit(frame) for frame in frames] == ["D"] * 8 + ["DL"] * 8

    run(monkeypatch, drive, "--output", tmp_path / "late.gif", "--start", 1, "--seconds", 9, "--height", 96)
    late = frames_of(tmp_path / "late.gif")
    assert len(late) == 9 and abs(np.median(late[0]) - shades[8]) < 6  # to the video's end


def test_a_video_without_signals_has_no_keys(drive, tmp_path, monkeypatch):
    drive.with_suffix(".json").unlink()
    run(monkeypatch, drive, "--output", tmp_path / "plain.gif", "--height", 96)
    assert all(np.ptp(frame) < 12 for frame in frames_of(tmp_path / "plain.gif"))


@pytest.mark.parametrize(
    ("words", "told"),
    [(("--output", "x.gif", "--start", "5"), "ends at second 2.0"), (("--output", "x.mp4"), "ends in .gif")],
)
def test_says_what_is_wrong(drive, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told):
        run(monkeypatch, drive, *words)
    assert not (tmp_path / "x.gif").exists()
