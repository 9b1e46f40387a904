"""How many frames pass from a change of signal to the first answer that can be seen.

The rule. The signal that explains the last measured steps before a change best is what the video was doing, whether it
was told to or not. From there the physics predicts two futures: one that goes on like that, one under the new signal.
The measured motion minus the first is projected on the difference of the two, each quantity in units of its noise, so
that only a move in the new signal's direction counts, and counts by how plainly it shows. The change is answered at
the first frame where this exceeds THRESHOLD standard deviations in that frame and the next. The noise is the spread of
measured minus predicted motion where the signal did not change: it holds the instrument's error and also the video's
own restlessness, so a video that wanders at random answers little. A video that was already doing what the new signal
says cannot answer it.

Measure with `estimate_motion(..., gaps=(1,))`: longer gaps look ahead and would find the answer early.

Letters: `B` clips, `N` frames, `n` changes, `H` frames after a change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from common.evaluation.motion import Motion
from common.evaluation.physics import Physics

THRESHOLD = 4.0  # standard deviations
HISTORY = 5  # measured steps before a change, from which the state is fitted
SETTLING = 8  # frames after a change that do not count as undisturbed
HORIZON = 8  # frames that the undisturbed motion is predicted ahead, to learn the noise
LEAST_NOISE = (0.1, 0.01)  # m/s, rad/s: an instrument is never trusted more than that
USUAL_NOISE = (0.7, 0.04)  # m/s, rad/s: where no stretch is long enough to learn it


@dataclass(frozen=True)
class Latency:
    """`frames` float64 [n], one for each change: frames until the answer, 0 if the first frame with the new signal
    shows it, NaN if it never came. `noise` is the speed's (m/s) and the yaw rate's (rad/s).
    """

    frames: Tensor
    noise: tuple[float, float]


def response_latency(motion: Motion, signals: Tensor, physics: Physics, patience: int = 32) -> Latency:
    """The latency of every change in signals int64 [B, N]: the signal given at each raw frame of the measured clips.

    An answer is awaited for `patience` frames or until the next change, whichever comes first. Changes in a clip's
    first HISTORY + 1 frames, and those whose clip ends before the wait is over, are left out.

    Raises:
        ValueError: for signals of another shape than the motion, or a patience under two frames.
    """
    if signals.shape != motion.speed.shape:
        raise ValueError(
            f"the motion is {tuple(motion.speed.shape)}, the signals are {tuple(signals.shape)}: [B, N] both"
        )
    if patience < 2:
        raise ValueError(f"patience is {patience}; an answer takes two frames to confirm")
    signals = signals.to(motion.speed.device)
    measured = torch.stack([motion.speed, motion.yaw_rate], dim=-1).double()  # [B, N, 2]
    noise = _noise(measured, signals, physics)

    clips, frames, waits = _changes(signals, patience)
    if not len(clips):
        return Latency(measured.new_zeros(0), noise)
    old, state = _fit_before(measured, clips, frames, physics)
    new = signals[clips, frames]
    unmoved, moved = (_future(signal, state, patience, physics) for signal in (old, new))  # [n, H, 2]
    scale = torch.tensor(noise, dtype=torch.float64, device=measured.device)
    later = torch.arange(patience, device=measured.device)
    index = (frames[:, None] + later).clamp(max=measured.shape[1] - 1)
    surprise = (measured[clips[:, None], index] - unmoved) / scale
    expected = (moved - unmoved) / scale
    along = (surprise * expected).sum(-1) / expected.norm(dim=-1).clamp(min=1e-9)  # [n, H]
    seen = (along > THRESHOLD) & (later < waits[:, None])
    seen = seen[:, :-1] & seen[:, 1:]
    answer = seen.double().argmax(dim=1).double().masked_fill(~seen.any(dim=1), math.nan)
    return Latency(answer, noise)


def _changes(signals: Tensor, patience: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clip, frame and frames to wait of each change that can be judged, int64 [n] each."""
    num_frames = signals.shape[1]
    rows = []
    for clip, frame in (signals[:, 1:] != signals[:, :-1]).nonzero().tolist():
        frame += 1
        same = (signals[clip, frame:] != signals[clip, frame]).nonzero()
        until = frame + int(same[0]) if len(same) else num_frames + patience
        if frame > HISTORY and min(until, frame + patience) <= num_frames:
            rows.append((clip, frame, min(until - frame, patience)))
    return tuple(torch.tensor(rows, dtype=torch.long, device=signals.device).view(-1, 3).T)


def _fit_before(measured: Tensor, clips: Tensor, frames: Tensor, physics: Physics) -> tuple[Tensor, Tensor]:
    """The signal [n] obeyed in the HISTORY steps before `frames`, and speed and yaw rate [n, 2] at the last of them.

    With y_i the distance to the target i frames before, the physics says y_i · decay^i = y_0 for all i: y_0 is their
    mean, and the signal is the one with the least variance about it.
    """
    back = torch.arange(HISTORY, device=measured.device)
    recent = measured[clips[:, None], frames[:, None] - 1 - back]  # [n, HISTORY, 2]
    speeds, steerings = (recent.new_tensor(values) for values in (physics.target_speeds, physics.steerings))
    lock = physics.lock(recent[..., 0].mean(dim=1, keepdim=True))  # [n, 1]
    targets = torch.stack([speeds.expand(len(clips), -1), steerings * lock], dim=-1)  # [n, signals, 2]
    decay = recent.new_tensor([physics.speed_decay, physics.yaw_decay]) ** back[:, None].double()  # [HISTORY, 2]
    last = (recent[:, None] - targets[:, :, None]) * decay  # [n, signals, HISTORY, 2]
    misfit = (last.var(dim=2) / recent.new_tensor(USUAL_NOISE).square()).sum(dim=-1)
    signal, rows = misfit.argmin(dim=1), torch.arange(len(clips), device=measured.device)
    return signal, (targets + last.mean(dim=2))[rows, signal]


def _future(signal: Tensor, state: Tensor, num_frames: int, physics: Physics) -> Tensor:
    """Speed and yaw rate [n, num_frames, 2] from a state [n, 2] on, under one signal [n]."""
    held = signal[:, None].expand(-1, num_frames)
    return torch.stack(physics.drive(held, state[:, 0], state[:, 1]), dim=-1)


def _noise(measured: Tensor, signals: Tensor, physics: Physics) -> tuple[float, float]:
    """Standard deviation of measured minus predicted motion while a signal is held.

    From the lower quartile of its size, .3186 σ for a normal distribution: late answers fall into these stretches too.
    """
    span = SETTLING + HISTORY + HORIZON
    if signals.shape[1] <= span:
        return USUAL_NOISE
    windows = signals[:, 1:].unfold(1, span, 1)  # [B, starts, span]; entry 0 of the motion is no measurement
    clips, starts = (windows == windows[..., :1]).all(dim=-1).nonzero(as_tuple=True)
    if not len(clips):
        return USUAL_NOISE
    frames = starts + 1 + SETTLING + HISTORY
    predicted = _future(*_fit_before(measured, clips, frames, physics), HORIZON, physics)
    ahead = frames[:, None] + torch.arange(HORIZON, device=measured.device)
    spread = (measured[clips[:, None], ahead] - predicted).abs().flatten(0, 1)
    spread = spread.kthvalue(math.ceil(len(spread) / 4), dim=0).values / 0.3186
    return tuple(max(float(value), least) for value, least in zip(spread, LEAST_NOISE, strict=True))
