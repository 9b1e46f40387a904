"""The mini base model's text-to-video transformer: a plain CogVideoXTransformer3DModel trained on cached latents.

Shapes: B batch, F latent frames, C latent channels, H W latent height and width, L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from torch import Tensor

from common.config.settings import VAE_TIME_FACTOR
from common.training.encoding import sample_posterior
from data.miniworld.base_text import MAX_TEXT_LENGTH, TEXT_DIM

CAPTION_DROPOUT = 0.1


def make_scheduler() -> CogVideoXDDIMScheduler:
    """The schedule of CogVideoX-2B: shifted, zero terminal signal, v-prediction."""
    return CogVideoXDDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        snr_shift_scale=3.0,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
    )


def make_transformer(
    height: int, width: int, num_frames: int, num_layers: int = 6, num_heads: int = 4
) -> CogVideoXTransformer3DModel:
    """An untrained transformer for videos of height × width pixels and num_frames raw frames; heads are 64 wide."""
    return CogVideoXTransformer3DModel(
        num_attention_heads=num_heads,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        time_embed_dim=256,
        text_embed_dim=TEXT_DIM,
        num_layers=num_layers,
        sample_height=height // 8,
        sample_width=width // 8,
        sample_frames=num_frames,
        patch_size=2,
        temporal_compression_ratio=VAE_TIME_FACTOR,
        max_text_seq_length=MAX_TEXT_LENGTH,
        spatial_interpolation_scale=1.0,
    )


def v_loss(
    transformer: CogVideoXTransformer3DModel,
    scheduler: CogVideoXDDIMScheduler,
    latents: Tensor,
    prompt_embeds: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    autocast: Callable[[], torch.autocast],
) -> Tensor:
    """Mean squared error of the predicted velocity √ᾱ·noise − √(1−ᾱ)·latents; the schedule in float32.

    latents, noise [B, F, C, H, W]; prompt_embeds [B, L, D]; timesteps int64 [B].
    """
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = scheduler.get_velocity(latents, noise, timesteps)
    with autocast():
        prediction = transformer(
            hidden_states=noisy, encoder_hidden_states=prompt_embeds, timestep=timesteps, return_dict=False
        )[0]
    return (prediction.float() - target).square().mean()


def transformer_objective(
    transformer: CogVideoXTransformer3DModel,
    scheduler: CogVideoXDDIMScheduler,
    moments: Tensor,
    clip_numbers: Tensor,
    prompt_embeds: Tensor,
    null_embeds: Tensor,
    scaling_factor: float,
    batch_size: int,
    seed: int,
    autocast: Callable[[], torch.autocast],
) -> Callable[[int, float], tuple[Tensor, dict[str, float]]]:
    """`loss_of_step` for `fit`: random windows, uniform timesteps, one in ten captions left out.

    Everything lies on the training device: moments [n, 2C, F, H, W] of window i, which is cut from clip
    clip_numbers[i], prompt_embeds [clips, L, D], null_embeds [1, L, D].
    """
    device = moments.device

    def loss_of_step(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator(device=device).manual_seed(seed * 1_000_003 + step)
        draw = {"generator": generator, "device": device}
        rows = torch.randint(len(moments), (batch_size,), **draw)
        chosen = moments[rows].float().transpose(1, 2)  # [B, F, 2C, H, W]
        frames, channels, *size = chosen.shape[1:]
        sampling_noise = torch.randn(batch_size, frames, channels // 2, *size, **draw)
        latents = sample_posterior(chosen, sampling_noise) * scaling_factor  # [B, F, C, H, W]
        dropped = torch.rand(batch_size, **draw) < CAPTION_DROPOUT
        text = torch.where(dropped[:, None, None], null_embeds, prompt_embeds[clip_numbers[rows]])
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch_size,), **draw)
        noise = torch.randn(latents.shape, **draw)
        return v_loss(transformer, scheduler, latents, text, timesteps, noise, autocast), {}

    return loss_of_step
