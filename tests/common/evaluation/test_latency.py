"""Response latency: known delays are found, true videos answer at once, and no answer is counted as none."""

import math

import numpy as np
import pytest
import torch

from common.evaluation.latency import LEAST_NOISE, response_latency
from common.evaluation.motion import Motion, estimate_motion
from data.miniworld.instruments import CAMERA, PHYSICS
from data.miniworld.looks import Look
from data.miniworld.render import render
from data.miniworld.simulator import SIGNALS, simulate

HOLD = 40


def long_holds(num_clips, num_changes, seed=0):
    """Signals int64 [B, N], each held HOLD frames."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(num_clips):
        row = [int(rng.integers(9))]
        while len(row) <= num_changes:
            row += [int(value) for value in rng.integers(9, size=1) if value != row[-1]]
        rows.append(np.repeat(row, HOLD))
    return torch.tensor(np.stack(rows))


def delayed(signals, delay):
    """What a video does that answers `delay` frames late."""
    return torch.cat([signals[:, :1].expand(-1, delay), signals], dim=1)[:, : signals.shape[1]]


def motion_under(signals, noise=0.0, seed=0):
    speed, yaw_rate = PHYSICS.drive(signals, torch.zeros(len(signals)), torch.zeros(len(signals)))
    generator = torch.Generator().manual_seed(seed)
    speed = speed + 10 * noise * torch.randn(speed.shape, generator=generator)
    yaw_rate = yaw_rate + noise * torch.randn(speed.shape, generator=generator)
    return Motion(yaw_rate, speed, torch.ones_like(speed), torch.ones_like(speed))


@pytest.mark.parametrize("delay", [0, 1, 5, 14, 28])
def test_known_delays_are_found_exactly_without_noise(delay):
    signals = long_holds(4, 6)
    latency = response_latency(motion_under(delayed(signals, delay)), signals, PHYSICS)
    assert latency.num_answered == 4 * 6 and latency.num_unanswered == 0
    assert (latency.frames == delay).all()
    assert latency.median == latency.percentile_95 == delay and latency.noise == LEAST_NOISE


@pytest.mark.parametrize("delay", [0, 5])
def test_noise_costs_a_frame_or_two_and_no_false_alarms(delay):
    signals = long_holds(20, 6)
    latency = response_latency(motion_under(delayed(signals, delay), noise=0.03), signals, PHYSICS)
    assert latency.noise == pytest.approx((0.3, 0.03), rel=0.4)
    assert delay <= latency.median <= delay + 1 and latency.percentile_95 <= delay + 2
    assert latency.frames.min() >= delay and latency.num_unanswered == 0


def test_half_of_the_changes_ignored():
    signals = long_holds(2, 6)
    obeyed = torch.stack([delayed(signals[:1], 5)[0], signals[1, :1].expand(signals.shape[1])])
    latency = response_latency(motion_under(obeyed), signals, PHYSICS)
    assert (latency.num_answered, latency.num_unanswered) == (6, 6)
    assert latency.median == 5 and latency.frames[6:].isnan().all()


def test_a_move_in_another_direction_is_no_answer():
    """The key says left, the car goes right."""
    signals = torch.tensor([[SIGNALS.index("D")] * 60 + [SIGNALS.index("DL")] * 40])
    wrong = torch.where(signals == SIGNALS.index("DL"), SIGNALS.index("DR"), signals)
    assert response_latency(motion_under(wrong), signals, PHYSICS).num_unanswered == 1


def test_wandering_video_answers_nothing():
    signals = long_holds(10, 6)
    wander = motion_under(long_holds(10, 6, seed=9).roll(17, dims=1), noise=0.2)
    latency = response_latency(wander, signals, PHYSICS)
    assert latency.num_unanswered > 0.5 * len(latency.frames)


def test_quantiles_by_hand():
    """Delays 0 and 10, one clip each: the median is between, the 95th percentile near the greater."""
    signals = long_holds(2, 5)
    obeyed = torch.cat([signals[:1], delayed(signals[1:], 10)])
    latency = response_latency(motion_under(obeyed), signals, PHYSICS)
    assert sorted(latency.frames.tolist()) == [0] * 5 + [10] * 5
    assert latency.median == 5 and latency.percentile_95 == 10


def test_nothing_to_judge_gives_nan_and_no_crash():
    signals = torch.zeros(2, 30, dtype=torch.long)
    latency = response_latency(motion_under(signals), signals, PHYSICS)
    assert (latency.num_answered, latency.num_unanswered) == (0, 0)
    assert math.isnan(latency.median) and math.isnan(latency.percentile_95)
    # A change too near either end is left out.
    signals[:, -5:] = 1
    signals[:, :3] = 4
    assert not len(response_latency(motion_under(signals), signals, PHYSICS).frames)


def test_pixels_of_a_delayed_video():
    """From the picture itself: the answer is found within a frame of where it is."""
    signals = long_holds(3, 3, seed=2)
    for delay in (0, 5):
        frames = []
        for clip, row in enumerate(delayed(signals, delay)):
            car = simulate([SIGNALS[index] for index in row], seed=500 + clip)
            frames.append(
                render(car, Look(("grass", "city", "snow")[clip], ("fog", "rain", "clear")[clip], "red", clip))
            )
        motion = estimate_motion(torch.from_numpy(np.stack(frames)), CAMERA, gaps=(1,))
        latency = response_latency(motion, signals, PHYSICS)
        assert latency.num_unanswered == 0 and (latency.frames - delay).abs().max() <= 1


def test_wrong_input_is_refused():
    signals = long_holds(1, 2)
    with pytest.raises(ValueError, match="the signals are"):
        response_latency(motion_under(signals), signals[:, 1:], PHYSICS)
    with pytest.raises(ValueError, match="patience is 1"):
        response_latency(motion_under(signals), signals, PHYSICS, patience=1)
