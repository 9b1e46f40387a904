"""Stage 2: the Interactive Module learns to obey a control signal per latent frame; all else is frozen, unless a LoRA
(`rank`) lets the base learn with it.

Shapes: B batch · F latent frames · C latent channels · H W latent height/width.
Source: The Matrix, arXiv 2412.03568, section 3.2.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.cogvideox.control_adapter import LABELS, NULL_INDEX, ControlVocabulary
from common.cogvideox.noise_schedule import mix_noise
from common.cogvideox.pipeline_cogvideox import CogVideoXControlPipeline
from common.cogvideox.pipeline_io import load_component, write_pipeline
from common.cogvideox.transformer import CONTROL_PREFIXES, CogVideoXControlTransformer3DModel
from common.config.errors import SettingError, UserError
from common.config.fields import PathSetting
from common.data.control_signals import CONTROL_TOKENS, read_sentences
from common.training.cogvideox_objective import VALIDATION_TIMESTEPS
from common.training.controlled_objective import ControlledObjective, ControlledSettings, check_validation_control
from common.training.encoding import EncodedBatch
from common.training.lora import SettingsWithLora, add_lora_factors, add_lora_products
from common.training.random import SampleRandom
from common.training.throughput import forward_operations

# What CLIP is told about each signal, unless `control_sentences_file` brings other sentences.
SENTENCES = {
    "D": "the car drives straight ahead",
    "DL": "the car drives ahead and turns left",
    "DR": "the car drives ahead and turns right",
    "B": "the car brakes and reverses straight back",
    "BL": "the car reverses and turns left",
    "BR": "the car reverses and turns right",
    "N": "the car coasts without any command",
    "NL": "the car coasts and turns left",
    "NR": "the car coasts and turns right",
}


@dataclass
class ControlSettings(SettingsWithLora, ControlledSettings):
    """Settings of stage 2. The published form has no LoRA (rank 0)."""

    control_dim: int = 768  # width of a signal's row; that of CLIP's text features if there is a text encoder
    control_start_layer: int = 15  # the first layer that a control block follows
    control_end_layer: int = 30  # one past the last
    control_attention: str = "frame_causal"  # or "token_causal", the published form
    control_temporal_position: bool = True  # keys of control attention carry their frame's position
    control_tokens_per_frame: int = 1  # control tokens of a latent frame; with one, the published form, a signal that
    # holds adds the same to the whole picture
    control_label: str = "mean"  # of a latent frame: the mean row of its four raw frames, or that of the "last"
    # CLIP directory or hub id; "" takes a fixed orthogonal table. A base that has an adapter brings its own vocabulary.
    control_text_encoder: PathSetting = ""
    control_sentences_file: PathSetting = ""  # JSON of signal → sentence for CLIP; "" takes this file's sentences
    validation_guidance_scale: float = 6.0  # text guidance of the sample videos; 1 for none
    validation_control_guidance_scale: float = 1.0  # control guidance of the sample videos; 1 for none

    def validate(self) -> None:
        super().validate()
        check_validation_control(self, self.frame_buckets[0] if self.validation_prompts else 1)
        if not 0 <= self.control_start_layer < self.control_end_layer:
            raise SettingError(
                "control_start_layer",
                f"{self.control_start_layer} must be below control_end_layer {self.control_end_layer}",
            )
        if self.control_attention not in ("frame_causal", "token_causal"):
            raise SettingError(
                "control_attention", f"{self.control_attention!r} is not one of 'frame_causal', 'token_causal'"
            )
        if self.control_tokens_per_frame < 1:
            raise SettingError("control_tokens_per_frame", f"must be 1 or more, got {self.control_tokens_per_frame}")
        if self.control_label not in LABELS:
            raise SettingError("control_label", f"{self.control_label!r} is not one of {', '.join(LABELS)}")

    def build_objective(self) -> "ControlObjective":
        return ControlObjective(self)


class ControlObjective(ControlledObjective):
    """Stage 1's loss, with a control signal; trained are the control adapter and, if there is one, the base's LoRA.

    The adapter is new, or that of an earlier stage 2 which the run starts from.
    """

    base_pipeline = ("CogVideoXPipeline", "CogVideoXControlPipeline")
    adds_to_base = True

    def load(self, device: torch.device, weight_dtype: torch.dtype) -> None:
        super().load(device, weight_dtype)
        rounded = self.module.control_parameters()[0].dtype != weight_dtype  # the base was, and is not what is trained
        if rounded and self.base_has_adapter(self.base_index):
            copy_adapter(load_component(self.base_dir, "transformer"), self.module)

    def base_has_adapter(self, index: dict[str, Any]) -> bool:
        """Whether the base, a directory with that index, was written by an earlier stage 2."""
        return index["_class_name"] == "CogVideoXControlPipeline"

    def check_base(self, base: Path, index: dict[str, Any], config: dict[str, Any]) -> None:
        """What the base has already cannot be set otherwise."""
        super().check_base(base, index, config)
        if not self.base_has_adapter(index):
            return
        label = ControlVocabulary.from_pretrained(base / "control_vocabulary").label
        of_base = {**config, "control_label": label}
        for name, value in {**self.adapter_config(), "control_label": self.settings.control_label}.items():
            if value != of_base[name]:
                raise SettingError(name, f"is {value!r}; {base} was trained with {of_base[name]!r}")

    def make_module(self, transformer: nn.Module) -> nn.Module:
        module = self.add_adapter(transformer).requires_grad_(False)
        if self.settings.rank:
            add_lora_factors(module, self.settings, within="transformer_blocks.")
        for parameter in module.control_parameters():
            parameter.requires_grad_(True)
        return module

    def add_adapter(self, transformer: nn.Module) -> CogVideoXControlTransformer3DModel:
        """The base's weights with a control adapter: its own, or a new one."""
        if isinstance(transformer, CogVideoXControlTransformer3DModel):
            return transformer
        settings = self.settings
        if not settings.control_text_encoder and settings.control_dim < len(CONTROL_TOKENS):
            raise SettingError(
                "control_dim",
                f"is {settings.control_dim}; {len(CONTROL_TOKENS)} orthogonal signals need as many or more",
            )
        try:
            return CogVideoXControlTransformer3DModel.from_transformer(transformer, **self.adapter_config())
        except ValueError as error:
            raise UserError(f"control_start_layer, control_end_layer: {error}") from error

    def adapter_config(self) -> dict[str, Any]:
        """The settings that are part of the transformer's config."""
        settings = self.settings
        return {
            "control_dim": settings.control_dim,
            "control_start_layer": settings.control_start_layer,
            "control_end_layer": settings.control_end_layer,
            "control_attention": settings.control_attention,
            "control_temporal_position": settings.control_temporal_position,
            "control_tokens_per_frame": settings.control_tokens_per_frame,
        }

    def load_vocabulary(self) -> ControlVocabulary:
        if self.base_has_adapter(self.base_index):
            return super().load_vocabulary()
        vocabulary = self.make_vocabulary()
        vocabulary.label = self.settings.control_label
        return vocabulary

    def make_vocabulary(self) -> ControlVocabulary:
        settings = self.settings
        if not settings.control_text_encoder:
            return ControlVocabulary.orthogonal(list(CONTROL_TOKENS), settings.control_dim)
        sentences = SENTENCES
        if settings.control_sentences_file:
            sentences = read_sentences(settings.control_sentences_file, "control_sentences_file")
        vocabulary = ControlVocabulary.from_clip(sentences, settings.control_text_encoder)
        if vocabulary.control_dim != settings.control_dim:
            raise SettingError(
                "control_dim",
                f"is {settings.control_dim}; {settings.control_text_encoder} makes {vocabulary.control_dim}",
            )
        return vocabulary

    def loss(self, batch: EncodedBatch, rng: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        timesteps = rng.randint(0, self.num_train_timesteps)  # [B]
        rows = self.control_embeds(batch, rng)
        return self._velocity_error(batch, timesteps, rows, rng.normal(batch.latents.shape[1:])), {}

    def validation_loss(self, batch: EncodedBatch, rng: SampleRandom) -> dict[str, Tensor]:
        """Also without control, at the same noise: what the signal is worth is the difference."""
        rows = self.vocabulary.frame_rows(batch.control_indices)
        null = self.vocabulary.frame_rows(torch.full_like(batch.control_indices, NULL_INDEX))
        losses, without = {}, []
        for t in VALIDATION_TIMESTEPS:
            timesteps = torch.full((len(batch),), t, device=self.device)
            noise = rng.normal(batch.latents.shape[1:])
            losses[f"loss_t{t}"] = self._velocity_error(batch, timesteps, rows, noise)
            without.append(self._velocity_error(batch, timesteps, null, noise))
        mean = torch.stack(list(losses.values())).mean()
        return {"loss": mean, "loss_without_control": torch.stack(without).mean(), **losses}

    def _velocity_error(self, batch: EncodedBatch, timesteps: Tensor, rows: Tensor, noise: Tensor) -> Tensor:
        noisy = mix_noise(batch.latents, noise, timesteps, self.alphas)
        prediction = self.predict(self.module, noisy, timesteps, batch.prompt_embeds, rows)
        return self.velocity_error(prediction, batch.latents, noise, timesteps).mean()

    def step_flops(self, batch: EncodedBatch) -> float:
        """Before the first control block, which follows its layer, nothing but a LoRA is trained: without one the
        backward ends there."""
        if self.settings.rank:
            return super().step_flops(batch)
        config = self.plain_module.config
        forward = forward_operations(config, batch.latents.shape, batch.prompt_embeds.shape[1])
        backward = forward.weights + 2 * forward.attention
        return super().step_flops(batch) - backward * (config.control_start_layer + 1) / config.num_layers

    def export(self, output_dir: Path) -> None:
        parts = {"transformer": self.exported(), "control_vocabulary": self.vocabulary}
        write_pipeline(output_dir, self.base_dir, "CogVideoXControlPipeline", parts)

    def exported(self) -> nn.Module:
        """The base, read once more since the one in use may be a rounded copy, with what was learnt: in float32."""
        transformer = self.add_adapter(load_component(self.base_dir, "transformer"))
        copy_adapter(self.plain_module, transformer)
        add_lora_products(transformer, self.plain_module)
        return transformer

    def sample(self, prompt: str, control: list[str] | None, seed: int) -> np.ndarray:
        return self.sample_clip(
            CogVideoXControlPipeline(**self.components(self.plain_module)),
            prompt,
            seed,
            control_signal=control,
            guidance_scale=self.settings.validation_guidance_scale,
            control_guidance_scale=self.settings.validation_control_guidance_scale,
        )


@torch.no_grad()
def copy_adapter(source: nn.Module, target: nn.Module) -> None:
    """Gives `target` the control adapter of `source`, in its own type and place."""
    for name, parameter in target.named_parameters():
        if name.startswith(CONTROL_PREFIXES):
            parameter.copy_(source.get_parameter(name))
