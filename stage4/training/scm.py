"""Stage 4: stream consistency distillation. A student learns stage 3's path through a window shift in one forward.

P = G·m phases of T/P timesteps; b(t) is the boundary below t. f(x_t, t) is one DDIM jump from t to b(t) by the
predicted x̂0. Every group of a window has its own phase and all share one offset, so a window is one sample of all
noise levels at once. The teacher makes one solver step t → s with guidance; the student's f(x_t, t) is drawn to the
EMA student's f(x_s, s), which at s = b(t) is the teacher's own point.

Shapes: B batch · F latent frames, F = 1 + G·W · G noise groups · W frames per group · C latent channels ·
H W latent height/width · T train timesteps · K solver steps.
Sources: consistency models, arXiv 2303.01469; latent consistency models, arXiv 2310.04378; phased consistency models,
arXiv 2405.18407; The Matrix, arXiv 2412.03568, section 3.4, which names the stage and publishes no training.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.cogvideox.compilation import compile_blocks
from common.cogvideox.guidance import guidance_branches, guidance_scale_embedding
from common.cogvideox.noise_schedule import CLEAN, ddim_step, mix_noise, predict_x0
from common.cogvideox.pipeline_cogvideox import CogVideoXStreamingPipeline
from common.cogvideox.pipeline_io import component_config, write_pipeline
from common.cogvideox.scheduler import CogVideoXSwinLCMScheduler
from common.cogvideox.transformer import CogVideoXControlTransformer3DModel
from common.config.errors import SettingError, UserError
from common.training.controlled_objective import StreamingObjective
from common.training.ema import update_ema
from common.training.encoding import EncodedBatch
from common.training.random import SampleRandom
from common.training.throughput import forward_flops
from stage4.training.scm_settings import SCMSettings


class SCMObjective(StreamingObjective):
    """Three roles over one architecture: the frozen teacher, the student (`module`), the EMA student as target."""

    base_pipeline = "CogVideoXStreamingPipeline"
    trains_base = True  # as the student; the teacher is cast to the compute type
    settings: SCMSettings

    def make_module(self, transformer: nn.Module) -> nn.Module:
        student = CogVideoXControlTransformer3DModel.from_transformer(
            transformer, cond_proj_dim=self.settings.cond_proj_dim
        )
        self.teacher = transformer
        return student.requires_grad_(True)

    def check_base(self, base: Path, index: dict[str, Any], config: dict[str, Any]) -> None:
        super().check_base(base, index, config)
        kind = index["scheduler"][1]
        if kind == CogVideoXSwinLCMScheduler.__name__:
            raise UserError(
                f"{base} is distilled already (its scheduler is a {kind}); here belongs stage 3's output_dir"
            )
        groups = component_config(base, "scheduler", index)[1]["num_noise_groups"]
        if groups != self.settings.num_noise_groups:
            raise SettingError(
                "num_noise_groups", f"is {self.settings.num_noise_groups}; stage 3 made {base} with {groups}"
            )

    def load(self, device: torch.device, weight_dtype: torch.dtype) -> None:
        super().load(device, weight_dtype)
        self.make_roles()
        self.student_scheduler = self._make_scheduler()

    def make_roles(self) -> None:
        """The teacher in the compute type, and the target as the student begins."""
        nn.Module.to(self.teacher, self.weight_dtype)  # diffusers' own `to` warns of an empty list of float32 modules
        self.target = copy.deepcopy(self.trained_transformers()[0]).requires_grad_(False).eval()
        nn.Module.to(self.target, torch.float32)  # a mean that moves slowly needs every digit

    @property
    def student(self) -> Callable[..., Any]:
        return self.module

    def _make_scheduler(self) -> CogVideoXSwinLCMScheduler:
        return CogVideoXSwinLCMScheduler.from_config(
            self.scheduler.config,
            num_noise_groups=self.settings.num_noise_groups,
            frames_per_group=self.settings.frames_per_group(),
            phases_per_group=self.settings.phases_per_group,
            original_inference_steps=self.settings.num_solver_steps,
            guidance_range=self.settings.guidance_range or None,
        )

    def loss(self, batch: EncodedBatch, rng: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        is_uniform = rng.bernoulli(self.settings.uniform_timestep_share)  # [B]
        batch = self.cut_window(batch, rng, begins=is_uniform)
        timesteps, is_condition = self._sample_timesteps(is_uniform, batch.latents.shape[1], rng)  # [B,F]
        batch = self._press_keys(batch, is_condition, rng)
        error = self._consistency_error(batch, timesteps, is_condition, self.control_embeds(batch, rng), rng)
        learnt = (~is_condition).float()
        return ((error * learnt).sum(dim=1) / learnt.sum(dim=1)).mean(), {}

    def _press_keys(self, batch: EncodedBatch, is_condition: Tensor, rng: SampleRandom) -> EncodedBatch:
        """Some samples' frames are all told one signal drawn anew, but a condition its own.

        So it is when a key is pressed: the frames in noise have begun under another signal. What the student learns for
        it is where its teacher, told the same, goes from there; the footage is nobody's target.
        """
        if not self.settings.key_press_share:
            return batch
        is_pressed = rng.bernoulli(self.settings.key_press_share).to(self.device)[:, None]  # [B,1]
        signal = rng.randint(0, len(self.vocabulary.names)).to(self.device)[:, None, None]  # [B,1,1]
        is_told = (is_pressed & ~is_condition)[:, :, None]  # [B,F,1]
        return replace(batch, control_indices=torch.where(is_told, signal, batch.control_indices))

    def _sample_timesteps(self, is_uniform: Tensor, num_frames: int, rng: SampleRandom) -> tuple[Tensor, Tensor]:
        """Timesteps and which of them are conditions, both [B,F].

        Group g is at g·T/G plus an offset that all groups share, the condition frame where stage 3 has it. Samples
        that are `is_uniform` [B] have one timestep for all frames and no condition, as where a stream starts from text.
        """
        settings, T = self.settings, self.num_train_timesteps
        G, span = settings.num_noise_groups, T // settings.num_solver_steps
        offset = rng.randint(1, T // G // span + 1) * span - 1  # [B], on the solver's grid
        uniform = rng.randint(1, settings.num_solver_steps + 1) * span - 1
        starts = torch.arange(G, device=offset.device) * (T // G)  # [G]
        windows = self._with_condition(offset[:, None] + starts, num_frames)
        is_condition = ~is_uniform[:, None] & (torch.arange(num_frames, device=offset.device) == 0)
        return torch.where(is_uniform[:, None], uniform[:, None], windows), is_condition

    def _with_condition(self, by_group: Tensor, num_frames: int) -> Tensor:
        """Timesteps of the groups [B,G] → of a window's frames [B,F], the condition first."""
        frames = by_group.repeat_interleave((num_frames - 1) // by_group.shape[1], dim=1)  # [B,G·W]
        condition = torch.full_like(frames[:, :1], self.scheduler.config.condition_timestep)
        return torch.cat([condition, frames], dim=1)

    def _window_top(self, step: int, num_frames: int) -> Tensor:
        """A window's timesteps [1,F] at the top of every group's phase number `step`, the condition first."""
        G, m = self.settings.num_noise_groups, self.settings.phases_per_group
        phases = torch.arange(G, device=self.device) * m + m - step  # of them end there
        return self._with_condition(phases[None] * (self.num_train_timesteps // (G * m)) - 1, num_frames)

    def _consistency_error(
        self, batch: EncodedBatch, timesteps: Tensor, is_condition: Tensor, control_embeds: Tensor, rng: SampleRandom
    ) -> Tensor:
        """Pseudo-Huber distance of the student's jump from the target's, mean per frame: [B,F].

        The jump's share of x̂0 falls with the noise level (c_out is 1, .37, .21, .10 at the tops of four phases), so the
        lowest group dominates this mean.
        """
        noise = rng.normal(batch.latents.shape[1:])
        scale, more = self._draw_guidance(rng)
        seen, noise = self.offset(batch.latents, noise, is_condition, rng)
        noisy = mix_noise(seen, noise, timesteps, self.alphas)  # x_t
        boundary = self._lower(timesteps, is_condition, self.student_scheduler.phase_boundary)  # b(t)
        solver = self._lower(timesteps, is_condition, self.student_scheduler.solver_timestep)  # s

        with torch.no_grad():
            teacher_x0 = self._teacher_x0(noisy, timesteps, batch.prompt_embeds, control_embeds, scale)
            solved = ddim_step(noisy, teacher_x0, timesteps, solver, self.alphas)  # x_s
            with self.autocast():
                target = self._jump(self.target, solved, solver, boundary, batch.prompt_embeds, control_embeds, more)
        jumped = self._jump(self.student, noisy, timesteps, boundary, batch.prompt_embeds, control_embeds, more)
        c = self.settings.huber_c
        return ((jumped - target).square() + c**2).sqrt().sub(c).mean(dim=(2, 3, 4))

    @staticmethod
    def _lower(timesteps: Tensor, is_condition: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
        """`rule` of the timesteps; condition frames stay where they are, and so does what is clean."""
        stays = is_condition | (timesteps == CLEAN)
        return torch.where(stays, timesteps, rule(timesteps.clamp(min=0)))

    def _jump(
        self, module: nn.Module, sample: Tensor, timesteps: Tensor, boundary: Tensor, prompt: Tensor, control: Tensor,
        more: dict[str, Tensor],
    ) -> Tensor:  # fmt: skip
        """f(x_t, t) = c_skip·x_t + c_out·x̂0: a DDIM jump to the boundary, the identity on it."""
        output = self.predict(module, sample, timesteps.clamp(min=0), prompt, control, **more).float()
        x0 = predict_x0(sample, output, timesteps, self.alphas)
        return ddim_step(sample, x0, timesteps, boundary, self.alphas)

    def _draw_guidance(self, rng: SampleRandom) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The guidance drawn for each sample [B], and what tells the student; None and nothing when it is fixed."""
        if not self.settings.guidance_range:
            return None, {}
        low, high = self.settings.guidance_range
        scale = low + (high - low) * rng.uniform()
        return scale, {"timestep_cond": guidance_scale_embedding(scale, self.settings.cond_proj_dim)}

    def _teacher_x0(
        self, noisy: Tensor, timesteps: Tensor, prompt: Tensor, control: Tensor, scale: Tensor | None
    ) -> Tensor:
        """The guided teacher's x̂0: a weighted sum over its branches with and without text and control."""
        settings = self.settings
        if scale is None:
            scales = settings.teacher_guidance_scale, settings.teacher_control_guidance_scale
        else:
            scales = (scale[:, None, None, None, None],) * 2
        empty = self.encoder.empty_prompt.expand_as(prompt)
        null = self.vocabulary.null.to(control).expand_as(control)
        velocity = 0
        for use_text, use_control, weight in guidance_branches(*scales):
            branch = self.predict(
                self.teacher,
                noisy,
                timesteps.clamp(min=0),
                prompt if use_text else empty,
                control if use_control else null,
            )
            velocity = velocity + weight * branch.float()
        return predict_x0(noisy, velocity, timesteps, self.alphas)

    def validation_loss(self, batch: EncodedBatch, rng: SampleRandom) -> dict[str, Tensor]:
        """How far the student's jump from the top of every phase lands from where the teacher's K/P solver steps lead;
        of a group, the mean over its phases.

        Unlike the training loss, whose target moves along, this is a distance to something fixed.
        """
        batch = self.cut_window(batch, None)
        num_frames, G, m = batch.latents.shape[1], self.settings.num_noise_groups, self.settings.phases_per_group
        noise = rng.normal(batch.latents.shape[1:])
        rows = self.vocabulary.frame_rows(batch.control_indices)
        scale, more = self._draw_guidance(rng)
        errors = []  # of the groups' first phases, of their second …: [G] each
        for step in range(m):
            tops = self._window_top(step, num_frames).expand(len(batch), -1)  # [B,F]
            is_condition = (torch.arange(num_frames, device=self.device) == 0).expand_as(tops)
            boundary = self._lower(tops, is_condition, self.student_scheduler.phase_boundary)
            noisy = mix_noise(batch.latents, noise, tops, self.alphas)
            solved, timesteps = noisy, tops
            for _ in range(self.settings.num_solver_steps // self.student_scheduler.num_phases):
                following = self._lower(timesteps, is_condition, self.student_scheduler.solver_timestep)
                x0 = self._teacher_x0(solved, timesteps, batch.prompt_embeds, rows, scale)
                solved, timesteps = ddim_step(solved, x0, timesteps, following, self.alphas), following
            jumped = self._jump(self.student, noisy, tops, boundary, batch.prompt_embeds, rows, more)
            errors.append((jumped - solved)[:, 1:].square().mean(dim=(0, 2, 3, 4)).unflatten(0, (G, -1)).mean(dim=1))
        error = torch.stack(errors).mean(dim=0)  # [G]
        return {"loss": error.mean(), **{f"loss_group{g}": loss for g, loss in enumerate(error)}}

    def step_flops(self, batch: EncodedBatch) -> float:
        """The student's forward and backward, the target's forward, and one of the teacher for every branch."""
        settings = self.settings
        sizes = self.typical_window(batch.latents).shape, batch.prompt_embeds.shape[1]
        scales = settings.teacher_guidance_scale, settings.teacher_control_guidance_scale
        branches = 3 if settings.guidance_range else len(guidance_branches(*scales))
        return super().step_flops(batch) + (1 + branches) * forward_flops(self.plain_module.config, *sizes)

    def compile(self) -> None:
        for role in (*self.trained_transformers(), self.target, self.teacher):
            compile_blocks(role)

    def after_optimizer_step(self, step: int) -> None:
        update_ema(self.target, self.plain_module, self.settings.ema_decay)

    def frozen_roles(self) -> dict[str, nn.Module]:
        return {"target": self.target, "teacher": self.teacher}

    def checkpoint_modules(self) -> dict[str, Any]:
        return {"target": self.target}

    def export(self, output_dir: Path) -> None:
        parts = {"transformer": self.exported(), "scheduler": self.student_scheduler}
        write_pipeline(output_dir, self.base_dir, "CogVideoXStreamingPipeline", parts)

    def exported(self) -> nn.Module:
        """The EMA student: at equal steps it is the better of the two."""
        return self.target

    def sample(self, prompt: str, control: list[str] | None, seed: int) -> np.ndarray:
        return self.sample_with(self.target, prompt, control, seed)

    def sample_with(self, target: nn.Module, prompt: str, control: list[str] | None, seed: int) -> np.ndarray:
        parts = {**self.components(target), "scheduler": self.student_scheduler}
        return self.sample_stream(CogVideoXStreamingPipeline(**parts), prompt, control, seed)
