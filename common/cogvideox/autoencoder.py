"""Decoding a stream of latents: the causal VAE keeps its convolution cache from chunk to chunk.

diffusers decides from the parity of a chunk whether its first latent is the video's first (one frame) or an ordinary
one (four frames). That holds for its own chunks (3 or 1 first, 2 ever after) and fails for others: a later chunk of
one latent decodes to 1 frame instead of 4, a first chunk of two to 8 instead of 5. Here the cache tells: a chunk
without one is the first.

Shapes: B batch, F latent frames of a chunk, N raw frames (4·(F−1)+1 of a first chunk, 4·F of a later one), C latent
channels, H W latent height/width, h w pixels.
"""

import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXUpBlock3D
from diffusers.models.upsampling import CogVideoXUpsample3D
from torch import Tensor, nn

from common.cogvideox.autoencoder_layers import FASTER_CLASSES, CogVideoXStreamingUpsample3D, swap_classes
from common.cogvideox.chunk_decoder import ChunkDecoder


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


def latent_form(vae: AutoencoderKLCogVideoX) -> tuple[int, int]:
    """C, and how many pixels wide and high a latent is."""
    return vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)


def match_memory_format(z: Tensor, decoder: nn.Module) -> Tensor:
    """[B,C,F,H,W] with channels last if the decoder's weights are so (`compile_decoder`)."""
    weight = decoder.conv_in.conv.weight
    is_last = weight.is_contiguous(memory_format=torch.channels_last_3d) and not weight.is_contiguous()
    return z.contiguous(memory_format=torch.channels_last_3d) if is_last else z


class StreamingDecoder(ChunkDecoder):
    """The VAE's decoder for one stream, with its convolution cache.

    The VAE itself keeps nothing, so any number of streams can share it, and a new stream starts fresh. The result
    equals decoding everything at once with the same chunking (GroupNorm takes its statistics over a chunk).

    Args:
        vae: a diffusers VAE, on any device; made streamable in place.
    """

    def __init__(self, vae: AutoencoderKLCogVideoX):
        super().__init__(vae.device)
        self.vae = make_streamable(vae)
        self._conv_cache: dict | None = None

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        config, vae = self.vae.config, self.vae
        z = self.fetch(latents).float() / config.scaling_factor
        z = z.to(vae.dtype).transpose(1, 2)  # [B,C,F,H,W]
        if vae.post_quant_conv is not None:
            z = vae.post_quant_conv(z)
        frames = []
        for piece in z.split(self._piece_lengths(z.shape[2]), dim=2):
            decoded, self._conv_cache = vae.decoder(
                match_memory_format(piece, vae.decoder), conv_cache=self._conv_cache
            )
            frames.append(decoded)
        return torch.cat(frames, dim=2).transpose(1, 2)

    def _piece_lengths(self, num_frames: int) -> list[int]:
        """Two latents at a time, as the VAE was trained to decode; the first of a stream takes the odd one as well."""
        first = min(2 + num_frames % 2, num_frames) if self._conv_cache is None else min(2, num_frames)
        rest = num_frames - first
        return [first, *[2] * (rest // 2), *[1] * (rest % 2)]


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
