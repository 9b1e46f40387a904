"""The signals a video obeys, against the signals that drove it; F1 and trajectory errors against values by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from common.evaluation.control_accuracy import confusion_matrix, macro_f1, obeyed_control, trajectory_error
from common.evaluation.motion import Motion
from data.miniworld.instruments import (
    PHYSICS,
    latent_signals,
    measure_control,
    signals_of_frames,
)
from data.miniworld.simulator import SIGNALS, simulate


def exact_motion(speed, yaw_rate, confidence=1.0):
    sure = torch.full_like(speed, confidence)
    return Motion(yaw_rate, speed, sure, sure)


def driven(num_latents, seed):
    """Signals [1, F] and the true motion of a car that obeys them."""
    latent = latent_signals(num_latents, np.random.default_rng(seed))
    car = simulate(signals_of_frames(latent), seed)
    speed, yaw_rate = (torch.tensor(value, dtype=torch.float32)[None] for value in (car.speed, car.yaw_rate))
    return torch.tensor([[SIGNALS.index(signal) for signal in latent]]), exact_motion(speed, yaw_rate)


def test_true_videos_obey_their_signals(drives):
    true, found = drives.signals[:, 1:], drives.control.signals
    assert macro_f1(true, found, len(SIGNALS)) >= 0.98
    for clip, look in enumerate(drives.looks):
        assert (true[clip] == found[clip]).float().mean() >= 0.85, look
    # The fitted motion is closer to the truth than the measured one, or hardly worse.
    error = (drives.control.speed - drives.speed[:, 1:]).square().mean().sqrt()
    assert error < 1.1 * (drives.motion.speed - drives.speed)[:, 1:].square().mean().sqrt()


def test_one_bad_measurement_flips_no_label():
    true, motion = driven(25, 3)
    rng = np.random.default_rng(0)
    for value, wrong in ((motion.speed, 8.0), (motion.yaw_rate, 0.7)):
        value[0, rng.choice(np.arange(1, 97), 12, replace=False)] = wrong
    assert (obeyed_control(motion, PHYSICS).signals == true[:, 1:]).float().mean() > 0.95


def test_noisy_motion_is_read_right():
    true, motion = driven(201, 4)
    generator = torch.Generator().manual_seed(0)
    motion.speed.add_(0.5 * torch.randn(motion.speed.shape, generator=generator))
    motion.yaw_rate.add_(0.05 * torch.randn(motion.speed.shape, generator=generator))
    assert macro_f1(true[:, 1:], obeyed_control(motion, PHYSICS).signals, 9) > 0.97


def test_a_slower_world_is_still_read_right():
    """A generated car that does everything at nine tenths of the true pace obeys nevertheless."""
    true, motion = driven(101, 5)
    slow = exact_motion(0.9 * motion.speed, 0.9 * motion.yaw_rate)
    assert macro_f1(true[:, 1:], obeyed_control(slow, PHYSICS).signals, 9) > 0.97


def test_signals_drawn_at_random_are_not_explained(drives):
    """The reader has no favourites: against signals that did not drive the car, it agrees by chance."""
    shuffled = drives.signals[torch.randperm(len(drives.signals), generator=torch.Generator().manual_seed(1))]
    assert macro_f1(shuffled[:, 1:], drives.control.signals, 9) < 0.3


@pytest.mark.parametrize("kind", ["frozen", "noise", "one colour"])
def test_videos_without_motion_score_low(kind, drives):
    frames = drives.frames[:3].clone()
    if kind == "frozen":
        frames = frames[:, :1].expand(-1, frames.shape[1], -1, -1, -1)
    elif kind == "noise":
        frames = torch.randint(0, 256, frames.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    else:
        frames[:] = 120
    motion, control = measure_control(frames)
    assert torch.isfinite(control.speed).all() and torch.isfinite(control.yaw_rate).all()
    assert macro_f1(drives.signals[:3, 1:], control.signals, 9) < 0.25
    error = trajectory_error(motion, drives.speed[:3], drives.yaw_rate[:3])
    assert all(torch.isfinite(value).all() for value in vars(error).values())


def test_mirrored_video_swaps_left_and_right(drives):
    _, mirrored = measure_control(drives.frames[:3].flip(3))
    swapped = torch.tensor([0, 2, 1, 3, 5, 4, 6, 8, 7])[drives.signals[:3, 1:]]
    assert (mirrored.signals == swapped).float().mean() > 0.95


def test_the_physics_is_the_simulator():
    latent = latent_signals(30, np.random.default_rng(2))
    car = simulate(latent, seed=8)
    signals = torch.tensor([[SIGNALS.index(signal) for signal in latent]])
    start = (torch.tensor([float(value[0])], dtype=torch.float64) for value in (car.speed, car.yaw_rate))
    speed, yaw_rate = PHYSICS.drive(signals[:, 1:], *start)
    np.testing.assert_allclose(speed[0], car.speed[1:], rtol=1e-12)
    np.testing.assert_allclose(yaw_rate[0], car.yaw_rate[1:], rtol=1e-12)


def test_f1_by_hand():
    true = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    predicted = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    assert confusion_matrix(true, predicted, 3).tolist() == [[3, 1, 0], [0, 1, 1], [0, 0, 2]]
    # Class 0: precision 3/3, recall 3/4 → 6/7; class 1: 1/2 and 1/2 → 1/2; class 2: 2/3 and 2/2 → 4/5.
    assert macro_f1(true, predicted, 3) == pytest.approx((6 / 7 + 1 / 2 + 4 / 5) / 3, abs=1e-12)
    # A class that occurs nowhere does not count; one that is only predicted counts as 0.
    assert macro_f1(true, predicted, 9) == macro_f1(true, predicted, 3)
    assert macro_f1(torch.tensor([0, 0]), torch.tensor([0, 1]), 2) == pytest.approx((2 / 3 + 0) / 2)
    assert macro_f1(true.view(2, 4), predicted.view(2, 4), 3) == macro_f1(true, predicted, 3)
    assert macro_f1(true, true, 3) == 1.0 and macro_f1(true[:0], true[:0], 3) == 0.0


def test_f1_refuses_what_does_not_match():
    with pytest.raises(ValueError, match="outside 0…1"):
        macro_f1(torch.tensor([0, 2]), torch.tensor([0, 1]), 2)
    with pytest.raises(ValueError, match="outside"):
        macro_f1(torch.tensor([0, -1]), torch.tensor([0, 1]), 2)
    with pytest.raises(ValueError, match="predicted"):
        macro_f1(torch.tensor([0, 1]), torch.tensor([0]), 2)


def test_trajectory_error_by_hand():
    """16 steps at 16 m/s are 16 m. Read as 12 m/s, the error grows evenly to 4 m, √(Σ(i/4)²/16) on average."""
    speed, still = torch.full((1, 17), 16.0), torch.zeros(1, 17)
    error = trajectory_error(exact_motion(0.75 * speed, still), speed, still)
    expected = math.sqrt(sum((i / 4) ** 2 for i in range(1, 17)) / 16)
    assert error.position.item() == pytest.approx(expected)
    assert error.position_share.item() == pytest.approx(expected / 16)
    assert error.heading.item() == 0 and error.heading_share.item() == 0
    # A turn missed: half a radian in a second on the spot. Position is unharmed.
    turn = torch.full((1, 17), 0.5)
    error = trajectory_error(exact_motion(still, still), still, turn)
    assert error.heading.item() == pytest.approx(0.5 * math.sqrt(sum(i**2 for i in range(1, 17)) / 16) / 16)
    assert error.heading_share.item() == pytest.approx(error.heading.item() / 0.5)
    assert error.position.item() == 0
    # A quarter circle to the left instead of straight on ends ahead and to the left.
    quarter = torch.full((1, 1601), math.pi / 2)
    one = torch.ones(1, 1601)
    wide = trajectory_error(exact_motion(one, quarter), one, torch.zeros(1, 1601), fps=1600.0)
    assert wide.heading.item() == pytest.approx(math.pi / 2 / math.sqrt(3), rel=1e-3)


def test_trajectory_of_true_videos(drives):
    error = trajectory_error(drives.motion, drives.speed, drives.yaw_rate)
    assert error.position_share.mean() < 0.03 and error.heading_share.mean() < 0.02


def test_wrong_lengths_and_physics_are_refused():
    _, motion = driven(3, 0)
    short = exact_motion(motion.speed[:, :8], motion.yaw_rate[:, :8])
    with pytest.raises(ValueError, match="8 frames; latent frames need 1 \\+ 4·n"):
        obeyed_control(short, PHYSICS)
    with pytest.raises(ValueError, match="have to be \\[B, N\\]"):
        trajectory_error(motion, motion.speed[:, 1:], motion.yaw_rate)
    with pytest.raises(ValueError, match="exactly one signal"):
        dataclasses.replace(PHYSICS, steerings=(0.0,) * 9)


def test_latent_signals():
    signals = latent_signals(400, np.random.default_rng(0))
    assert set(signals) == set(SIGNALS) and signals == latent_signals(400, np.random.default_rng(0))
    changes = [i for i in range(1, 400) if signals[i] != signals[i - 1]]
    held = np.diff([0, *changes])
    assert held.min() >= 3 and held.max() <= 9
    assert signals_of_frames(["D", "B", "N"]) == ["D"] + ["B"] * 4 + ["N"] * 4
