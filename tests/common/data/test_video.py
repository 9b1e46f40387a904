"""Windows of real video files: the right frames by time at every rate, and every kind of damage named."""

import numpy as np
import pytest
import torch
from barcode import ffmpeg, frame_numbers, frame_picture, write_video

from common.data.video import (
    ClipTooShort,
    UnreadableVideo,
    Video,
    last_start,
    read_clip,
    resize_and_crop,
    source_frames,
)

RATES = ["16", "24000/1001", "25", "30000/1001", "30", "60"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """rate → file of 150 frames."""
    folder = tmp_path_factory.mktemp("rates")
    return {rate: write_video(folder / f"{rate.replace('/', '_')}.mp4", 150, rate) for rate in RATES}


@pytest.mark.parametrize("rate", RATES)
def test_frames_are_those_nearest_in_time(videos, rate):
    num_frames, fps = 33, 16
    source_fps = eval(rate)  # "30000/1001" is a division
    video = Video(videos[rate])
    last = video.last_start(0, num_frames, fps)
    for start in (0, 7, last):
        shown = frame_numbers(video.read(source_frames(video.timestamps, start, num_frames, fps), 64, 96))
        exact = start + np.arange(num_frames) * source_fps / fps  # in source frames
        assert np.abs(np.array(shown) - exact).max() <= 0.5 + 1e-6, "not the nearest frame"
        assert shown == sorted(set(shown)), "a frame is shown twice, or time runs backwards"
        assert max(shown) <= 149


@pytest.mark.parametrize("rate", RATES)
def test_the_last_start_is_the_last_and_never_past_the_end(videos, rate):
    video = Video(videos[rate])
    source_fps = eval(rate)
    last = video.last_start(0, 33, 16)
    assert last + 32 * source_fps / 16 <= 149 + 1e-6 < last + 1 + 32 * source_fps / 16


def test_a_clip_of_exactly_the_length_is_long_enough(tmp_path):
    video = Video(write_video(tmp_path / "v.mp4", 33, 16))
    assert video.last_start(0, 33, 16) == 0
    assert frame_numbers(read_clip(video.path, 33, 64, 96, 16)) == list(range(33))
    with pytest.raises(ClipTooShort, match=r"v.mp4: 2.00 s .* 2.25 s are needed for 37 frames at 16 fps"):
        video.last_start(0, 37, 16)
    with pytest.raises(ClipTooShort, match="first usable frame 1 on"):
        video.last_start(1, 33, 16)
    with pytest.raises(ClipTooShort, match="first usable frame is 40, but it has only 33 frames"):
        video.last_start(40, 5, 16)


def test_length_is_counted_in_time_and_not_in_frames(videos):
    """150 frames are plenty at 16 fps; at 60 they last 2.5 s, which is 40 frames of the model's 16 fps."""
    assert Video(videos["16"]).last_start(0, 145, 16) == 5
    assert Video(videos["60"]).last_start(0, 37, 16) > 0
    with pytest.raises(ClipTooShort):
        Video(videos["60"]).last_start(0, 41, 16)


def test_slow_sources_are_refused_and_not_stretched(videos):
    with pytest.raises(ClipTooShort, match="runs at 16 frames per second, fewer than the 24"):
        Video(videos["16"]).last_start(0, 33, 24)


def test_variable_frame_rate_goes_by_the_stamps(tmp_path):
    """Two seconds at 30 fps, then two at 15 (every other frame left out): time, not number, decides."""
    even = write_video(tmp_path / "even.mp4", 120, 30)
    uneven = tmp_path / "uneven.mp4"
    chosen = "select='lt(n,60)+not(mod(n,2))'"
    ffmpeg("-i", even, "-vf", chosen, "-fps_mode", "vfr", "-c:v", "libx264", "-crf", "10", uneven)
    video = Video(uneven)
    assert len(video) == 90
    shown = frame_numbers(video.read(source_frames(video.timestamps, 0, 37, 10), 64, 96))
    assert np.abs(np.array(shown) - np.arange(37) * 3).max() <= 1.0


def test_stamps_of_29_97_fps_for_a_long_clip_do_not_run_ahead():
    stamps = np.arange(10_000) * 1001 / 30000
    start = last_start(stamps, 0, 1001, 30)
    frames = source_frames(stamps, start, 1001, 30)
    assert frames[-1] <= 9999 and frames[-1] - frames[0] == round(1000 / 30 * 30000 / 1001)


def test_audio_beside_the_pictures_changes_nothing(videos, tmp_path):
    both = tmp_path / "both.mp4"
    ffmpeg("-i", videos["30"], "-f", "lavfi", "-i", "sine=d=5", "-c:v", "copy", both)
    assert torch.equal(read_clip(both, 17, 64, 96, 16), read_clip(videos["30"], 17, 64, 96, 16))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory, videos):
    """kind of damage → file."""
    folder = tmp_path_factory.mktemp("damaged")
    files = {kind: folder / f"{kind}.mp4" for kind in ("missing", "empty", "text", "headless", "cut", "audio")}
    files["empty"].touch()
    files["text"].write_text("not a video\n" * 100)
    whole = videos["16"].read_bytes()
    files["headless"].write_bytes(whole[: len(whole) // 2])  # the table of contents was at the end
    fast = write_video(folder / "fast.mp4", 400, 16, options=["-movflags", "+faststart", "-g", "50"]).read_bytes()
    files["cut"].write_bytes(fast[: len(fast) * 6 // 10])  # the table of contents promises 400 frames
    ffmpeg("-f", "lavfi", "-i", "sine=d=2", files["audio"])
    return files


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "there is no such video file"),
        ("empty", "the file is empty"),
        ("text", "no readable video"),
        ("headless", "truncated"),
        ("cut", "truncated"),
        ("audio", "no pictures"),
    ],
)
def test_damage_is_named_with_the_file(damaged, kind, message):
    with pytest.raises(UnreadableVideo) as error:
        read_clip(damaged[kind], 33, 64, 96, 16, from_end=True)
    assert str(damaged[kind]) in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_pictures_too_narrow_for_the_decoder_are_refused_and_not_garbled(tmp_path):
    with pytest.raises(UnreadableVideo, match="narrower than 64 pixels"):
        read_clip(write_video(tmp_path / "narrow.mp4", 9, 16, size=(32, 48)), 9, 32, 48, 16)
    odd = write_video(tmp_path / "odd.mp4", 9, 16, size=(70, 102))
    assert frame_numbers(read_clip(odd, 9, 64, 96, 16)) == list(range(9))


def test_from_end_reads_the_last_frames(videos):
    assert frame_numbers(read_clip(videos["16"], 9, 64, 96, 16, from_end=True)) == list(range(141, 150))


@pytest.mark.parametrize("size", [(64, 96), (48, 96), (64, 64), (32, 32), (128, 192)])
def test_resize_covers_and_crops_the_centre(size):
    picture = torch.from_numpy(frame_picture(0b1111100000).copy()).permute(2, 0, 1)[None]
    out = resize_and_crop(picture, *size)
    assert out.shape == (1, 3, *size) and out.dtype == torch.uint8
    # Black left half, white right half: the edge stays in the middle.
    columns = out[0, 0].float().mean(dim=0)
    edge = int((columns > 127).nonzero()[0])
    assert abs(edge - size[1] / 2) <= 1


def test_the_right_size_is_left_alone(videos):
    video = Video(videos["16"])
    raw = video._reader.get_batch([3, 4]).asnumpy()
    assert np.array_equal(video.read(np.array([3, 4]), 64, 96).permute(0, 2, 3, 1).numpy(), raw)
