"""The sliding window of a stream: what is in it, at which noise levels, and how it moves. No model in here.

A window has F = 1 + G·W latent frames: one finished frame, the condition, then G groups of W frames with noise rising
from left to right. Between two shifts every group goes down by one group's span of noise, in N/G solver steps. Then the
first group is finished, its last frame becomes the condition, and W frames of pure noise enter on the right.

Shapes: B batch, F, G, W as above, C latent channels, H W latent height/width, N inference steps.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from common.cogvideox.noise_schedule import CLEAN, StepCoefficients, apply_step, expand_group_timesteps
from common.cogvideox.window_scheduler import SwinSchedulerMixin


class InnerStep(NamedTuple):
    """One solver step, on the device and ready to use."""

    timesteps: Tensor  # what the transformer is told: [F], or [] when all frames share it
    coefficients: StepCoefficients  # each [1,F−1,1,1,1] for the frames after the condition, or [1,1,1,1,1] for all


@dataclass(frozen=True)
class WindowPlan:
    """All that follows from scheduler, number of steps and device; made once a stream.

    Attributes:
        uniform: N steps with one timestep for all frames: how a stream starts from text alone.
        steps: the N/G steps of every shift. The first has no solver history: carried across shifts it changed neither
            obedience nor looks (data/miniworld/RESULTS.md).
        entry_timesteps: [F−1], where frames 1… stand when those steps begin.
        condition_timestep: noise level of the condition frame, [] int64; None when it stays clean.
    """

    frames_per_group: int
    num_frames: int
    uniform: list[InnerStep]
    steps: list[InnerStep]
    entry_timesteps: Tensor
    condition_timestep: Tensor | None


def _inner_step(
    scheduler: SwinSchedulerMixin, told: Tensor, timesteps: Tensor, back: Tensor | None, device: torch.device
) -> InnerStep:
    frames = (1, -1, 1, 1, 1)
    back = None if back is None else back.reshape(frames)
    coefficients = scheduler.step_coefficients(timesteps.reshape(frames), back_timesteps=back)
    on_device = (None if c is None else c.to(torch.float32).to(device) for c in coefficients)
    return InnerStep(told.to(device), StepCoefficients(*on_device))


def make_window_plan(
    scheduler: SwinSchedulerMixin, num_inference_steps: int | None, device: torch.device
) -> WindowPlan:
    """The plan of a scheduler's window.

    Args:
        num_inference_steps: N, a multiple of G; None for the scheduler's `default_inference_steps`.

    Raises:
        UserError: N does not fit the groups or the phases.
    """
    scheduler.set_timesteps(num_inference_steps or scheduler.default_inference_steps)
    config, grid = scheduler.config, scheduler.timesteps.cpu()
    num_frames = scheduler.num_window_frames
    told = expand_group_timesteps(grid, num_frames, config.num_noise_groups)  # [N/G,F]
    rows = told[:, 1:]  # [N/G,F−1]
    is_condition_noisy = config.condition_timestep != CLEAN
    if is_condition_noisy:
        told[:, 0] = config.condition_timestep

    def steps(told: Tensor, timesteps: Tensor) -> list[InnerStep]:
        backs = [None, *timesteps[:-1]]  # where each step's history was predicted
        return [_inner_step(scheduler, *row, device) for row in zip(told, timesteps, backs, strict=True)]

    return WindowPlan(
        frames_per_group=config.frames_per_group,
        num_frames=num_frames,
        uniform=steps(grid, grid),
        steps=steps(told, rows),
        entry_timesteps=rows[0].to(device),
        condition_timestep=told[0, 0].to(device) if is_condition_noisy else None,
    )


@dataclass(frozen=True)
class WindowState:
    """What a stream carries from shift to shift; its size does not depend on how long it has run.

    Attributes:
        latents: float32 [B,F,C,H,W].
        first_frame: the stream's number of latent frame 0 of the window.
        old_x0: x̂0 of frames 1… in the step before, [B,F−1,C,H,W]; None before a shift's first.
    """

    latents: Tensor
    first_frame: int = 0
    old_x0: Tensor | None = None

    def step(self, coefficients: StepCoefficients, model_output: Tensor, noise: Tensor | None) -> "WindowState":
        """One solver step of frames 1…, the condition stays. `model_output` [B,F,C,H,W], `noise` [B,F−1,C,H,W]."""
        condition, frames = self.latents[:, :1], self.latents[:, 1:]
        frames, x0 = apply_step(coefficients, frames, model_output[:, 1:], self.old_x0, noise)
        return replace(self, latents=torch.cat([condition, frames], dim=1), old_x0=x0)

    def shift(self, fresh: Tensor) -> "WindowState":
        """Moves by a group: the last frame of the first group becomes the condition, `fresh` [B,W,C,H,W] enters."""
        width = fresh.shape[1]
        return WindowState(torch.cat([self.latents[:, width:], fresh], dim=1), self.first_frame + width)


def num_chunks_for(seconds: float, fps: float, frames_per_chunk: int) -> int:
    """Fewest chunks that last `seconds`: the first has one frame more than `frames_per_chunk`."""
    num_frames = round(seconds * fps)
    return max(1, -(-(num_frames - 1) // frames_per_chunk))
