"""Videos written chunk by chunk, read back by other software: decord, and ffmpeg for a file that was cut off."""

import subprocess
import sys

import imageio_ffmpeg
import numpy as np
import pytest
import torch  # noqa: F401  (before decord: their C++ runtimes clash the other way round)
from decord import VideoReader

from common.config.errors import UserError
from common.data.video_writer import VideoWriter, write_video


def chunks(count: int, size: tuple[int, int] = (32, 64)):
    """Chunks of 4 frames whose brightness counts up."""
    for i in range(count):
        yield np.stack([np.full((*size, 3), 8 * (4 * i + k), np.uint8) for k in range(4)])


def brightness(path) -> list[float]:
    reader = VideoReader(str(path))
    return [float(reader[i].asnumpy().mean()) for i in range(len(reader))]


def test_frames_arrive_in_order_at_the_rate_and_size_given(tmp_path):
    grown, whole = tmp_path / "folder" / "grown.mp4", tmp_path / "whole.mp4"
    with VideoWriter(grown, fps=16) as video:
        for number, chunk in enumerate(chunks(5, (48, 80)), 1):
            video.write(chunk)
            assert video.num_frames == 4 * number
    write_video(whole, np.concatenate(list(chunks(5, (48, 80)))), fps=16)
    for path in (grown, whole):
        reader = VideoReader(str(path))
        assert reader[0].shape == (48, 80, 3) and abs(reader.get_avg_fps() - 16) < 1e-3
        assert np.allclose(brightness(path), 8 * np.arange(20), atol=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "whole.mp4"]


def test_an_interrupted_video_plays_up_to_where_it_came(tmp_path):
    path = tmp_path / "video.mp4"
    with pytest.raises(KeyboardInterrupt), VideoWriter(path, fps=16) as video:
        for chunk in chunks(3):
            video.write(chunk)
        raise KeyboardInterrupt
    assert len(brightness(path)) == 12


def test_a_killed_process_leaves_a_video_that_plays(tmp_path):
    """kill -9 gives nobody the chance to finish the file."""
    path = tmp_path / "video.mp4"
    code = (
        "import numpy as np, os, signal, time; from common.data.video_writer import VideoWriter\n"
        f"video = VideoWriter({str(path)!r}, fps=16, gop=4)\n"
        "for i in range(100): video.write(np.full((4, 32, 64, 3), i, np.uint8))\n"
        "time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    probe = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "quiet", "-stats", "-i", path, "-f", "null", "-"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert int(probe.stderr.rsplit("frame=", 1)[1].split()[0]) > 300


def test_the_same_frames_give_the_same_bytes(tmp_path):
    frames = np.concatenate(list(chunks(3)))
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, frames, fps=16)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_wrong_names_places_and_frames_are_refused(tmp_path):
    with pytest.raises(UserError, match="clip.gif"):
        VideoWriter(tmp_path / "clip.gif", fps=16)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        VideoWriter(tmp_path / "file" / "clip.mp4", fps=16)
    with VideoWriter(tmp_path / "video.mp4", fps=16) as video, pytest.raises(ValueError, match="float64"):
        video.write(np.zeros((1, 32, 64, 3)))
    assert not (tmp_path / "video.mp4").exists()
