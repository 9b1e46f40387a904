"""Stage 3: every parameter learns to denoise a sliding window of rising noise, which streams without end.

Shapes: B batch · F latent frames, F = 1 + G·W · G noise groups · W frames per group · C latent channels ·
H W latent height/width · T train timesteps.
Source: Shift-Window Denoising Process Model, The Matrix, arXiv 2412.03568, section 3.3.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.cogvideox.control_adapter import LABELS, ControlVocabulary
from common.cogvideox.noise_schedule import CLEAN, group_size, group_timesteps, mix_noise
from common.cogvideox.pipeline_cogvideox import CogVideoXStreamingPipeline
from common.cogvideox.pipeline_io import write_pipeline
from common.cogvideox.scheduler import CogVideoXSwinDPMScheduler
from common.config.errors import SettingError
from common.training.cogvideox_objective import TRAIN_TIMESTEPS
from common.training.controlled_objective import StreamingObjective, StreamingSettings
from common.training.encoding import EncodedBatch
from common.training.random import SampleRandom


@dataclass
class SwinDPMSettings(StreamingSettings):
    """Settings of stage 3."""

    control_label: str = ""  # as in stage 2; "" keeps what the base was told
    condition_timestep: int = CLEAN  # noise level of the condition frame, in training and sampling; -1 is clean

    validation_guidance_scale: float = 6.0  # text guidance of the sample videos; 1 for none
    validation_control_guidance_scale: float = 3.0  # control guidance of the sample videos; 1 for none

    def validate(self) -> None:
        super().validate()
        if self.control_label not in ("", *LABELS):
            raise SettingError("control_label", f"{self.control_label!r} is not one of {', '.join(LABELS)}, or ''")
        if not -1 <= self.condition_timestep < TRAIN_TIMESTEPS:
            raise SettingError("condition_timestep", f"must be -1 (clean) or a timestep, got {self.condition_timestep}")
        groups, steps = self.num_noise_groups, self.validation_num_inference_steps
        if self.validation_prompts and steps % groups:
            right = f"{steps // groups * groups or groups} or {steps // groups * groups + groups}"
            raise SettingError(
                "validation_num_inference_steps",
                f"{steps} steps do not divide among {groups} noise groups; use {right}",
            )

    def build_objective(self) -> "SwinDPMObjective":
        return SwinDPMObjective(self)


class SwinDPMObjective(StreamingObjective):
    """v-prediction with noise rising from group to group behind a clean condition frame; all weights are trained."""

    base_pipeline = "CogVideoXControlPipeline"
    trains_base = True

    def make_module(self, transformer: nn.Module) -> nn.Module:
        return transformer.requires_grad_(True)

    def load_vocabulary(self) -> ControlVocabulary:
        vocabulary = super().load_vocabulary()
        vocabulary.label = self.settings.control_label or vocabulary.label
        return vocabulary

    def loss(self, batch: EncodedBatch, rng: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        # Some samples have one timestep for all frames and no condition, so that the same weights can start a stream
        # from text alone. Half of them begin a clip, as a stream does; the others are what self-rollout's teacher sees.
        is_uniform = rng.bernoulli(self.settings.uniform_timestep_share)  # [B]
        batch = self.cut_window(batch, rng, is_uniform & rng.bernoulli(0.5))
        num_frames = batch.latents.shape[1]
        num_groups = self.settings.num_noise_groups
        offset = rng.randint(0, self.num_train_timesteps // num_groups)  # [B]
        groups = group_timesteps(offset, num_frames, num_groups, self.num_train_timesteps)  # [B,F], frame 0 at 0
        uniform = rng.randint(0, self.num_train_timesteps)[:, None]  # [B,1]
        timesteps = torch.where(is_uniform[:, None], uniform, groups)
        is_condition = ~is_uniform[:, None] & (torch.arange(num_frames, device=timesteps.device) == 0)  # [B,F]

        rows, noise = self.control_embeds(batch, rng), rng.normal(batch.latents.shape[1:])  # [B,F,C,H,W]
        seen, noise = self.offset(batch.latents, noise, is_condition, rng)
        error = self._velocity_error(batch, seen, noise, timesteps, is_condition, rows)
        learnt = (~is_condition).float()
        return ((error * learnt).sum(dim=1) / learnt.sum(dim=1)).mean(), {}

    def validation_loss(self, batch: EncodedBatch, rng: SampleRandom) -> dict[str, Tensor]:
        """At the middle of the noise range, per group and in all."""
        num_groups = self.settings.num_noise_groups
        batch = self.cut_window(batch, None)
        num_frames = batch.latents.shape[1]
        width, span = group_size(num_frames, num_groups), self.num_train_timesteps // num_groups
        levels = torch.arange(num_groups, device=self.device) * span + span // 2  # [G]
        timesteps = torch.cat([levels.new_zeros(1), levels.repeat_interleave(width)]).expand(len(batch), -1)
        is_condition = (torch.arange(num_frames, device=self.device) == 0).expand_as(timesteps)
        rows = self.vocabulary.frame_rows(batch.control_indices)
        noise = rng.normal(batch.latents.shape[1:])
        error = self._velocity_error(batch, batch.latents, noise, timesteps, is_condition, rows)[:, 1:]  # [B,G·W]
        by_group = error.unflatten(1, (num_groups, width)).mean(dim=(0, 2))
        return {"loss": error.mean(), **{f"loss_group{g}": loss for g, loss in enumerate(by_group)}}

    def _velocity_error(
        self, batch: EncodedBatch, seen: Tensor, noise: Tensor, timesteps: Tensor, is_condition: Tensor, rows: Tensor
    ) -> Tensor:
        """Error of v per frame [B,F] where the latents that are noised are `seen`; that of conditions means nothing."""
        levels = torch.where(is_condition, self.settings.condition_timestep, timesteps)
        told = levels.clamp(min=0)  # the model knows no timestep -1: clean is told as 0
        noisy = mix_noise(seen, noise, levels, self.alphas)
        prediction = self.predict(self.module, noisy, told, batch.prompt_embeds, rows)
        return self.velocity_error(prediction, batch.latents, noise, told)

    def export(self, output_dir: Path) -> None:
        parts = {
            "transformer": self.plain_module,
            "scheduler": self.streaming_scheduler(),
            "control_vocabulary": self.vocabulary,
        }
        write_pipeline(output_dir, self.base_dir, "CogVideoXStreamingPipeline", parts)

    def streaming_scheduler(self) -> CogVideoXSwinDPMScheduler:
        return CogVideoXSwinDPMScheduler.from_config(
            self.scheduler.config,
            num_noise_groups=self.settings.num_noise_groups,
            frames_per_group=self.settings.frames_per_group(),
            condition_timestep=self.settings.condition_timestep,
        )

    def sample(self, prompt: str, control: list[str] | None, seed: int) -> np.ndarray:
        pipeline = CogVideoXStreamingPipeline(
            **{**self.components(self.plain_module), "scheduler": self.streaming_scheduler()}
        )
        settings = self.settings
        return self.sample_stream(
            pipeline,
            prompt,
            control,
            seed,
            num_inference_steps=settings.validation_num_inference_steps,
            guidance_scale=settings.validation_guidance_scale,
            control_guidance_scale=settings.validation_control_guidance_scale,
        )
