"""From a batch of the data loader to what the transformer is trained on.

Shapes: B batch · F latent frames · N raw frames, N = 4(F−1)+1 · C latent channels · H W latent height/width
(pixels: 8H×8W) · L text tokens · D text width.

A batch holds either uint8 pixels and captions, or the cached posterior moments and prompt embeddings of the same clips.
Clips and captions are encoded one at a time: memory is that of one clip, and no number depends on which others
share the batch, so training on the cache equals training without it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.cogvideox.autoencoder import use_fast_layers
from common.training.random import SampleRandom


@dataclass
class EncodedBatch:
    """What an objective's loss is computed from."""

    latents: Tensor  # float32 [B, F, C, H, W], multiplied by vae.config.scaling_factor
    prompt_embeds: Tensor  # [B, L, D] in the compute dtype
    control_indices: Tensor | None  # int64 [B, F, 4]: rows of the control vocabulary, of 4 raw frames a latent one
    sample_ids: list[str]

    def __len__(self) -> int:
        return self.latents.shape[0]

    def to(self, device: torch.device | str) -> "EncodedBatch":
        control = None if self.control_indices is None else self.control_indices.to(device)
        return EncodedBatch(self.latents.to(device), self.prompt_embeds.to(device), control, self.sample_ids)


@torch.no_grad()
def encode_moments(vae: nn.Module, pixel_values: Tensor) -> Tensor:
    """Mean and log-variance of the VAE's posterior for uint8 clips [B, N, 3, 8H, 8W]: float32 [B, F, 2C, H, W]."""
    weight = next(use_fast_layers(vae).parameters())
    moments = []
    for clip in pixel_values:  # [N, 3, h, w]
        video = clip.to(weight.device).to(weight.dtype).div(127.5).sub(1.0).movedim(0, 1)[None]  # [1, 3, N, h, w]
        parameters = vae.encode(video).latent_dist.parameters  # [1, 2C, F, H, W]
        moments.append(parameters[0].movedim(1, 0).float())
    return torch.stack(moments)


@torch.no_grad()
def encode_prompts(tokenizer: Any, text_encoder: nn.Module, captions: list[str], max_length: int) -> Tensor:
    """T5 features [B, L, D] of the captions padded or cut to `max_length` tokens, as CogVideoX's pipelines make them
    (padding is attended to; no mask is given)."""
    device = next(text_encoder.parameters()).device
    embeds = []
    for caption in captions:
        tokens = tokenizer(
            caption,
            padding="max_length",
            max_length=max_length,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        embeds.append(text_encoder(tokens.input_ids.to(device))[0][0])
    return torch.stack(embeds)


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """Draws latents from the posterior: moments [B, F, 2C, H, W], noise [B, F, C, H, W] → [B, F, C, H, W].

    Clamped like diffusers' DiagonalGaussianDistribution.
    """
    mean, log_variance = moments.chunk(2, dim=2)
    return mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise


class LatentEncoder:
    """Encodes either form of batch, draws the latents and drops captions.

    Args:
        vae, tokenizer, text_encoder: frozen components. A VAE that waits on the CPU (a run on a latent cache may never
            need it) goes to `device` with the first batch of videos.
        max_sequence_length: text tokens L.
        caption_dropout: share of samples whose caption is replaced by "" in training, for classifier-free guidance.
        device, dtype: where the encoded batch goes, and the compute dtype of its prompt embeddings.
    """

    def __init__(
        self,
        vae: nn.Module,
        tokenizer: Any,
        text_encoder: nn.Module,
        *,
        max_sequence_length: int,
        caption_dropout: float,
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        self.vae, self.tokenizer, self.text_encoder = vae, tokenizer, text_encoder
        self.max_sequence_length, self.caption_dropout = max_sequence_length, caption_dropout
        self.device, self.dtype = torch.device(device), dtype
        self._kept: dict[str, Tensor] = {}

    def keep_only(self, prompts: list[str], reload: Callable[[], nn.Module]) -> None:
        """Encodes these prompts and "", and lets go of the text encoder; for another prompt `reload` brings it back."""
        self._kept |= {prompt: self.encode_prompts([prompt])[0] for prompt in ["", *prompts]}
        self.text_encoder, self._reload = None, reload

    @property
    def empty_prompt(self) -> Tensor:
        """The embedding [L, D] of "", encoded once."""
        if "" not in self._kept:
            self._kept[""] = self.encode_prompts([""])[0]
        return self._kept[""]

    def encode_prompts(self, captions: list[str]) -> Tensor:
        """T5 features [B, L, D], on the device and in the type of the encoded batch."""
        if self.text_encoder is None:
            if all(caption in self._kept for caption in captions):
                return torch.stack([self._kept[caption] for caption in captions])
            self.text_encoder = self._reload()
        embeds = encode_prompts(self.tokenizer, self.text_encoder, captions, self.max_sequence_length)
        return embeds.to(self.device, self.dtype)

    @torch.no_grad()
    def encode(self, batch: dict[str, Any], rng: SampleRandom, training: bool = True) -> EncodedBatch:
        """Draws first the posterior's noise, then the caption dropout, whichever form the batch has.

        With `training=False` captions are kept; the draws are made all the same.
        """
        if "latent_moments" in batch:
            moments = batch["latent_moments"].to(self.device, torch.float32, non_blocking=True)
            prompt_embeds = batch["prompt_embeds"].to(self.device, self.dtype, non_blocking=True)
        else:
            moments = encode_moments(self.vae.to(self.device), batch["pixel_values"])
            prompt_embeds = self.encode_prompts(batch["captions"])

        frames, channels, height, width = moments.shape[1:]
        noise = rng.normal((frames, channels // 2, height, width)).to(self.device)
        latents = sample_posterior(moments, noise) * self.vae.config.scaling_factor

        dropped = rng.bernoulli(self.caption_dropout).to(self.device)  # bool [B]
        if training and self.caption_dropout > 0:
            # torch.where and not an index, which would wait for the device
            prompt_embeds = torch.where(dropped[:, None, None], self.empty_prompt, prompt_embeds)

        control = batch.get("control_indices")
        if control is not None:
            control = control.to(self.device, non_blocking=True)
        return EncodedBatch(latents, prompt_embeds, control, list(batch["sample_ids"]))
