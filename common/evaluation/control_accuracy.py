"""Which signal a video obeys, and how well that agrees with the signals it was given.

The car is inert, so one step's motion does not name its signal. The signals are those under which a car of the known
physics would have moved as was measured: a maximum-likelihood search over all sequences (Viterbi), one signal per
latent frame. It knows nothing of the signals that were given, and every sequence is equally likely beforehand.

Letters: `B` clips, `N` raw frames, `F` latent frames (N = 4(F − 1) + 1), `J` = F − 1, `k` raw frames in a latent one,
`P` choices, `X` states, `E` deviations from the physics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.evaluation.motion import Motion
from common.evaluation.physics import Physics

# Standard deviations: of one measurement, and of what a latent frame's motion may deviate from the physics. The second
# lets a generated car that is, say, a little slower than the true one still be read.
SPEED_NOISE, SPEED_DEVIATION = 0.7, 0.7  # m/s
YAW_NOISE, YAW_DEVIATION = 0.04, 0.04  # rad/s
SPEED_GRID = (-7.0, 14.0, 0.35)  # lowest, highest, step: m/s
YAW_GRID = (-0.8, 0.8, 0.025)  # rad/s
MOST_STEPS = 5  # of the grid: the largest deviation in a latent frame
OUTLIER = 2.0  # standard deviations; measurements further off are mistaken, and all cost the same


@dataclass(frozen=True)
class ObeyedControl:
    """What a video obeys: `signals` int64 [B, F − 1], for latent frames 1…F − 1 (frame 0 is one picture, no motion),
    and the most likely motion, `speed` and `yaw_rate` [B, N − 1], for frames 1…N − 1."""

    signals: Tensor
    speed: Tensor
    yaw_rate: Tensor


def obeyed_control(motion: Motion, physics: Physics, frames_per_latent: int = 4) -> ObeyedControl:
    """The signals that explain a measured motion best. Latent frame j ≥ 1 covers raw frames 4j − 3 … 4j.

    Raises:
        ValueError: unless the motion covers 4(F − 1) + 1 frames, F ≥ 2.
    """
    batch, num_frames = motion.speed.shape
    if num_frames < 1 + frames_per_latent or (num_frames - 1) % frames_per_latent:
        raise ValueError(f"{num_frames} frames; latent frames need 1 + {frames_per_latent}·n of them, n ≥ 1")
    speed, yaw_rate, speed_weight, yaw_weight = (
        value[:, 1:].reshape(batch, -1, frames_per_latent)
        for value in (motion.speed, motion.yaw_rate, motion.speed_confidence, motion.yaw_confidence)
    )  # [B, J, k]
    targets, steerings = sorted(set(physics.target_speeds)), sorted(set(physics.steerings))

    after = 1 - physics.speed_decay ** torch.arange(1, frames_per_latent + 1, device=speed.device)  # [k]
    forced = torch.tensor(targets, device=speed.device)[:, None] * after  # [P, k]
    forced = forced.expand(*speed.shape[:2], -1, -1)
    pedals, fitted_speed = _most_likely(
        speed, speed_weight, forced, physics.speed_decay, SPEED_GRID, SPEED_NOISE, SPEED_DEVIATION
    )
    # The yaw rate's target moves with the speed of the frame before, so its forced part is summed up frame by frame.
    before = torch.cat([fitted_speed[:, :1], fitted_speed[:, :-1]], dim=1).reshape(speed.shape)
    target = physics.lock(before)[:, :, None] * torch.tensor(steerings, device=speed.device)[:, None]  # [B, J, P, k]
    forced, total = [], torch.zeros_like(target[..., 0])
    for frame in range(frames_per_latent):
        total = target[..., frame] + physics.yaw_decay * (total - target[..., frame])
        forced.append(total)
    wheels, fitted_yaw = _most_likely(
        yaw_rate, yaw_weight, torch.stack(forced, dim=-1), physics.yaw_decay, YAW_GRID, YAW_NOISE, YAW_DEVIATION
    )
    table = torch.empty(len(targets), len(steerings), dtype=torch.long)
    for index, (target_speed, steering) in enumerate(zip(physics.target_speeds, physics.steerings, strict=True)):
        table[targets.index(target_speed), steerings.index(steering)] = index
    return ObeyedControl(table.to(pedals.device)[pedals, wheels], fitted_speed, fitted_yaw)


def _most_likely(
    measured: Tensor,
    weight: Tensor,
    forced: Tensor,
    decay: float,
    grid: tuple[float, float, float],
    noise: float,
    deviation: float,
) -> tuple[Tensor, Tensor]:
    """The likeliest choice per latent frame, int64 [B, J], and the path of the quantity, [B, J·k].

    In a latent frame the quantity goes from x to decay^i · x + forced[choice, i] after i frames, plus a deviation that
    grows evenly to at most MOST_STEPS of the grid, at a quadratic cost. `measured` and `weight` are [B, J, k], `forced`
    [B, J, P, k]. Solved from the last latent frame to the first: value[x] is the least cost of all that follows x.
    """
    batch, num_latents, frames = measured.shape
    low, high, step = grid
    states = torch.arange(low, high + step / 2, step, device=measured.device)  # [X]
    growth = torch.arange(1, frames + 1, device=measured.device) / frames  # [k]
    powers = decay ** torch.arange(1, frames + 1, device=measured.device)  # [k]
    offsets = torch.arange(-MOST_STEPS, MOST_STEPS + 1, device=measured.device)  # [E]

    def paths(force: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predictions [B, P, X, 1, k], deviations [B, P, X, E] and the states they end in, from force [B, P, k]."""
        free = states[:, None, None] * powers + force[:, :, None, None]
        end = ((free[..., -1] - low) / step).round().long() + offsets  # [B, P, X, E]
        end = end.clamp(0, len(states) - 1)
        return free, states[end] - free[..., -1], end

    value = measured.new_zeros(batch, len(states))
    choices = []
    for latent in range(num_latents - 1, -1, -1):
        free, drift, end = paths(forced[:, latent])
        cost = value.gather(1, end.flatten(1)).view(end.shape) + 0.5 * (drift / deviation).square()
        for frame in range(frames):
            miss = measured[:, latent, frame, None, None, None] - free[..., frame] - drift * growth[frame]
            seen = weight[:, latent, frame, None, None, None]
            cost = cost + seen * (0.5 * (miss / noise).square()).clamp(max=0.5 * OUTLIER**2)
        value, choice = cost.transpose(1, 2).flatten(2).min(dim=2)  # over P·E: [B, X]
        choices.append(choice)

    state, picked, path = value.argmin(dim=1), [], []  # [B]
    rows = torch.arange(batch, device=measured.device)
    for latent, choice in enumerate(reversed(choices)):
        which = choice[rows, state]
        pick, offset = which // len(offsets), which % len(offsets)
        free, drift, end = paths(forced[:, latent])
        path.append(free[rows, pick, state, 0] + drift[rows, pick, state, offset, None] * growth)
        picked.append(pick)
        state = end[rows, pick, state, offset]
    return torch.stack(picked, dim=1), torch.cat(path, dim=1)


