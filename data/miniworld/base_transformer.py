"""The mini base model's text-to-video transformer: a plain CogVideoXTransformer3DModel trained on cached latents.

Shapes: B batch, F latent frames, C latent channels, H W latent height and width, L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch import Tensor

from common.cogvideox.autoencoder import latent_form
from common.cogvideox.model_sizes import SIZES
from common.cogvideox.noise_schedule import mix_noise, velocity
from common.training.encoding import sample_posterior
from data.miniworld.base_text import MAX_TEXT_LENGTH, TEXT_DIM
from data.miniworld.base_training import Batch

CAPTION_DROPOUT = 0.1


def make_transformer(
    vae: AutoencoderKLCogVideoX, num_frames: int, patch_size: int, num_layers: int, num_heads: int, rotary: bool
) -> CogVideoXTransformer3DModel:
    """An untrained transformer for the VAE's latents of videos of num_frames raw frames; heads are 64 wide.

    rotary: with the rotary positions of CogVideoX-5B instead of 2B's sinusoids.

    As in DiT (arXiv 2212.09748, section 3.2) every block starts as the identity and the output as zero; with PyTorch's
    own initialisation long runs were not stable.
    """
    config, scale = vae.config, latent_form(vae)[1]
    given = {
        "num_attention_heads": num_heads,
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "text_embed_dim": TEXT_DIM,
        "num_layers": num_layers,
        "sample_height": config.sample_height // scale,
        "sample_width": config.sample_width // scale,
        "sample_frames": num_frames,
        "patch_size": patch_size,
        "max_text_seq_length": MAX_TEXT_LENGTH,
        "use_rotary_positional_embeddings": rotary,
    }
    transformer = CogVideoXTransformer3DModel(**{**SIZES["mini"].transformer, **given})
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            for norm in (block.norm1, block.norm2):
                norm.linear.weight.zero_()
                norm.linear.bias.zero_()
        for linear in (transformer.norm_out.linear, transformer.proj_out):
            linear.weight.zero_()
            linear.bias.zero_()
    return transformer


def v_loss(
    transformer: CogVideoXTransformer3DModel,
    rotary: tuple[Tensor, Tensor] | None,
    alphas: Tensor,
    autocast: Callable[[], torch.autocast],
    batch: Batch,
) -> Tensor:
    """Mean squared error of the predicted velocity.

    `batch` holds latents and noise [B, F, C, H, W], prompt_embeds [B, L, D], timesteps int64 [B]; `alphas` is ᾱ [T],
    `rotary` what `rotary_positional_embeddings` gives.
    """
    latents, noise, timesteps = batch["latents"], batch["noise"], batch["timesteps"]
    noisy = mix_noise(latents, noise, timesteps, alphas)
    with autocast():
        prediction = transformer(
            hidden_states=noisy,
            encoder_hidden_states=batch["prompt_embeds"],
            timestep=timesteps,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
    return (prediction.float() - velocity(latents, noise, timesteps, alphas)).square().mean()


@dataclass(frozen=True)
class LatentWindows:
    """Encoded training windows and their captions, all on the training device.

    `moments` [n, 2C, F, H, W] of window i, which is cut from clip `clip_numbers[i]`; `prompt_embeds` [clips, L, D];
    `null_embeds` [1, L, D] of the empty caption.
    """

    moments: Tensor
    clip_numbers: Tensor
    prompt_embeds: Tensor
    null_embeds: Tensor
    scaling_factor: float

    def batches(self, batch_size: int, num_timesteps: int, seed: int) -> Callable[[int, float], Batch]:
        """`batch_of_step` for `fit`: random windows, uniform timesteps, one in ten captions left out."""
        device = self.moments.device

        def batch_of_step(step: int, progress: float) -> Batch:
            generator = torch.Generator(device=device).manual_seed(seed * 1_000_003 + step)
            draw = {"generator": generator, "device": device}
            rows = torch.randint(len(self.moments), (batch_size,), **draw)
            chosen = self.moments[rows].float().transpose(1, 2)  # [B, F, 2C, H, W]
            frames, channels, *size = chosen.shape[1:]
            sampling_noise = torch.randn(batch_size, frames, channels // 2, *size, **draw)
            latents = sample_posterior(chosen, sampling_noise) * self.scaling_factor  # [B, F, C, H, W]
            dropped = torch.rand(batch_size, **draw) < CAPTION_DROPOUT
            text = torch.where(dropped[:, None, None], self.null_embeds, self.prompt_embeds[self.clip_numbers[rows]])
            timesteps = torch.randint(num_timesteps, (batch_size,), **draw)
            noise = torch.randn(latents.shape, **draw)
            return {"latents": latents, "noise": noise, "timesteps": timesteps, "prompt_embeds": text}

        return batch_of_step
