"""Response latency: known delays are found, true videos answer at once, and no answer is counted as none."""

import math

import numpy as np
import pytest
import torch

from common.evaluation.latency import LEAST_NOISE, response_latency
from common.evaluation.motion import Motion, estimate_motion
from common.evaluation.summary import latency_summary
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
    assert len(latency.frames) == 4 * 6 and (latency.frames == delay).all() and latency.noise == LEAST_NOISE


@pytest.mark.parametrize("delay", [0, 5])
def test_noise_costs_a_frame_or_two_and_no_false_alarms(delay):
    signals = long_holds(20, 6)
    latency = response_latency(motion_under(delayed(signals, delay), noise=0.03), signals, PHYSICS)
    assert latency.noise == pytest.approx((0.3, 0.03), rel=0.4)
    assert len(latency.frames) == 20 * 6 and not latency.frames.isnan().any() and latency.frames.min() >= delay
    assert latency.frames.quantile(0.5) <= delay + 1 and latency.frames.quantile(0.95) <= delay + 2


def test_half_of_the_changes_ignored():
    signals = long_holds(2, 6)
    obeyed = torch.stack([delayed(signals[:1], 5)[0], signals[1, :1].expand(signals.shape[1])])
    latency = response_latency(motion_under(obeyed), signals, PHYSICS)
    assert latency.frames[:6].tolist() == [5] * 6 and latency.frames[6:].isnan().all() and len(latency.frames) == 12


def test_a_move_in_another_direction_is_no_answer():
    """The key says left, the car goes right."""
    signals = torch.tensor([[SIGNALS.index("D")] * 60 + [SIGNALS.index("DL")] * 40])
    wrong = torch.where(signals == SIGNALS.index("DL"), SIGNALS.index("DR"), signals)
    assert response_latency(motion_under(wrong), signals, PHYSICS).frames.isnan().tolist() == [True]


def test_wandering_video_answers_nothing():
    signals = long_holds(10, 6)
    wander = motion_under(long_holds(10, 6, seed=9).roll(17, dims=1), noise=0.2)
    latency = response_latency(wander, signals, PHYSICS)
    assert latency.frames.isnan().double().mean() > 0.5


def test_delays_of_two_clips_and_what_the_report_says_of_them():
    """Delays 0 and 10, one clip each: the median is between, the 95th percentile the greater; one more went unheard."""
    signals = long_holds(2, 5)
    obeyed = torch.cat([signals[:1], delayed(signals[1:], 10)])
    latency = response_latency(motion_under(obeyed), signals, PHYSICS)
    assert sorted(latency.frames.tolist()) == [0] * 5 + [10] * 5
    summary = latency_summary([{"frames": [*latency.frames.tolist(), None]}], len(SIGNALS))
    assert summary["median"][0] == 5 and summary["percentile_95"] == 10
    assert (summary["num_changes"], summary["num_unanswered"]) == (11, 1)


def test_nothing_to_judge_gives_nan_and_no_crash():
    signals = torch.zeros(2, 30, dtype=torch.long)
    frames = response_latency(motion_under(signals), signals, PHYSICS).frames
    summary = latency_summary([{"frames": frames.tolist()}], len(SIGNALS))
    assert summary["num_changes"] == 0 and summary["median"][0] is None and math.isnan(summary["percentile_95"])
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
        assert len(latency.frames) == 3 * 3 and ((latency.frames - delay).abs() <= 1).all()  # NaN would not be


def test_wrong_input_is_refused():
    signals = long_holds(1, 2)
    with pytest.raises(ValueError, match="the signals are"):
        response_latency(motion_under(signals), signals[:, 1:], PHYSICS)
    with pytest.raises(ValueError, match="patience is 1"):
        response_latency(motion_under(signals), signals, PHYSICS, patience=1)
