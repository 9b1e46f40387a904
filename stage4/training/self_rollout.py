"""Stage 4, second part: the distilled student is trained on its own streams, towards its teacher's distribution.

Distillation shows the student noised footage, so the small mistakes of a stream, which it meets only while streaming,
are copied on and add up. Here streams run from step to step, for minutes. In a step each goes on by a window of the
student's own frames, through which the loss reaches the weights, and what was made is drawn towards stage 3's
distribution of clips of that caption and those signals: noised to one level for all frames, it is moved by the
difference of two scores, stage 3's and that of a critic, which learns on the side what the student's streams are like.

The frames get no condition there: what they are compared with is a clip of the world, and not what a teacher would make
of a past that has gone astray.

Shapes: B batch · F latent frames, F = 1 + G·W · G noise groups · W frames per group · C latent channels ·
H W latent height/width · R raw frames of a latent frame · L text tokens · T train timesteps · P = G·m phases.
Sources: distribution matching distillation, arXiv 2311.18828 (equations 7 and 8) and 2405.14867; on a model's own
streams: self forcing, arXiv 2506.08009, and rolling forcing, arXiv 2509.25161.
"""

import copy
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.cogvideox.guidance import guidance_branches
from common.cogvideox.noise_schedule import CLEAN, group_size, mix_noise, predict_x0
from common.cogvideox.pipeline_io import component_config, load_component, read_model_index
from common.cogvideox.scheduler import CogVideoXSwinLCMScheduler
from common.config.errors import SettingError, UserError
from common.training.ema import update_ema
from common.training.encoding import EncodedBatch
from common.training.random import SampleRandom
from common.training.throughput import forward_flops
from stage4.training.rollout import Streams, StreamsByLength, per_frame
from stage4.training.scm import SCMObjective
from stage4.training.self_rollout_settings import SelfRolloutSettings

logger = logging.getLogger(__name__)

NOISE = (  # of a scheduler's config: what of a noisy frame its model learnt to read
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr", "snr_shift_scale", "condition_timestep",
)  # fmt: skip
MATCHED_TIMESTEPS = (20, 980)  # low to high, between which scores are compared: beyond them they say little or too much


class StudentAndCritic(nn.Module):
    """The two that are trained, as one module for the trainer; `role` says which of them is called."""

    def __init__(self, student: nn.Module, critic: nn.Module):
        super().__init__()
        self.student, self.critic = student, critic
        self.config = student.config

    def forward(self, role: str, **inputs: Any) -> Any:
        return getattr(self, role)(**inputs)


class Made(NamedTuple):
    """A window of clean frames out of streams, and what they were told."""

    latents: Tensor  # [B,F,C,H,W], with gradient
    is_new: Tensor  # bool [B,F]: made in this step; a condition was made in the one before
    prompt: Tensor  # [B,L,·]
    rows: Tensor  # [B,F,control_dim]


