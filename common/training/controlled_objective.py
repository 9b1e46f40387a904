"""What the objectives of stages 2 to 4 share, and the window settings of stages 3 and 4.

Shapes: B batch · F latent frames, F = 1 + G·W · G noise groups · W frames per group · C latent channels ·
H W latent height/width · N raw frames.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.cogvideox.control_adapter import NULL_INDEX, ControlVocabulary
from common.cogvideox.pipeline_io import load_component
from common.cogvideox.transformer import CogVideoXControlTransformer3DModel
from common.config.errors import SettingError, UserError
from common.config.settings import VAE_TIME_FACTOR, TrainingSettings
from common.data.control_signals import CONTROL_TOKENS, parse_control_string
from common.training.cogvideox_objective import TRAIN_TIMESTEPS, CogVideoXObjective
from common.training.encoding import EncodedBatch
from common.training.random import SampleRandom

OFFSET_GRID = (3, 4)  # points of the offset noise over the picture's height and width


def check_validation_control(settings: TrainingSettings, num_raw_frames: int = 1) -> None:
    """SettingError unless `validation_control` is empty or a control string of at least `num_raw_frames` frames."""
    if not settings.validation_control:
        return
    try:
        control = parse_control_string(settings.validation_control)
    except UserError as error:
        raise SettingError("validation_control", str(error)) from error
    if len(control) < num_raw_frames:
        raise SettingError(
            "validation_control",
            f"{settings.validation_control!r} covers {len(control)} raw frames, the sample videos have "
            f"{num_raw_frames} (frame_buckets' first); hold a signal longer",
        )


@dataclass
class ControlledSettings(TrainingSettings):
    """Settings of the stages that obey control signals."""

    control_dropout: float = 0.1  # share of samples whose whole signal is replaced by the null row, for guidance

    def validate(self) -> None:
        super().validate()
        if not 0 <= self.control_dropout <= 1:
            raise SettingError("control_dropout", f"must lie between 0 and 1, got {self.control_dropout}")


@dataclass
class StreamingSettings(ControlledSettings):
    """Settings of the stages that train on a sliding window."""

    num_noise_groups: int = 4  # G: a window is one condition frame and G groups of rising noise
    window_frames: list[int] = field(default_factory=list)  # raw frames of a window, one length drawn a step; each
    # window is cut at a random latent offset of its clip. [] takes whole clips
    uniform_timestep_share: float = 0.2  # share of samples with one timestep for all frames: a stream's start
    offset_noise: float = 0.0  # strength of a smooth deviation of condition and noise that training undoes, so that
    # a stream's own deviations are not copied from shift to shift; in stage 4 of use behind a stage 3 trained with it

    def validate(self) -> None:
        super().validate()
        if self.num_noise_groups < 1 or TRAIN_TIMESTEPS % self.num_noise_groups:
            raise SettingError(
                "num_noise_groups",
                f"{self.num_noise_groups} does not divide the {TRAIN_TIMESTEPS} timesteps; use 1, 2, 4, 5, 8 or 10",
            )
        check_validation_control(self)
        if self.offset_noise < 0:
            raise SettingError("offset_noise", f"must be 0 or more, got {self.offset_noise}")
        if not 0 <= self.uniform_timestep_share <= 1:
            raise SettingError("uniform_timestep_share", f"must lie between 0 and 1, got {self.uniform_timestep_share}")
        for frames in self.window_sizes():
            self.check_window("window_frames" if self.window_frames else "frame_buckets", frames)
        for frames in self.window_frames:
            if frames > min(self.frame_buckets):
                raise SettingError(
                    "window_frames", f"{frames} is more than frame_buckets' shortest, {min(self.frame_buckets)}"
                )

    def check_window(self, setting: str, num_raw_frames: int) -> None:
        """Refuses raw frames whose latent frames are not 1 + G·W."""
        groups, latent_frames = self.num_noise_groups, (num_raw_frames - 1) // VAE_TIME_FACTOR + 1
        if (num_raw_frames - 1) % VAE_TIME_FACTOR or (latent_frames - 1) % groups or latent_frames < 1 + groups:
            step = VAE_TIME_FACTOR * groups
            below = max((num_raw_frames - 1) // step, 1) * step + 1
            raise SettingError(
                setting,
                f"{num_raw_frames} frames do not make a condition frame and {groups} equal groups of latent frames; "
                f"use {below} or {below + step}",
            )

    def window_sizes(self) -> list[int]:
        """Raw frames of a window: `window_frames`, or whole clips."""
        return self.window_frames or self.frame_buckets

    def frames_per_group(self) -> int:
        """W of the longest window: what the exported scheduler streams with unless told otherwise."""
        return (max(self.window_sizes()) - 1) // VAE_TIME_FACTOR // self.num_noise_groups


class ControlledObjective(CogVideoXObjective):
    """A control signal per latent frame, dropped now and then for guidance.

    Attributes:
        vocabulary: what the signals are; set by `load`.
    """

    needs_control = True
    vocabulary: ControlVocabulary

    def load(self, device: torch.device, weight_dtype: torch.dtype) -> None:
        super().load(device, weight_dtype)
        self.vocabulary = self.load_vocabulary()
        if self.vocabulary.names != list(CONTROL_TOKENS):
            raise UserError(
                f"{self.base_dir} obeys {', '.join(self.vocabulary.names)}; the data's signals are "
                f"{', '.join(CONTROL_TOKENS)}"
            )

    def check_base(self, base: Path, index: dict[str, Any], config: dict[str, Any]) -> None:
        super().check_base(base, index, config)
        if index["_class_name"] != "CogVideoXPipeline" and not (base / "control_vocabulary").is_dir():
            raise UserError(f"{base} is incomplete: the component 'control_vocabulary' is missing; stage 2 writes it")

    def load_vocabulary(self) -> ControlVocabulary:
        return load_component(self.base_dir, "control_vocabulary")

    def components(self, transformer: nn.Module) -> dict[str, Any]:
        return {**super().components(transformer), "control_vocabulary": self.vocabulary}

    def control_embeds(self, batch: EncodedBatch, rng: SampleRandom) -> Tensor:
        """What the signals are told as [B,F,control_dim]; a whole sequence becomes the null row with `control_dropout`.

        Drawn independently of caption dropout, so that sampling can guide on text, on control, or on both.
        """
        dropped = rng.bernoulli(self.settings.control_dropout).to(self.device)  # bool [B]
        return self.vocabulary.frame_rows(torch.where(dropped[:, None, None], NULL_INDEX, batch.control_indices))

    def predict(
        self, module: nn.Module, noisy: Tensor, timesteps: Tensor, prompt_embeds: Tensor, control_embeds: Tensor, **more
    ) -> Tensor:
        """v [B,F,C,H,W] at timesteps [B] or [B,F]."""
        return module(
            hidden_states=noisy.to(self.weight_dtype),
            encoder_hidden_states=prompt_embeds,
            timestep=timesteps,
            control_embeds=control_embeds,
            image_rotary_emb=self.rotary_embedding(noisy),
            return_dict=False,
            **more,
        )[0]


class StreamingObjective(ControlledObjective):
    """A model that streams: it is trained on windows, and its validation videos are streams."""

    default_transformer = (CogVideoXControlTransformer3DModel, {"control_dim": 768})

    def window_length(self, batch: EncodedBatch, rng: SampleRandom | None) -> int:
        """Latent frames of this step's windows: drawn, without `rng` the most."""
        lengths = sorted((frames - 1) // VAE_TIME_FACTOR + 1 for frames in self.settings.window_frames)
        if not lengths:
            return batch.latents.shape[1]
        return lengths[-1 if rng is None else rng.shared_randint(0, len(lengths))]

    def cut_window(self, batch: EncodedBatch, rng: SampleRandom | None, begins: Tensor | None = None) -> EncodedBatch:
        """A window from each clip at a random offset, all of one length; without `rng` the longest from each middle.

        Behind an offset the condition is an ordinary latent of four frames, as it is while streaming. Where `begins`
        (bool [B]) is set the window begins its clip, by the VAE's latent of one frame, as a stream does.
        """
        if not self.settings.window_frames:
            return batch
        length = self.window_length(batch, rng)
        last = batch.latents.shape[1] - length
        rows = torch.arange(len(batch), device=self.device)[:, None]  # [B,1]
        offsets = torch.full_like(rows, last // 2) if rng is None else rng.randint(0, last + 1)[:, None]
        if begins is not None:
            offsets = torch.where(begins[:, None], 0, offsets)
        frames = offsets + torch.arange(length, device=self.device)  # [B,F]
        return EncodedBatch(
            batch.latents[rows, frames], batch.prompt_embeds, batch.control_indices[rows, frames], batch.sample_ids
        )

    def offset(self, latents: Tensor, noise: Tensor, is_condition: Tensor, rng: SampleRandom) -> tuple[Tensor, Tensor]:
        """Latents and noise [B,F,C,H,W] as the model is to see them under `offset_noise`.

        A stream's mistakes in what does not move (the colour of a far hill) are alike in all frames of a window, so a
        model that saw only true windows copies them on. Here the condition frame (`is_condition` [B,F]) and the
        others' noise get one smooth offset of a strength drawn for each sample: whole in the condition, √(1−ᾱ) of it
        in a noisy frame. Stage 3's target is the true latents without it; stage 4's is what its teacher makes of the
        same input. After offset noise (N. Guttenberg, 2023) and GameNGen's corrupted context (arXiv 2408.14837).
        """
        if not self.settings.offset_noise:
            return latents, noise
        *_, channels, height, width = latents.shape
        strength = self.settings.offset_noise * rng.uniform((1, 1, 1))
        coarse = strength * rng.normal((channels, *OFFSET_GRID))  # drawn last: it moves no other draw
        smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
        smooth = smooth[:, None]  # [B,1,C,H,W]
        is_condition = is_condition[:, :, None, None, None]
        return latents + smooth * is_condition, noise + smooth * ~is_condition

    def num_video_tokens(self, latents: Tensor) -> int:
        return super().num_video_tokens(self.typical_window(latents))

    def step_flops(self, batch: EncodedBatch) -> float:
        return super().step_flops(replace(batch, latents=self.typical_window(batch.latents)))

    def typical_window(self, latents: Tensor) -> Tensor:
        """Latents of a window of mean length: what throughput is reckoned with."""
        frames = self.settings.window_frames
        return latents[:, : (round(sum(frames) / len(frames)) - 1) // VAE_TIME_FACTOR + 1] if frames else latents

    @torch.no_grad()
    def sample_stream(
        self, pipeline: Any, prompt: str, control: list[str] | None, seed: int, **arguments: Any
    ) -> np.ndarray:
        """As many raw frames of a stream as there are control tokens, else one window and a shift: uint8 [N,h,w,3]."""
        settings = self.settings
        num_frames = len(control) if control else max(settings.window_sizes()) + 8
        chunks, made = [], 0
        with self.autocast(), self.vae_on_device():
            stream = pipeline.stream(
                prompt_embeds=self.encoder.encode_prompts([prompt]),
                negative_prompt_embeds=self.encoder.empty_prompt[None],
                control=control,
                height=settings.height_buckets[0],
                width=settings.width_buckets[0],
                generator=torch.Generator(self.device).manual_seed(seed),
                **arguments,
            )
            while made < num_frames:
                chunks.append(next(stream))
                made += len(chunks[-1])
        return np.concatenate(chunks)[:num_frames]
