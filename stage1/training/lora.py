"""Stage 1: a LoRA, by default on the attention projections, teaches the base model how the game world looks.

Shapes: B batch · F latent frames · C latent channels · H W latent height/width.
Source: LoRA, arXiv 2106.09685; The Matrix, arXiv 2412.03568.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import CogVideoXPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from common.cogvideox.noise_schedule import mix_noise
from common.cogvideox.pipeline_io import LORA_NAME
from common.config.errors import SettingError
from common.training.cogvideox_objective import VALIDATION_TIMESTEPS, CogVideoXObjective
from common.training.encoding import EncodedBatch
from common.training.lora import SettingsWithLora, add_lora_factors
from common.training.random import SampleRandom


@dataclass
class LoraSettings(SettingsWithLora):
    """Settings of stage 1."""

    rank: int = 256
    lora_alpha: float = 256.0
    validation_guidance_scale: float = 6.0  # text guidance of the sample videos; 1 for none

    def validate(self) -> None:
        super().validate()
        if self.rank == 0:
            raise SettingError("rank", "must be 1 or more in stage 1, which trains nothing else, got 0")

    def build_objective(self) -> "LoraObjective":
        return LoraObjective(self)


class LoraObjective(CogVideoXObjective):
    """v-prediction with one timestep a sample, drawn uniformly; only the LoRA is trained."""

    base_pipeline = "CogVideoXPipeline"

    def make_module(self, transformer: nn.Module) -> nn.Module:
        add_lora_factors(transformer, self.settings)
        return transformer

    def loss(self, batch: EncodedBatch, rng: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        timesteps = rng.randint(0, self.num_train_timesteps)  # [B]
        return self._velocity_error(batch, timesteps, rng), {}

    def validation_loss(self, batch: EncodedBatch, rng: SampleRandom) -> dict[str, Tensor]:
        losses = {}
        for t in VALIDATION_TIMESTEPS:
            timesteps = torch.full((len(batch),), t, device=batch.latents.device)
            losses[f"loss_t{t}"] = self._velocity_error(batch, timesteps, rng)
        return {"loss": torch.stack(list(losses.values())).mean(), **losses}

    def _velocity_error(self, batch: EncodedBatch, timesteps: Tensor, rng: SampleRandom) -> Tensor:
        noise = rng.normal(batch.latents.shape[1:])  # [B,F,C,H,W]
        noisy = mix_noise(batch.latents, noise, timesteps, self.alphas)
        prediction = self.module(
            hidden_states=noisy.to(self.weight_dtype),
            encoder_hidden_states=batch.prompt_embeds,
            timestep=timesteps,
            image_rotary_emb=self.rotary_embedding(batch.latents),
            return_dict=False,
        )[0]
        return self.velocity_error(prediction, batch.latents, noise, timesteps).mean()

    def export(self, output_dir: Path) -> None:
        """`pytorch_lora_weights.safetensors`, with rank and alpha in its metadata: diffusers loads it as trained.

        Written beside and renamed, so that a killed run leaves no half of it.
        """
        transformer, partial = self.plain_module, output_dir / f".{LORA_NAME}.tmp"
        CogVideoXPipeline.save_lora_weights(
            partial,
            transformer_lora_layers=get_peft_model_state_dict(transformer),
            **_collate_lora_metadata({"transformer": transformer}),
        )
        (partial / LORA_NAME).replace(output_dir / LORA_NAME)
        partial.rmdir()

    def sample(self, prompt: str, control: list[str] | None, seed: int) -> np.ndarray:
        pipeline = CogVideoXPipeline(**self.components(self.plain_module))
        return self.sample_clip(pipeline, prompt, seed, guidance_scale=self.settings.validation_guidance_scale)