def confusion_matrix(true: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Counts int64 [num_classes, num_classes]: row the true class, column the predicted one.

    The two have the same shape, any.

    Raises:
        ValueError: for shapes that differ, or classes outside 0…num_classes − 1.
    """
    if true.shape != predicted.shape:
        raise ValueError(f"{tuple(true.shape)} true classes and {tuple(predicted.shape)} predicted ones")
    true, predicted = true.flatten().long(), predicted.flatten().long()
    both = torch.cat([true, predicted])
    if len(both) and (both.min() < 0 or both.max() >= num_classes):
        raise ValueError(f"a class is outside 0…{num_classes - 1}")
    return torch.bincount(true * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


def macro_f1(true: Tensor, predicted: Tensor, num_classes: int) -> float:
    """The mean F1 over the classes that occur in either tensor: 2·hits / (times true + times predicted), 0…1.

    Without any entry it is 0.
    """
    counts = confusion_matrix(true, predicted, num_classes).double()
    occurrences = counts.sum(dim=0) + counts.sum(dim=1)
    occurs = occurrences > 0
    return float((2 * counts.diagonal()[occurs] / occurrences[occurs]).mean()) if occurs.any() else 0.0


@dataclass(frozen=True)
class TrajectoryError:
    """Dead reckoning against the truth, root mean square over a clip's frames, [B] each.

    `position` in metres and `heading` in radians; the shares divide them by the true distance driven and by the true
    total turn (both summed without sign, and taken as at least 1 m and 0.1 rad).
    """

    position: Tensor
    heading: Tensor
    position_share: Tensor
    heading_share: Tensor


def trajectory_error(motion: Motion, true_speed: Tensor, true_yaw_rate: Tensor, fps: float = 16.0) -> TrajectoryError:
    """The absolute trajectory error of a measured motion, started at the true pose of frame 0.

    The truth is [B, N] each; for a generated video it is the true physics under the same signals (`Physics.drive`).

    Raises:
        ValueError: for a truth of another shape.
    """
    if not motion.speed.shape == true_speed.shape == true_yaw_rate.shape:
        raise ValueError(
            f"the motion is {tuple(motion.speed.shape)}, the truth {tuple(true_speed.shape)} and "
            f"{tuple(true_yaw_rate.shape)}; all have to be [B, N]"
        )
    position, heading = _dead_reckoning(motion.speed, motion.yaw_rate, fps)
    true_position, true_heading = _dead_reckoning(true_speed, true_yaw_rate, fps)
    position_error = (position - true_position).abs().square().mean(dim=1).sqrt()
    heading_error = (heading - true_heading).square().mean(dim=1).sqrt()
    distance = (true_speed[:, 1:].double().abs().sum(dim=1) / fps).clamp(min=1.0)
    turn = (true_yaw_rate[:, 1:].double().abs().sum(dim=1) / fps).clamp(min=0.1)
    return TrajectoryError(position_error, heading_error, position_error / distance, heading_error / turn)


def _dead_reckoning(speed: Tensor, yaw_rate: Tensor, fps: float) -> tuple[Tensor, Tensor]:
    """Positions after frame 0, complex128 [B, N − 1] (ahead + i·left), and headings [B, N − 1].

    In each frame the car turns, then drives.
    """
    heading = torch.cumsum(yaw_rate[:, 1:].double() / fps, dim=1)
    return torch.cumsum(torch.polar(torch.ones_like(heading), heading) * speed[:, 1:].double() / fps, dim=1), heading
