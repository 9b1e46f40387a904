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
from torch import Tensor, nn

from common.cogvideox.autoencoder_layers import FASTER_CLASSES, CogVideoXStreamingUpsample3D, swap_classes


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


STREAMING_CLASSES = {CogVideoXUpBlock3D: CogVideoXStreamingUpBlock3D, CogVideoXUpsample3D: CogVideoXStreamingUpsample3D}


def use_fast_layers(vae: AutoencoderKLCogVideoX) -> AutoencoderKLCogVideoX:
    """Gives encoder and decoder of a plain diffusers VAE the faster classes of autoencoder_layers.py, in place.

    Weights, keys, config and the VAE's own class stay as they are, so what is saved is a plain diffusers VAE. Results
    differ by float32 rounding at most. Idempotent, and cheap enough to be called before every use.
    """
    swap_classes(vae, FASTER_CLASSES)
    return vae


def make_streamable(vae: AutoencoderKLCogVideoX) -> AutoencoderKLCogVideoX:
    """`use_fast_layers`, and a decoder that takes chunks of any length, in place; idempotent.

    Decoding changes only where diffusers returns a wrong number of frames.
    """
    swap_classes(use_fast_layers(vae).decoder, STREAMING_CLASSES)
    return vae


def to_levels(frames: Tensor) -> Tensor:
    """[…,3,h,w] of [−1,1] → uint8 […,h,w,3], rounded and transposed where `frames` live."""
    levels = ((frames.float() + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)
    return levels.movedim(-3, -1).contiguous()


def as_weights_lie(z: Tensor, decoder: nn.Module) -> Tensor:
    """[B,C,F,H,W] with channels last if the decoder's weights are so (`compile_decoder`)."""
    weight = decoder.conv_in.conv.weight
    is_last = weight.is_contiguous(memory_format=torch.channels_last_3d) and not weight.is_contiguous()
    return z.contiguous(memory_format=torch.channels_last_3d) if is_last else z


class PendingFrames:
    """Frames that a device may still be computing: uint8 [B,N,h,w,3] in host memory once `result` returns."""

    def __init__(self, levels: Tensor, done: torch.cuda.Event | None = None):
        self._levels, self._done = levels, done

    def result(self) -> np.ndarray:
        """Waits for the frames; [N,h,w,3] for a batch of one."""
        if self._done is not None:
            self._done.synchronize()
        frames = self._levels.numpy()
        return frames[0] if len(frames) == 1 else frames


class StreamingDecoder:
    """One stream's decoder: chunks of latents in, their frames out; what the next chunk needs is kept in here.

    The VAE itself keeps nothing, so any number of streams can share it, and a new stream starts fresh. The result
    equals decoding everything at once with the same chunking (GroupNorm takes its statistics over a chunk).

    Args:
        vae: a diffusers VAE, on any device; made streamable in place.
    """

    def __init__(self, vae: AutoencoderKLCogVideoX):
        self.vae = make_streamable(vae)
        self._conv_cache: dict | None = None
        self._stream = torch.cuda.Stream(vae.device) if vae.device.type == "cuda" else None

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The next chunk.

        Args:
            latents: [B,F,C,H,W] as the transformer makes them, that is scaled; any type, any F ≥ 1.

        Returns:
            [B,N,3,h,w], about [−1,1], in the VAE's type and on its device.
        """
        config, vae = self.vae.config, self.vae
        z = latents.to(vae.device, non_blocking=True).float() / config.scaling_factor
        z = z.to(vae.dtype).transpose(1, 2)  # [B,C,F,H,W]
        if vae.post_quant_conv is not None:
            z = vae.post_quant_conv(z)
        frames = []
        for piece in z.split(self._piece_lengths(z.shape[2]), dim=2):
            decoded, self._conv_cache = vae.decoder(as_weights_lie(piece, vae.decoder), conv_cache=self._conv_cache)
            frames.append(decoded)
        return torch.cat(frames, dim=2).transpose(1, 2)

    def submit(self, latents: Tensor) -> PendingFrames:
        """As `decode_uint8`, without waiting: a GPU decodes, rounds and copies to pinned memory beside whatever else it
        and others do."""
        if self._stream is None:
            return PendingFrames(to_levels(self.decode(latents)))
        if latents.is_cuda:
            self._stream.wait_stream(torch.cuda.current_stream(latents.device))
        if latents.device == self._stream.device:
            latents.record_stream(self._stream)  # its memory is not given to others before this stream has read it
        with torch.cuda.stream(self._stream):
            levels = to_levels(self.decode(latents))
            host = torch.empty(levels.shape, dtype=levels.dtype, pin_memory=True).copy_(levels, non_blocking=True)
            return PendingFrames(host, self._stream.record_event())

    def _piece_lengths(self, num_frames: int) -> list[int]:
        """Two latents at a time, as the VAE was trained to decode; the first of a stream takes the odd one as well."""
        first = min(2 + num_frames % 2, num_frames) if self._conv_cache is None else min(2, num_frames)
        rest = num_frames - first
        return [first, *[2] * (rest // 2), *[1] * (rest % 2)]

    def decode_uint8(self, latents: Tensor) -> np.ndarray:
        """As `decode`, → uint8 [N,h,w,3] for a batch of one, else [B,N,h,w,3]."""
        return self.submit(latents).result()


@torch.no_grad()
def encode_frames(vae: AutoencoderKLCogVideoX, frames: Tensor) -> Tensor:
    """A clip as scaled latents: the posterior's mean, whole clip at once.

    Args:
        frames: uint8 [B,N,3,h,w], N = 4·(F−1)+1.

    Returns:
        float32 [B,F,C,H,W] on the VAE's device.
    """
    pixels = (frames.to(vae.device).float() / 127.5 - 1).to(vae.dtype).transpose(1, 2)  # [B,3,N,h,w]
    posterior = use_fast_layers(vae).encode(pixels, return_dict=False)[0]
    return posterior.mode().transpose(1, 2).float() * vae.config.scaling_factor
