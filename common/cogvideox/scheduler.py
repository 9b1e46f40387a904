"""Schedulers whose `step` takes one timestep a latent frame: DPM and DDIM for stage 3, consistency jumps for stage 4.

They are diffusers' CogVideoX schedulers: with one timestep for everything they do what those do, bit for bit, and their
config also holds the window that a stream is made of (`num_noise_groups`, `frames_per_group`). What the three share is
in window_scheduler.py, the arithmetic in noise_schedule.py, as pure functions that training uses too. They pass
diffusers its arguments by keyword: what comes by position `from_config` takes for a default, and forgets.

Shapes: B batch, F latent frames, G noise groups, W frames per group, T train timesteps, N inference steps.
"""

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim_cogvideox import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from common.cogvideox import noise_schedule
from common.cogvideox.noise_schedule import (
    CLEAN,
    StepCoefficients,
    apply_step,
    expand_group_timesteps,
    sample_group_timesteps,
)
from common.cogvideox.window_scheduler import SwinSchedulerMixin
from common.config.errors import UserError

__all__ = [
    "CLEAN",
    "CogVideoXSwinDDIMScheduler",
    "CogVideoXSwinDPMScheduler",
    "CogVideoXSwinLCMScheduler",
    "expand_group_timesteps",
    "sample_group_timesteps",
]


def _as_timesteps(timestep: Tensor | int, sample: Tensor) -> Tensor:
    return torch.as_tensor(timestep, dtype=torch.long, device=sample.device)


def _output(prev_sample: Tensor, x0: Tensor, return_dict: bool) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
    return DDIMSchedulerOutput(prev_sample, x0) if return_dict else (prev_sample, x0)


