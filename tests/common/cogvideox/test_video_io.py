"""Videos written chunk by chunk, read back by another library's reader (decord)."""

import numpy as np
import pytest
import torch  # noqa: F401  (before decord: their C++ runtimes clash the other way round)
from decord import VideoReader

from common.cogvideox.video_io import VideoWriter, write_video
from common.config.errors import UserError


def chunks(count, size=(32, 48)):
    """Chunks of 4 frames whose brightness counts up."""
    for i in range(count):
        yield np.stack([np.full((*size, 3), 8 * (4 * i + k), np.uint8) for k in range(4)])


def brightness(path):
    return [float(VideoReader(str(path))[i].asnumpy().mean()) for i in range(len(VideoReader(str(path))))]


def test_frames_arrive_in_order_at_the_rate_and_size_given(tmp_path):
    path = tmp_path / "folder" / "video.mp4"
    assert write_video(path, chunks(5, (48, 80)), fps=16) == 20
    reader = VideoReader(str(path))
    assert reader[0].shape == (48, 80, 3) and abs(reader.get_avg_fps() - 16) < 1e-3
    assert np.allclose(brightness(path), 8 * np.arange(20), atol=4)


def test_an_interrupted_video_plays_up_to_where_it_came(tmp_path):
    path = tmp_path / "video.mp4"

    def broken():
        yield from chunks(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(path, broken())
    assert len(brightness(path)) == 12


def test_frames_are_taken_one_chunk_at_a_time(tmp_path):
    written = []
    with VideoWriter(tmp_path / "video.mp4") as writer:
        for chunk in chunks(3):
            writer.write(chunk)
            written.append(writer.num_frames)
    assert written == [4, 8, 12]


def test_wrong_names_and_frames_are_refused(tmp_path):
    with pytest.raises(UserError, match="clip.gif"):
        VideoWriter(tmp_path / "clip.gif")
    with VideoWriter(tmp_path / "video.mp4") as writer, pytest.raises(ValueError, match="float64"):
        writer.write(np.zeros((1, 32, 48, 3)))
