"""Noise levels of a sliding window, and the solver steps between them, as pure functions.

Shapes: B batch, F latent frames, G noise groups, T train timesteps. A timestep tensor has the leading dimensions of the
sample it belongs to ([], [B], [B,F]) or any shape that broadcasts against it ([B,F,1,1,1]).
`alphas` is always [T+1] in float64: ᾱ of timesteps 0 … T−1 and behind them ᾱ of the clean end, which is 1. So timestep
−1 (`CLEAN`) means "no noise at all" and needs no special case: it indexes the last entry.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.config.errors import UserError

CLEAN = -1


def alphas_with_clean_end(scheduler: Any, device: torch.device | str = "cpu") -> Tensor:
    """`alphas` of any diffusers scheduler: its [T] ᾱ and behind it 1, for timestep −1."""
    table = torch.cat([scheduler.alphas_cumprod.double().cpu(), torch.ones(1, dtype=torch.float64)])
    return table.to(device)


def group_size(num_frames: int, num_noise_groups: int) -> int:
    """Frames per group W of a window of F = 1 + G·W latent frames; a `UserError` when F does not divide so."""
    if num_noise_groups < 1 or num_frames < 1 + num_noise_groups or (num_frames - 1) % num_noise_groups:
        raise UserError(
            f"a window of {num_frames} latent frames is not 1 + a multiple of {num_noise_groups} noise groups; "
            f"{1 + num_noise_groups} or {1 + 2 * num_noise_groups} would be"
        )
    return (num_frames - 1) // num_noise_groups


def sample_group_timesteps(
    batch_size: int,
    num_frames: int,
    num_noise_groups: int,
    num_train_timesteps: int,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Training timesteps of B windows: u ~ U{0 … T/G−1} a sample, group g at u + g·T/G, the condition frame at 0.

    Args:
        generator: one, or one a sample (then a sample's draw does not depend on its batch).

    Returns:
        int64 [B,F] on the generator's device.
    """
    span = num_train_timesteps // num_noise_groups
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        offset = torch.randint(0, span, (batch_size,), generator=generator, device=device)  # [B]
    else:
        offset = torch.stack([torch.randint(0, span, (), generator=g, device=g.device) for g in generator])  # [B]
    return group_timesteps(offset, num_frames, num_noise_groups, num_train_timesteps)