class CogVideoXSwinDPMScheduler(SwinSchedulerMixin, CogVideoXDPMScheduler):
    """SDE-DPM-Solver++(2M) over a window of rising noise; a shift's first step is of first order.

    Args (diffusers' own, with CogVideoX-2B's values as defaults, and):
        num_noise_groups, frames_per_group: the window, F = 1 + G·W latent frames.
        condition_timestep: noise level of the condition frame in a stream; −1 leaves it clean (the model is told 0).
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.0120,
        beta_schedule: str = "scaled_linear",
        trained_betas: list[float] | None = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "v_prediction",
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "trailing",
        rescale_betas_zero_snr: bool = True,
        snr_shift_scale: float = 3.0,
        num_noise_groups: int = 4,
        frames_per_group: int = 2,
        condition_timestep: int = CLEAN,
    ):
        super().__init__(
            num_train_timesteps=num_train_timesteps, beta_start=beta_start, beta_end=beta_end,
            beta_schedule=beta_schedule, trained_betas=trained_betas, clip_sample=clip_sample,
            set_alpha_to_one=set_alpha_to_one, steps_offset=steps_offset, prediction_type=prediction_type,
            clip_sample_range=clip_sample_range, sample_max_value=sample_max_value, timestep_spacing=timestep_spacing,
            rescale_betas_zero_snr=rescale_betas_zero_snr, snr_shift_scale=snr_shift_scale,
        )  # fmt: skip
        self._check_window()

    def step_coefficients(
        self, timesteps: Tensor, prev_timesteps: Tensor | None = None, back_timesteps: Tensor | None = None
    ) -> StepCoefficients:
        """Coefficients of one step from `timesteps`, by default to the grid's next ones; `dpm_step_coefficients`."""
        prev = self.previous_timesteps(timesteps) if prev_timesteps is None else prev_timesteps
        return noise_schedule.dpm_step_coefficients(timesteps, prev, back_timesteps, self.alpha_table(timesteps.device))

    def step(
        self,
        model_output: Tensor,
        old_pred_original_sample: Tensor | None,
        timestep: Tensor | int,
        timestep_back: Tensor | int | None,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = False,
        prev_timestep: Tensor | None = None,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step; → (prev_sample, x̂0), in float32 at least where timesteps are per frame.

        Args:
            old_pred_original_sample: x̂0 of the step before, None for none.
            timestep: one, or [B,F,1,1,1], or anything that broadcasts.
            timestep_back: where `old_pred_original_sample` was predicted, per frame; −1 or None: nowhere, first order.
            variance_noise: noise to use instead of drawing from `generator`.
            prev_timestep: where to step to; default the next of the grid.
            eta, use_clipped_model_output: of no effect, as in diffusers.
        """
        if isinstance(timestep_back, int) and timestep_back < 0:
            timestep_back = None
        if self._diffusers_can(timestep, variance_noise, prev_timestep):
            old = old_pred_original_sample if timestep_back is not None else None
            result = super().step(
                model_output, old, timestep, timestep_back, sample, generator=generator, return_dict=False
            )
            return _output(*result, return_dict)
        timestep = _as_timesteps(timestep, sample)
        if timestep_back is not None:
            timestep_back = _as_timesteps(timestep_back, sample)
        coefficients = self.step_coefficients(timestep, prev_timestep, timestep_back).for_sample(sample)
        if variance_noise is None:
            dtype = noise_schedule.compute_dtype(sample)
            variance_noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=dtype)
        result = apply_step(coefficients, sample, model_output, old_pred_original_sample, variance_noise)
        return _output(*result, return_dict)


class CogVideoXSwinDDIMScheduler(SwinSchedulerMixin, CogVideoXDDIMScheduler):
    """DDIM (η = 0) over a window of rising noise. Arguments as of `CogVideoXSwinDPMScheduler`; it has no history."""

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.0120,
        beta_schedule: str = "scaled_linear",
        trained_betas: list[float] | None = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "v_prediction",
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "trailing",
        rescale_betas_zero_snr: bool = True,
        snr_shift_scale: float = 3.0,
        num_noise_groups: int = 4,
        frames_per_group: int = 2,
        condition_timestep: int = CLEAN,
    ):
        super().__init__(
            num_train_timesteps=num_train_timesteps, beta_start=beta_start, beta_end=beta_end,
            beta_schedule=beta_schedule, trained_betas=trained_betas, clip_sample=clip_sample,
            set_alpha_to_one=set_alpha_to_one, steps_offset=steps_offset, prediction_type=prediction_type,
            clip_sample_range=clip_sample_range, sample_max_value=sample_max_value, timestep_spacing=timestep_spacing,
            rescale_betas_zero_snr=rescale_betas_zero_snr, snr_shift_scale=snr_shift_scale,
        )  # fmt: skip
        self._check_window()

    def step_coefficients(
        self, timesteps: Tensor, prev_timesteps: Tensor | None = None, back_timesteps: Tensor | None = None
    ) -> StepCoefficients:
        """Coefficients of one step from `timesteps`, to the grid's next ones by default. `back_timesteps`: ignored."""
        prev = self.previous_timesteps(timesteps) if prev_timesteps is None else prev_timesteps
        return noise_schedule.ddim_step_coefficients(timesteps, prev, self.alpha_table(timesteps.device))

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        prev_timestep: Tensor | None = None,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step; → prev_sample and x̂0, in float32 at least where timesteps are per frame.

        Args:
            timestep: one, or [B,F,1,1,1], or anything that broadcasts.
            prev_timestep: where to step to; default the next of the grid.
            eta, use_clipped_model_output, generator, variance_noise: of no effect, as in diffusers.
        """
        if self._diffusers_can(timestep, prev_timestep):
            return super().step(model_output, timestep, sample, return_dict=return_dict)
        coefficients = self.step_coefficients(_as_timesteps(timestep, sample), prev_timestep).for_sample(sample)
        return _output(*apply_step(coefficients, sample, model_output), return_dict)


class CogVideoXSwinLCMScheduler(SwinSchedulerMixin, CogVideoXDDIMScheduler):
    """Stage 4's sampler: from t straight to the boundary of its phase, one forward a shift when a group has one phase.

    A consistency jump *is* a DDIM step to the boundary b(t); the last one ends exactly clean.

    Args (those of `CogVideoXSwinDDIMScheduler`, and):
        phases_per_group: m; there are P = G·m phases of T/P timesteps, and sampling takes P steps.
        original_inference_steps: K, solver steps of the teacher's grid while distilling; a solver step spans T/K.
        guidance_range: [low, high] of the guidance that a model with `cond_proj_dim` was taught; None for any other.
    """

    is_distilled = True

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.0120,
        beta_schedule: str = "scaled_linear",
        trained_betas: list[float] | None = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "v_prediction",
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "trailing",
        rescale_betas_zero_snr: bool = True,
        snr_shift_scale: float = 3.0,
        num_noise_groups: int = 4,
        frames_per_group: int = 2,
        condition_timestep: int = CLEAN,
        phases_per_group: int = 1,
        original_inference_steps: int = 40,
        guidance_range: list[float] | None = None,
    ):
        super().__init__(
            num_train_timesteps=num_train_timesteps, beta_start=beta_start, beta_end=beta_end,
            beta_schedule=beta_schedule, trained_betas=trained_betas, clip_sample=clip_sample,
            set_alpha_to_one=set_alpha_to_one, steps_offset=steps_offset, prediction_type=prediction_type,
            clip_sample_range=clip_sample_range, sample_max_value=sample_max_value, timestep_spacing=timestep_spacing,
            rescale_betas_zero_snr=rescale_betas_zero_snr, snr_shift_scale=snr_shift_scale,
        )  # fmt: skip
        self._check_window()
        steps, phases = original_inference_steps, self.num_phases
        if phases < 1 or steps < 1 or num_train_timesteps % steps or num_train_timesteps % phases or steps % phases:
            raise UserError(
                f"original_inference_steps={steps} has to divide num_train_timesteps={num_train_timesteps} and to be a "
                f"multiple of the {phases} phases (num_noise_groups × phases_per_group), which divide it too"
            )
        if timestep_spacing != "trailing":
            raise UserError(f"timestep_spacing={timestep_spacing!r}: phases end on a 'trailing' grid")

    @property
    def num_phases(self) -> int:
        """P = G·m."""
        return self.config.num_noise_groups * self.config.phases_per_group

    def set_timesteps(self, num_inference_steps: int | None = None, device: torch.device | str | None = None) -> None:
        """The upper ends of the phases, 999, 749, 499, 249 for four. No other number of steps was distilled."""
        if num_inference_steps not in (None, self.num_phases):
            raise UserError(f"num_inference_steps={num_inference_steps}: the model was distilled for {self.num_phases}")
        super().set_timesteps(self.num_phases, device)

    def phase_boundary(self, timesteps: Tensor) -> Tensor:
        """b(t), the timestep just below the phase of t; −1 (clean) for the lowest."""
        return noise_schedule.phase_boundary(timesteps, self.num_phases, self.config.num_train_timesteps)

    def solver_timestep(self, timesteps: Tensor) -> Tensor:
        """Where one of the teacher's K solver steps leads from t: t − T/K, never below the boundary of t's phase."""
        span = self.config.num_train_timesteps // self.config.original_inference_steps
        return torch.maximum(timesteps - span, self.phase_boundary(timesteps))

    def step_coefficients(
        self, timesteps: Tensor, prev_timesteps: Tensor | None = None, back_timesteps: Tensor | None = None
    ) -> StepCoefficients:
        """Coefficients of the jump from `timesteps`, to their boundaries by default. `back_timesteps`: ignored."""
        prev = self.phase_boundary(timesteps) if prev_timesteps is None else prev_timesteps
        return noise_schedule.ddim_step_coefficients(timesteps, prev, self.alpha_table(timesteps.device))

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        prev_timestep: Tensor | None = None,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One jump; → prev_sample and x̂0. Arguments as of `CogVideoXSwinDDIMScheduler.step`; any timesteps will do."""
        coefficients = self.step_coefficients(_as_timesteps(timestep, sample), prev_timestep).for_sample(sample)
        return _output(*apply_step(coefficients, sample, model_output), return_dict)