class SelfRolloutObjective(SCMObjective):
    """Student and critic (`module`), the frozen teacher, and the student's moving average, the target.

    Attributes:
        streams: those of each window length, across steps.
    """

    adds_to_base = True  # the student as it was is read again for the result
    settings: SelfRolloutSettings

    def make_module(self, transformer: nn.Module) -> nn.Module:
        critic = copy.deepcopy(transformer).requires_grad_(True)
        student = super().make_module(transformer)
        if transformer.device.type != "meta":
            student.load_state_dict(self._student_as_it_was().state_dict())
        return StudentAndCritic(student, critic)

    def _student_as_it_was(self) -> nn.Module:
        return load_component(Path(self.settings.student_model_name_or_path), "transformer", torch.float32)

    def check_base(self, base: Path, index: dict[str, Any], config: dict[str, Any]) -> None:
        super().check_base(base, index, config)
        if component_config(base, "scheduler", index)[1].get("condition_timestep", CLEAN) != CLEAN:
            raise UserError(f"{base} was trained with condition_timestep; self-rollout knows clean conditions alone")
        student = Path(self.settings.student_model_name_or_path)
        if student.is_dir():  # a dry run needs none
            self._check_student(student, config, base, index)

    def _check_student(self, student: Path, teacher: dict[str, Any], base: Path, base_index: dict[str, Any]) -> None:
        """UserError unless it is a distilled model of the same transformer, groups and phases, noise and signals."""
        index = read_model_index(student, expected=self.base_pipeline)
        kind = index["scheduler"][1]
        if kind != CogVideoXSwinLCMScheduler.__name__:
            raise UserError(
                f"{student} is not distilled (its scheduler is a {kind}); here belongs stage 4's output_dir"
            )
        scheduler = component_config(student, "scheduler", index)[1]
        for name in ("num_noise_groups", "phases_per_group"):
            if scheduler[name] != getattr(self.settings, name):
                raise SettingError(
                    name, f"is {getattr(self.settings, name)}; {student} was made with {scheduler[name]}"
                )
        config = component_config(student, "transformer", index)[1]
        schedule = component_config(base, "scheduler", base_index)[1]
        told = load_component(student, "control_vocabulary", index=index)
        known = load_component(base, "control_vocabulary", index=base_index)

        def differ(one: Tensor, other: Tensor) -> bool:
            """By more than float16's rounding, in which weights may be packed."""
            return one.shape != other.shape or not torch.allclose(one.float(), other.float(), rtol=1e-3, atol=1e-3)

        differences = {
            "transformers": [name for name in config if not name.startswith("_") and config[name] != teacher[name]],
            "schedulers": [name for name in NOISE if scheduler[name] != schedule[name]],
            "control vocabularies": [
                *(name for name in ("names", "label") if getattr(told, name) != getattr(known, name)),
                *(name for name in ("table", "null") if differ(getattr(told, name), getattr(known, name))),
            ],
        }
        for parts, names in differences.items():
            if names:
                raise UserError(f"{student} is no student of this teacher: their {parts} differ in {', '.join(names)}")

    def load(self, device: torch.device, weight_dtype: torch.dtype) -> None:
        super().load(device, weight_dtype)
        about = self.base_dir / "settings.json"  # not there when the teacher has been moved or packed
        if about.is_file() and not json.loads(about.read_text()).get("window_frames"):
            logger.warning(
                "%s was trained without window_frames: it knows no clip that begins with four frames, and is to judge "
                "such clips; better train stage 3 with longer clips (frame_buckets) and window_frames", self.base_dir
            )  # fmt: skip

    def make_roles(self) -> None:
        super().make_roles()
        self.streams = StreamsByLength()

    @property
    def student(self) -> Callable[..., Any]:
        return partial(self.module, "student")

    @property
    def critic(self) -> Callable[..., Any]:
        return partial(self.module, "critic")

    def trained_transformers(self) -> list[nn.Module]:
        return [self.module.student, self.module.critic]

    def learning_rate(self, name: str) -> float:
        return self.settings.critic_learning_rate if name.startswith("critic.") else self.settings.learning_rate

    def loss(self, batch: EncodedBatch, rng: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        made = self.roll_out(batch, rng)
        student, gap = self._matching_loss(made, rng)
        critic = self._critic_loss(made, rng)
        return student + critic, {"critic_loss": critic.detach(), "score_gap": gap}

    def roll_out(self, batch: EncodedBatch, rng: SampleRandom) -> Made:
        """Every stream goes on by G shifts, in P forwards; a few end, and others begin in their place, from text alone.

        Of `batch` only captions and signals are used.
        """
        settings, shape = self.settings, batch.latents.shape[2:]
        T, G, m = self.num_train_timesteps, settings.num_noise_groups, settings.phases_per_group
        F = self.window_length(batch, rng)
        W = group_size(F, G)
        if F not in self.streams:
            self.streams[F] = Streams.none_yet(batch, F)
        kept = self.streams[F]

        starts = rng.bernoulli(1 / settings.rollouts_per_stream) | ~kept.is_running  # [B]
        piece = self._signals(batch, 2 * F - 1, rng)
        streams = kept.begin(
            starts, batch.prompt_embeds, piece, rng.bernoulli(settings.live_share), rng.bernoulli(settings.held_share)
        )
        fresh, again = rng.normal((G, W, *shape)), rng.normal((F - 1, *shape))
        latents = torch.where(per_frame(starts), rng.normal((F, *shape)), streams.latents)

        is_condition = ~starts[:, None] & (torch.arange(F, device=self.device) == 0)  # [B,F]
        finished, frames, signals = streams.finished, [latents[:, :1]], [streams.finished[:, None]]
        for phase in range(G * m):
            shift, step = divmod(phase, m)
            told, newest = streams.told(torch.where(starts, 0, shift * W), finished)
            timesteps = torch.where(starts[:, None], T - 1 - phase * (T // (G * m)), self._window_top(step, F))  # [B,F]
            boundary = self._lower(timesteps, is_condition, self.student_scheduler.phase_boundary)
            rows = self.vocabulary.frame_rows(told)
            latents = self._jump(self.student, latents, timesteps, boundary, streams.prompt, rows, {})
            if step == m - 1:
                frames.append(latents[:, 1 : 1 + W])
                signals.append(newest[:, None].expand(-1, W, -1))
                shifted = torch.cat([latents[:, W:], fresh[:, shift]], dim=1)
                latents, finished = torch.where(per_frame(starts), latents, shifted), newest

        # A start is a whole clip; it goes on, as `VideoStream` does, noised to a window's levels.
        made = torch.where(per_frame(starts), latents, torch.cat(frames, dim=1))
        tops = self._window_top(0, F)[:, 1:].expand(len(batch), -1)
        noised = torch.cat([latents[:, :1], mix_noise(latents[:, 1:], again, tops, self.alphas)], dim=1)
        kept.copy_(streams.go_on(starts, torch.where(per_frame(starts), noised, latents), finished, piece))
        was_told = torch.where(streams.is_live[:, None, None], torch.cat(signals, dim=1), streams.signals[:, :F])
        was_told = torch.where(starts[:, None, None], streams.told(starts * 0, streams.finished)[0], was_told)
        return Made(made, ~is_condition, streams.prompt, self.vocabulary.frame_rows(was_told))

    def _signals(self, batch: EncodedBatch, length: int, rng: SampleRandom) -> Tensor:
        """Signals [B,length,R] from anywhere in each clip; one that is too short holds its last."""
        available = batch.control_indices.shape[1]
        begin = rng.randint(0, max(available - length, 0) + 1)[:, None]  # [B,1]
        frames = (begin + torch.arange(length, device=self.device)).clamp(max=available - 1)
        return batch.control_indices[torch.arange(len(batch), device=self.device)[:, None], frames]

    def _matching_loss(self, made: Made, rng: SampleRandom) -> tuple[Tensor, Tensor]:
        """A loss whose gradient is (critic's x̂0 − teacher's x̂0) / mean |x − teacher's x̂0| a frame, and that squared."""
        latents = made.latents.detach()
        timesteps = rng.randint(*MATCHED_TIMESTEPS)[:, None].expand(latents.shape[:2])  # [B,F]
        noisy = mix_noise(latents, rng.normal(latents.shape[1:]), timesteps, self.alphas)
        with torch.no_grad():
            real = self._teacher_x0(noisy, timesteps, made.prompt, made.rows, None)
            output = self.predict(self.critic, noisy, timesteps, made.prompt, made.rows).float()
            gap = predict_x0(noisy, output, timesteps, self.alphas) - real
            gap = gap / (latents - real).abs().mean(dim=(2, 3, 4), keepdim=True).clamp(min=1e-3)
        error = 0.5 * (made.latents - (latents - gap)).square().mean(dim=(2, 3, 4))  # [B,F]
        is_new = made.is_new.float()
        return ((error * is_new).sum(dim=1) / is_new.sum(dim=1)).mean(), gap.square().mean()

    def _critic_loss(self, made: Made, rng: SampleRandom) -> Tensor:
        """The critic's error of v on what the streams made, all frames at one level."""
        latents = made.latents.detach()
        timesteps = rng.randint(0, self.num_train_timesteps)[:, None].expand(latents.shape[:2])  # [B,F]
        noise = rng.normal(latents.shape[1:])
        noisy = mix_noise(latents, noise, timesteps, self.alphas)
        output = self.predict(self.critic, noisy, timesteps, made.prompt, made.rows)
        return self.velocity_error(output, latents, noise, timesteps).mean()

    def step_flops(self, batch: EncodedBatch) -> float:
        """P forwards and backwards of the student; one of the critic, and of each a forward more for the scores."""
        sizes = self.typical_window(batch.latents).shape, batch.prompt_embeds.shape[1]
        scales = self.settings.teacher_guidance_scale, self.settings.teacher_control_guidance_scale
        branches = len(guidance_branches(*scales))
        forwards = 3 * self.student_scheduler.num_phases + 3 + 1 + branches
        return forwards * forward_flops(self.plain_module.config, *sizes)

    def after_optimizer_step(self, step: int) -> None:
        update_ema(self.target, self.plain_module.student, self.settings.ema_decay)

    def checkpoint_modules(self) -> dict[str, Any]:
        return {"target": self.target, "streams": self.streams}

    @torch.no_grad()
    def exported(self) -> nn.Module:
        """The target, drawn back towards the student as it was: `learnt_share` of the way is gone.

        A part of the way keeps most of the steadiness and loses little of what distillation had.
        """
        exported, target = self._student_as_it_was(), dict(self.target.named_parameters())
        for name, weight in exported.named_parameters():
            weight.lerp_(target[name].to(weight), self.settings.learnt_share)
        return exported
