"""Decoding a stream of latents: the causal VAE keeps its convolution cache from chunk to chunk.

diffusers decides from the parity of a chunk whether its first latent is the video's first (one frame) or an ordinary
one (four frames). That holds for its own chunks (3 or 1 first, 2 ever after) and fails for others: a later chunk of
one latent decodes to 1 frame instead of 4, a first chunk of two to 8 instead of 5. Here the cache tells: a chunk
without one is the first.

Shapes: B batch, F latent frames of a chunk, N raw frames (4·(F−1)+1 of a first chunk, 4·F of a later one), C latent
channels, H W latent height/width, h w pixels.
"""

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXUpBlock3D
from diffusers.models.upsampling import CogVideoXUpsample3D
from torch import Tensor
from torch.nn import functional


class CogVideoXStreamingUpsample3D(CogVideoXUpsample3D):
    """`CogVideoXUpsample3D` that is told whether its input begins the video. The same parameters."""

    def forward(self, inputs: Tensor, is_first_chunk: bool = True) -> Tensor:
        """[B,D,t,h,w] → [B,D,t',2h,2w]; where time is compressed t' = 2t, or 2t−1 in the first chunk."""
        if not self.compress_time:
            return super().forward(inputs)
        num_single = 1 if is_first_chunk else 0  # leading frames that are not doubled in time
        single, doubled = inputs[:, :, :num_single], inputs[:, :, num_single:]
        parts = []
        if single.shape[2]:
            parts.append(functional.interpolate(single[:, :, 0], scale_factor=2.0)[:, :, None])
        if doubled.shape[2]:
            parts.append(functional.interpolate(doubled, scale_factor=2.0))
        upsampled = torch.cat(parts, dim=2)  # [B,D,t',2h,2w]
        num_frames = upsampled.shape[2]
        flat = upsampled.permute(0, 2, 1, 3, 4).flatten(0, 1)  # [B·t',D,2h,2w]
        return self.conv(flat).unflatten(0, (-1, num_frames)).permute(0, 2, 1, 3, 4)


class CogVideoXStreamingUpBlock3D(CogVideoXUpBlock3D):
    """`CogVideoXUpBlock3D` whose upsampler learns from the cache whether the chunk is the first."""

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor | None = None,
        zq: Tensor | None = None,
        conv_cache: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        is_first_chunk = not conv_cache
        cache, new_cache = conv_cache or {}, {}
        for i, resnet in enumerate(self.resnets):
            inputs = (hidden_states, temb, zq, cache.get(f"resnet_{i}"))
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states, new_cache[f"resnet_{i}"] = self._gradient_checkpointing_func(resnet, *inputs)
            else:
                hidden_states, new_cache[f"resnet_{i}"] = resnet(*inputs)
        for upsampler in self.upsamplers or ():
            hidden_states = upsampler(hidden_states, is_first_chunk)
        return hidden_states, new_cache


def make_streamable(vae: AutoencoderKLCogVideoX) -> AutoencoderKLCogVideoX:
    """Gives the decoder of a plain diffusers VAE the two classes above, in place; idempotent.

    Weights, keys, config and the VAE's own class stay as they are, so what is saved is a plain diffusers VAE. Decoding
    changes only where diffusers returns a wrong number of frames.
    """
    for block in vae.decoder.up_blocks:
        if type(block) is CogVideoXUpBlock3D:
            block.__class__ = CogVideoXStreamingUpBlock3D
            for upsampler in block.upsamplers or ():
                upsampler.__class__ = CogVideoXStreamingUpsample3D
    return vae


def to_uint8(frames: Tensor) -> np.ndarray:
    """[…,3,h,w] of [−1,1] → uint8 […,h,w,3] in host memory; rounded and transposed where `frames` live."""
    levels = ((frames.float() + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)
    return levels.movedim(-3, -1).contiguous().cpu().numpy()


def _without_pointwise(cache: dict) -> dict:
    """The cache without the entries of 1×1×1 convolutions: diffusers keeps their whole inputs and never reads them."""
    kept = {key: value for key, value in cache.items() if key not in ("conv_y", "conv_b")}
    return {key: _without_pointwise(value) if isinstance(value, dict) else value for key, value in kept.items()}


class StreamingDecoder:
    """One stream's decoder: chunks of latents in, their frames out; what the next chunk needs is kept in here.

    The VAE itself keeps nothing, so any number of streams can share it, and a new stream starts fresh. The result
    equals decoding everything at once with the same chunking (GroupNorm takes its statistics over a chunk).

    Args:
        vae: a diffusers VAE; made streamable in place.
    """

    def __init__(self, vae: AutoencoderKLCogVideoX):
        self.vae = make_streamable(vae)
        self._conv_cache: dict | None = None

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The next chunk.

        Args:
            latents: [B,F,C,H,W] as the transformer makes them, that is scaled; any type, any F ≥ 1.

        Returns:
            float32 [B,N,3,h,w], about [−1,1].
        """
        config, dtype = self.vae.config, self.vae.dtype
        z = (latents.float() / config.scaling_factor).to(dtype).transpose(1, 2)  # [B,C,F,H,W]
        if self.vae.post_quant_conv is not None:
            z = self.vae.post_quant_conv(z)
        frames = []
        for piece in z.split(self._piece_lengths(z.shape[2]), dim=2):
            decoded, cache = self.vae.decoder(piece, conv_cache=self._conv_cache)
            self._conv_cache = _without_pointwise(cache)
            frames.append(decoded)
        return torch.cat(frames, dim=2).transpose(1, 2).float()

    def _piece_lengths(self, num_frames: int) -> list[int]:
        """Two latents at a time, as the VAE was trained to decode; the first of a stream takes the odd one as well."""
        first = min(2 + num_frames % 2, num_frames) if self._conv_cache is None else min(2, num_frames)
        rest = num_frames - first
        return [first, *[2] * (rest // 2), *[1] * (rest % 2)]

    def decode_uint8(self, latents: Tensor) -> np.ndarray:
        """As `decode`, → uint8 [N,h,w,3] for a batch of one, else [B,N,h,w,3]."""
        frames = to_uint8(self.decode(latents))
        return frames[0] if len(frames) == 1 else frames


@torch.no_grad()
def encode_frames(vae: AutoencoderKLCogVideoX, frames: Tensor) -> Tensor:
    """A clip as scaled latents: the posterior's mean, whole clip at once.

    Args:
        frames: uint8 [B,N,3,h,w], N = 4·(F−1)+1.

    Returns:
        float32 [B,F,C,H,W] on the VAE's device.
    """
    pixels = (frames.to(vae.device).float() / 127.5 - 1).to(vae.dtype).transpose(1, 2)  # [B,3,N,h,w]
    posterior = vae.encode(pixels, return_dict=False)[0]
    return posterior.mode().transpose(1, 2).float() * vae.config.scaling_factor