def group_timesteps(offset: Tensor, num_frames: int, num_noise_groups: int, num_train_timesteps: int) -> Tensor:
    """Timesteps of windows whose group g is at offset + g·T/G, the condition frame at 0: offset [B] → int64 [B,F]."""
    width = group_size(num_frames, num_noise_groups)
    if num_train_timesteps % num_noise_groups:
        raise UserError(f"{num_train_timesteps} train timesteps do not divide into {num_noise_groups} noise groups")
    start = torch.arange(num_noise_groups, device=offset.device) * (num_train_timesteps // num_noise_groups)  # [G]
    levels = (offset[:, None] + start).repeat_interleave(width, dim=1)  # [B,G·W]
    return torch.cat([torch.zeros_like(levels[:, :1]), levels], dim=1)


def expand_group_timesteps(timesteps: Tensor, num_frames: int, num_noise_groups: int) -> Tensor:
    """A falling list of N timesteps, spread over the groups of a window.

    Row r is the r-th of the N/G steps between two shifts: the last group walks through the first N/G timesteps, the
    first group through the last ones, after which it is clean.

    Returns:
        int64 [N//G, F]; frame 0, the condition, is 0.
    """
    width = group_size(num_frames, num_noise_groups)
    if len(timesteps) % num_noise_groups:
        below = len(timesteps) // num_noise_groups * num_noise_groups
        raise UserError(
            f"{len(timesteps)} inference steps do not divide among {num_noise_groups} noise groups; "
            f"{below or num_noise_groups} or {below + num_noise_groups} would"
        )
    by_group = timesteps.reshape(num_noise_groups, -1).flip(0).T  # [N/G,G], noise rising from left to right
    levels = by_group.repeat_interleave(width, dim=1).long()  # [N/G,G·W]
    return torch.cat([torch.zeros_like(levels[:, :1]), levels], dim=1)


def phase_boundary(timesteps: Tensor, num_phases: int, num_train_timesteps: int) -> Tensor:
    """b(t): the timestep just below t's phase, of P phases of T/P timesteps each. The lowest phase ends `CLEAN`, and
    what is clean stays so."""
    length = num_train_timesteps // num_phases
    return (torch.div(timesteps, length, rounding_mode="floor") * length - 1).clamp(min=CLEAN)


def compute_dtype(sample: Tensor) -> torch.dtype:
    """float32, or float64 for a float64 sample: bfloat16 misstates σ by over 5 % at some timesteps."""
    return torch.promote_types(sample.dtype, torch.float32)


def broadcast_to_sample(values: Tensor, sample: Tensor) -> Tensor:
    """`values` in the type to compute in; [B] and [B,F] get the sample's further dimensions, others broadcast as is."""
    values = values.to(dtype=compute_dtype(sample))
    if 1 <= values.ndim <= 2:
        values = values.reshape(values.shape + (1,) * (sample.ndim - values.ndim))
    return values


def mix_noise(sample: Tensor, noise: Tensor, timesteps: Tensor, alphas: Tensor) -> Tensor:
    """x_t = √ᾱ·x_0 + √(1−ᾱ)·ε, in float32 at least."""
    alpha = alphas[timesteps]
    return broadcast_to_sample(alpha.sqrt(), sample) * sample + broadcast_to_sample((1 - alpha).sqrt(), sample) * noise


def velocity(sample: Tensor, noise: Tensor, timesteps: Tensor, alphas: Tensor) -> Tensor:
    """v = √ᾱ·ε − √(1−ᾱ)·x_0 (Salimans & Ho, arXiv 2202.00512), in float32 at least."""
    alpha = alphas[timesteps]
    return broadcast_to_sample(alpha.sqrt(), sample) * noise - broadcast_to_sample((1 - alpha).sqrt(), sample) * sample


def predict_x0(sample: Tensor, model_output: Tensor, timesteps: Tensor, alphas: Tensor) -> Tensor:
    """x̂0 = √ᾱ·x_t − √(1−ᾱ)·v, in float32 at least."""
    alpha = alphas[timesteps]
    return (
        broadcast_to_sample(alpha.sqrt(), sample) * sample
        - broadcast_to_sample((1 - alpha).sqrt(), sample) * model_output
    )


def ddim_coefficients(timesteps: Tensor, prev_timesteps: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) of x_s = a·x_t + b·x̂0 for DDIM from t to s: a = σ_s/σ_t, b = α_s − α_t·a; (1, 0) where s = t.

    With s = b(t), the boundary of t's phase, these are c_skip and c_out of the consistency function f(x_t,t): f is the
    identity on the boundary, whatever the network says.

    Returns:
        float64, the common shape of the two timestep tensors.
    """
    alpha, alpha_prev = alphas[timesteps], alphas[prev_timesteps]
    a = ((1 - alpha_prev) / (1 - alpha)) ** 0.5
    a = torch.where(timesteps == prev_timesteps, torch.ones_like(a), a)  # 0/0 at the clean end
    return a, alpha_prev**0.5 - alpha**0.5 * a


def ddim_step(sample: Tensor, x0: Tensor, timesteps: Tensor, prev_timesteps: Tensor, alphas: Tensor) -> Tensor:
    """One deterministic step from t to s given x̂0 (Song et al., arXiv 2010.02502, eq. 12 with η = 0)."""
    a, b = ddim_coefficients(timesteps, prev_timesteps, alphas)
    return broadcast_to_sample(a, sample) * sample + broadcast_to_sample(b, sample) * x0


class StepCoefficients(NamedTuple):
    """A solver step as a linear map:

    x̂0 = x0_sample·x − x0_output·v;   d = current·x̂0 − history·x̂0_old;   x' = sample·x + denoised·d + noise·ε

    `history` and `noise` are None where the solver has none. A step written this way is exactly as many multiplications
    as diffusers makes, in the same order, so that results agree to the last bit.
    """

    x0_sample: Tensor
    x0_output: Tensor
    sample: Tensor
    denoised: Tensor
    current: Tensor | None = None
    history: Tensor | None = None
    noise: Tensor | None = None

    def for_sample(self, sample: Tensor) -> "StepCoefficients":
        """The same, ready to multiply `sample`: on its device, in `compute_dtype`, with its dimensions."""
        return StepCoefficients(
            *(None if c is None else broadcast_to_sample(c, sample).to(sample.device) for c in self)
        )


def ddim_step_coefficients(timesteps: Tensor, prev_timesteps: Tensor, alphas: Tensor) -> StepCoefficients:
    alpha = alphas[timesteps]
    return StepCoefficients(alpha**0.5, (1 - alpha) ** 0.5, *ddim_coefficients(timesteps, prev_timesteps, alphas))


def dpm_step_coefficients(
    timesteps: Tensor, prev_timesteps: Tensor, back_timesteps: Tensor | None, alphas: Tensor
) -> StepCoefficients:
    """SDE-DPM-Solver++(2M) (Lu et al., arXiv 2211.01095), in the form of diffusers' CogVideoXDPMScheduler.

    Second order where `back_timesteps` holds the timestep of the previous x̂0; first order where it is `CLEAN` (no
    history yet) and on the step that ends clean. A frame whose timestep stays, as a condition's, stays as it is.
    """
    stays = timesteps == prev_timesteps
    alpha, alpha_prev = alphas[timesteps], alphas[prev_timesteps]
    log_snr = ((alpha / (1 - alpha)) ** 0.5).log()
    log_snr_prev = ((alpha_prev / (1 - alpha_prev)) ** 0.5).log()
    h = torch.where(stays, torch.zeros_like(log_snr), log_snr_prev - log_snr)
    current = history = None
    if back_timesteps is not None:
        alpha_back = alphas[back_timesteps]
        r = (log_snr - ((alpha_back / (1 - alpha_back)) ** 0.5).log()) / h
        second_order = (back_timesteps >= 0) & (prev_timesteps >= 0) & ~stays
        current = torch.where(second_order, 1 + 1 / (2 * r), torch.ones_like(r))
        history = torch.where(second_order, 1 / (2 * r), torch.zeros_like(r))
    sample = ((1 - alpha_prev) / (1 - alpha)) ** 0.5 * (-h).exp()
    return StepCoefficients(
        x0_sample=alpha**0.5,
        x0_output=(1 - alpha) ** 0.5,
        sample=torch.where(stays, torch.ones_like(sample), sample),
        denoised=-((-2 * h).expm1() * alpha_prev**0.5),
        current=current,
        history=history,
        noise=(1 - alpha_prev) ** 0.5 * (1 - (-2 * h).exp()) ** 0.5,
    )


def apply_step(
    coefficients: StepCoefficients,
    sample: Tensor,
    model_output: Tensor,
    old_x0: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x', x̂0) of one solver step. `coefficients` come from `for_sample`; nothing here waits for the device."""
    c = coefficients
    x0 = c.x0_sample * sample - c.x0_output * model_output
    direction = x0
    if c.history is not None and old_x0 is not None:
        direction = c.current * x0 - c.history * old_x0
    prev_sample = c.sample * sample + c.denoised * direction
    if c.noise is not None and noise is not None:
        prev_sample = prev_sample + c.noise * noise
    return prev_sample, x0
