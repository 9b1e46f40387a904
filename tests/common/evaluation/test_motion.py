"""The motion estimator against the simulator's truth, and on pictures that hold no motion."""

import numpy as np
import pytest
import torch

from common.evaluation.motion import Motion, estimate_motion
from data.miniworld.instruments import CAMERA
from data.miniworld.looks import BIOMES, WEATHERS, Look
from data.miniworld.render import render
from data.miniworld.simulator import State, simulate


def root_mean_square(values):
    return float(values.square().mean().sqrt())


def test_measures_speed_and_yaw_rate_in_every_biome_and_weather(drives):
    speed_error = (drives.motion.speed - drives.speed)[:, 1:]
    yaw_error = (drives.motion.yaw_rate - drives.yaw_rate)[:, 1:]
    assert 1 - speed_error.square().sum() / (drives.speed - drives.speed.mean()).square().sum() > 0.985
    assert 1 - yaw_error.square().sum() / (drives.yaw_rate - drives.yaw_rate.mean()).square().sum() > 0.985
    for index, look in enumerate(drives.looks):
        assert root_mean_square(speed_error[index]) < 1.5, look
        assert root_mean_square(yaw_error[index]) < 0.06, look
    assert {look.biome for look in drives.looks} == set(BIOMES)
    assert {look.weather for look in drives.looks} == set(WEATHERS)


@pytest.mark.parametrize("speed", [-4.5, -1.0, 0.0, 3.0, 8.0, 11.5])
@pytest.mark.parametrize("place", ["road", "open ground"])
def test_steady_speeds_are_read_without_bias_or_alias(speed, place):
    """Kerbs repeat every 2.75 m and lines every 5.5 m; neither may be mistaken for another speed."""
    heading, x = (0.0, 1.5) if place == "road" else (0.7, 19.0)
    car = simulate(["N"] * 9, start=State(x, 12.0, heading, speed))
    frame = np.arange(9) * speed / 16  # the same speed throughout
    car = type(car)(**{**vars(car), "x": x - np.sin(heading) * frame, "y": 12.0 + np.cos(heading) * frame})
    frames = torch.from_numpy(render(car, Look("desert", "fog", "blue", 9)))[None]
    measured = estimate_motion(frames, CAMERA).speed[0]
    assert (measured - speed).abs().max() < 0.35


def test_turning_on_the_spot_is_not_driving():
    """The camera swings about the car, so the ground moves although the speed is zero."""
    car = simulate(["NL"] * 24, start=State(10.0, 10.0, 0.4))
    motion = estimate_motion(torch.from_numpy(render(car, Look("grass", "clear", "white", 1)))[None], CAMERA)
    assert motion.speed.abs().max() < 0.3
    assert (motion.yaw_rate[0, 12:] - 0.36).abs().max() < 0.01


def test_mirrored_video_swaps_left_and_right(drives):
    few = drives.frames[:3]
    mirrored = estimate_motion(few.flip(3), CAMERA)
    torch.testing.assert_close(mirrored.yaw_rate, -drives.motion.yaw_rate[:3], atol=0.03, rtol=0)
    torch.testing.assert_close(mirrored.speed, drives.motion.speed[:3], atol=0.6, rtol=0)


def test_backwards_video_drives_backwards(drives):
    """Reversed in time, entry i of the one is entry N − i of the other, negated."""
    backwards = estimate_motion(drives.frames[:2].flip(1), CAMERA)
    torch.testing.assert_close(backwards.yaw_rate[:, 1:], -drives.motion.yaw_rate[:2, 1:].flip(1), atol=0.03, rtol=0)


def test_long_videos_are_measured_in_pieces(drives, monkeypatch):
    monkeypatch.setattr("common.evaluation.motion.CHUNK", 17)
    pieces = estimate_motion(drives.frames[:1], CAMERA)
    for name in ("yaw_rate", "speed", "yaw_confidence", "speed_confidence"):
        torch.testing.assert_close(getattr(pieces, name), getattr(drives.motion, name)[:1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("size", [(32, 48), (96, 144)])
def test_other_sizes(size):
    car = simulate(["D"] * 8 + ["DL"] * 12, start=State(1.5, 0.0, 0.0, 3.0))
    motion = estimate_motion(torch.from_numpy(render(car, Look("coast", "clear", "red", 2), *size))[None], CAMERA)
    assert np.corrcoef(motion.speed[0, 1:], car.speed[1:])[0, 1] > 0.97
    assert np.corrcoef(motion.yaw_rate[0, 1:], car.yaw_rate[1:])[0, 1] > 0.97


def clip_without_motion(kind):
    if kind == "noise":
        return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 13, 64, 96, 3), dtype=np.uint8))
    if kind == "one colour":
        return torch.full((1, 13, 64, 96, 3), 90, dtype=torch.uint8)
    frame = torch.from_numpy(render(simulate(["D"]), Look("forest", "rain", "red", 0)))
    return frame[None].expand(1, 13, -1, -1, -1).contiguous()


@pytest.mark.parametrize("kind", ["noise", "one colour", "frozen"])
def test_videos_without_motion_give_numbers_and_say_so(kind):
    motion = estimate_motion(clip_without_motion(kind), CAMERA)
    assert all(torch.isfinite(value).all() for value in vars(motion).values())
    if kind == "noise":
        assert motion.yaw_confidence.mean() < 0.3 and motion.speed_confidence.mean() < 0.3
    else:
        assert motion.yaw_rate.abs().max() < 0.01 and motion.speed.abs().max() < 0.1
    if kind == "one colour":
        assert motion.yaw_confidence.max() == 0 and motion.speed_confidence.max() == 0


def test_confidence_of_the_first_frame_is_zero(drives):
    assert isinstance(drives.motion, Motion)
    assert (drives.motion.speed_confidence[:, 0] == 0).all() and (drives.motion.yaw_confidence[:, 0] == 0).all()
    assert drives.motion.speed_confidence[:, 1:].mean() > 0.5 and drives.motion.yaw_confidence[:, 1:].mean() > 0.5


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="uint8"):
        estimate_motion(torch.zeros(1, 5, 64, 96, 3), CAMERA)
    with pytest.raises(ValueError, match="at least two"):
        estimate_motion(torch.zeros(1, 1, 64, 96, 3, dtype=torch.uint8), CAMERA)
