"""The mini base model's video autoencoder: a small AutoencoderKLCogVideoX trained on the mini world's clips.

Most of the training sees single frames. The causal VAE treats one frame as a clip of length 1, so all of its spatial
weights learn there, from nine times as many different pictures for the same arithmetic; the temporal part then learns
from 9-frame clips in what is left. Shapes: B batch, N raw frames, h w pixels, F H W latent frames, height, width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from common.cogvideox.autoencoder import latent_form
from common.config.settings import VAE_TIME_FACTOR
from data.miniworld.base_training import Batch

BLOCK_CHANNELS = (16, 32, 32, 64)
LATENT_CHANNELS = 16
VIDEO_FRAMES = 9  # 3 latent frames: 1 + 2 · 4
GRADIENT_WEIGHT, KL_WEIGHT = 0.5, 1e-4


def make_vae(
    height: int, width: int, block_channels: tuple[int, ...] = BLOCK_CHANNELS, latent_channels: int = LATENT_CHANNELS
) -> AutoencoderKLCogVideoX:
    """An untrained VAE: 4 frames to a latent and 8 × 8 pixels, as the real one; 4 × 4 with three resolutions."""
    count = len(block_channels)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=block_channels,
        down_block_types=("CogVideoXDownBlock3D",) * count,
        up_block_types=("CogVideoXUpBlock3D",) * count,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        temporal_compression_ratio=VAE_TIME_FACTOR,
        sample_height=height,
        sample_width=width,
    )
    # Start with almost no noise on the latents (σ .05 instead of 1): otherwise the first hundreds of steps go into
    # making the signal heard over it, and weak parts of it, such as colour, come last. Worth 1 dB after a hundred
    # steps.
    with torch.no_grad():
        vae.encoder.conv_out.conv.bias[latent_channels:] = -6.0
    return vae


@dataclass(frozen=True)
class Windows:
    """Random windows of the clips; which ones is a function of the seed and a number, of nothing else."""

    clips: list[Tensor]  # uint8 [n, 3, h, w] each, all on one device
    seed: int

    def choose(self, key: list[int], num_frames: int) -> tuple[int, int]:
        """A clip's number and the first frame of a window in it."""
        rng = np.random.default_rng([self.seed, *key])
        clip = int(rng.integers(len(self.clips)))
        return clip, int(rng.integers(len(self.clips[clip]) - num_frames + 1))

    def stack(self, chosen: list[tuple[int, int]], num_frames: int) -> Tensor:
        """uint8 [B, N, 3, h, w]."""
        return torch.stack([self.clips[clip][start : start + num_frames] for clip, start in chosen])


def to_signal(pixels: Tensor) -> Tensor:
    """uint8 [B, N, 3, h, w] → float32 [B, 3, N, h, w] in −1…1."""
    return pixels.transpose(1, 2).float() / 127.5 - 1


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 of the pixels [B, 3, N, h, w] plus half the L1 of their differences along rows, columns and frames: edges stay
    sharp, and what moves keeps moving."""
    loss = (output - target).abs().mean()
    for dim in (-1, -2, -3) if target.shape[-3] > 1 else (-1, -2):
        loss = loss + GRADIENT_WEIGHT * (output.diff(dim=dim) - target.diff(dim=dim)).abs().mean()
    return loss


def vae_batches(
    vae: AutoencoderKLCogVideoX, windows: Windows, image_share: float, batch_size: int, image_batch_size: int
) -> Callable[[int, float], Batch]:
    """`batch_of_step` for `fit`: single frames while progress < image_share, then clips of VIDEO_FRAMES frames.

    A batch is uint8 "pixels" [B, N, 3, h, w] and the posterior's "noise" [B, C, F, H, W].
    """
    channels, scale = latent_form(vae)

    def batch_of_step(step: int, progress: float) -> Batch:
        images = progress < image_share
        count, num_frames = (image_batch_size, 1) if images else (batch_size, VIDEO_FRAMES)
        pixels = windows.stack([windows.choose([1, step, i], num_frames) for i in range(count)], num_frames)
        height, width = pixels.shape[-2:]
        generator = torch.Generator(device=pixels.device).manual_seed(windows.seed * 1_000_003 + step)
        shape = (count, channels, (num_frames - 1) // VAE_TIME_FACTOR + 1, height // scale, width // scale)
        return {"pixels": pixels, "noise": torch.randn(shape, generator=generator, device=pixels.device)}

    return batch_of_step


def vae_loss(vae: AutoencoderKLCogVideoX, autocast: Callable[[], torch.autocast], batch: Batch) -> Tensor:
    """Reconstruction plus KL of a batch of `vae_batches`."""
    target = to_signal(batch["pixels"])
    with autocast():
        posterior = vae.encode(target).latent_dist
        output = vae.decode(posterior.mean + posterior.std * batch["noise"]).sample
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()  # per latent number
    return reconstruction_loss(output.float(), target) + KL_WEIGHT * kl


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKLCogVideoX, clips: list[Tensor], num_frames: int = 33) -> float:
    """Mean PSNR in dB (peak 255) of windows reconstructed from the posterior's mean, in diffusers' own chunks."""
    vae.eval()
    values = []
    for clip in clips:
        count = (min(num_frames, len(clip)) - 1) // VAE_TIME_FACTOR * VAE_TIME_FACTOR + 1
        target = to_signal(clip[None, :count].to(vae.device))
        output = vae.decode(vae.encode(target).latent_dist.mode()).sample.clamp(-1, 1)
        error = ((output - target) * 127.5).square().mean()
        values.append((20 * np.log10(255) - 10 * torch.log10(error)).item())
    return float(np.mean(values))


@torch.no_grad()
def encode_windows(
    vae: AutoencoderKLCogVideoX, windows: Windows, count: int, num_frames: int, progress: Callable[[int], object]
) -> tuple[Tensor, Tensor]:
    """Posterior moments (mean‖logvar) of `count` random windows: float16 [count, 2C, F, H, W], and the clip of each.

    Both on the CPU. The posterior is sampled afresh at each use.
    """
    vae.eval()
    chosen = [windows.choose([2, i], num_frames) for i in range(count)]
    moments = []
    # Two at a time and more: with one, PyTorch leaves oneDNN's convolution for one several times slower on one thread.
    at_once = 4 if vae.device.type == "cpu" else 48
    for first in range(0, count, at_once):
        part = chosen[first : first + at_once]
        moments.append(vae.encode(to_signal(windows.stack(part, num_frames))).latent_dist.parameters.half().cpu())
        progress(len(part))
    return torch.cat(moments), torch.tensor([clip for clip, _ in chosen])


def measured_scaling_factor(moments: Tensor) -> float:
    """1 / standard deviation of sampled latents, from moments [n, 2C, F, H, W]: the transformer sees unit variance."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    return float((mean.var() + log_variance.exp().mean()).rsqrt())
