"""Classifier-free guidance on text, on control, or on both, and the transformer behind it.

Shapes: B batch, F latent frames, C latent channels, H W latent height/width, L text tokens, K guidance branches.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import CogVideoXTransformer3DModel, SchedulerMixin
from torch import Tensor

from common.cogvideox.control_adapter import ControlVocabulary
from common.config.errors import UserError


class GuidanceBranch(NamedTuple):
    """One forward of the transformer: with the prompt or "", with the signals or the null row, and its weight."""

    use_text: bool
    use_control: bool
    weight: "Scale"


Scale = float | Tensor


def guidance_branches(text_scale: Scale, control_scale: Scale) -> list[GuidanceBranch]:
    """What to run and how to weigh it; weights sum to one, the full branch last.

    (t,c) + (s_t−1)·[(t,c) − (∅,c)] + (s_c−1)·[(t,c) − (t,∅)]: each scale strengthens its condition, given the
    other. What has neither is not needed: with independent dropout of a tenth each, it is a hundredth of the training.
    Branches of weight zero are not run; without guidance (1, 1) there is one.

    Args:
        text_scale, control_scale: numbers, or tensors that broadcast against the predictions (then all three run).
    """
    branches = [
        GuidanceBranch(False, True, 1 - text_scale),
        GuidanceBranch(True, False, 1 - control_scale),
        GuidanceBranch(True, True, text_scale + control_scale - 1),
    ]
    return [branch for branch in branches if isinstance(branch.weight, Tensor) or branch.weight != 0]


def combine_branches(predictions: Sequence[Tensor], branches: Sequence[GuidanceBranch]) -> Tensor:
    """Σ weight·prediction, written as base + Σ weight·(prediction − base) since the weights sum to one."""
    base = combined = predictions[0]
    for prediction, branch in zip(predictions[1:], branches[1:], strict=True):
        combined = combined + branch.weight * (prediction - base)
    return combined


def dynamic_guidance_scale(scale: float, step: int, num_steps: int) -> float:
    """Guidance that rises from 1 at the first step towards 1 + scale (CogVideoX's dynamic CFG), by the step's number.

    diffusers counts timesteps of 0…999 against num_steps, by which guidance jumps up and down.
    """
    return 1 + scale * (1 - math.cos(math.pi * (step / num_steps) ** 5)) / 2


def checked_guidance_scale(
    scheduler: SchedulerMixin, guidance_scale: float | None, control_guidance_scale: float, default: float = 1.0
) -> float:
    """The guidance scale; None is the default, of a distilled model 1 or the middle of the range that it was taught.

    Raises:
        UserError: a scale below 1, which would weaken the condition; or a distilled model would be guided a second
            time, or told a scale that it was not taught.
    """
    if not is_distilled(scheduler):
        scale = default if guidance_scale is None else guidance_scale
        for name, value in {"guidance_scale": scale, "control_guidance_scale": control_guidance_scale}.items():
            if not value >= 1:
                raise UserError(f"{name} {value:g}: 1 is for no guidance, more is for some")
        return scale
    low, high = taught = scheduler.config.guidance_range or (1.0, 1.0)
    scale = (low + high) / 2 if guidance_scale is None else guidance_scale
    asked = {"guidance_scale": (scale, taught), "control_guidance_scale": (control_guidance_scale, (1.0, 1.0))}
    for name, (value, (low, high)) in asked.items():
        if not low <= value <= high:
            right = f"{low:g}" if low == high else f"{low:g} … {high:g}"
            raise UserError(f"{name} {value:g}: the model learnt its guidance when it was distilled; it takes {right}")
    return scale


def is_distilled(scheduler: SchedulerMixin) -> bool:
    """Whether guidance and the number of steps were settled in distillation; diffusers' own schedulers do not say."""
    return getattr(scheduler, "is_distilled", False)


def guidance_scale_embedding(scales: Tensor, embedding_dim: int) -> Tensor:
    """Sinusoids of 1000·ω, [B] → float32 [B,embedding_dim]: what a distilled model with `cond_proj_dim` is told.

    Source: latent consistency models, arXiv 2310.04378, section 4.2.
    """
    half = embedding_dim // 2
    rates = torch.exp(torch.arange(half, device=scales.device) * (-math.log(10000.0) / max(half - 1, 1)))  # [half]
    angles = 1000.0 * scales.float()[:, None] * rates
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, embedding_dim % 2))


class GuidedDenoiser:
    """The transformer with guidance for one prompt: all branches in one forward, what does not change prepared once.

    Args:
        transformer: ours, or diffusers' own (then without control, and with one timestep for all frames).
        branches: from `guidance_branches`.
        prompt_embeds: [B,L,text_embed_dim].
        negative_prompt_embeds: the same of "" (or a negative prompt); may be None if no branch goes without text.
        vocabulary: rows of the control signals; None for a transformer without control.
        image_rotary_emb: rotary positions (5B), None for sincos (2B).
        guidance_embedding: [B,cond_proj_dim] for a transformer that is told its guidance scale, else None.
        attention_kwargs: passed on to the transformer.
    """

    def __init__(
        self,
        transformer: CogVideoXTransformer3DModel,
        branches: Sequence[GuidanceBranch],
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor | None = None,
        vocabulary: ControlVocabulary | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        guidance_embedding: Tensor | None = None,
        attention_kwargs: dict | None = None,
    ):
        self.transformer, self.branches, self.vocabulary = transformer, list(branches), vocabulary
        self.dtype, self.device = transformer.dtype, prompt_embeds.device
        self.constants = {"image_rotary_emb": image_rotary_emb, "attention_kwargs": attention_kwargs}
        embeds = [prompt_embeds if branch.use_text else negative_prompt_embeds for branch in self.branches]
        self.constants["encoder_hidden_states"] = torch.cat(embeds).to(self.dtype)  # [K·B,L,·]
        if guidance_embedding is not None:
            self.constants["timestep_cond"] = guidance_embedding.to(self.dtype).repeat(len(self.branches), 1)

    def control_embeds(self, indices: Sequence[Sequence[Sequence[int]]]) -> Tensor | None:
        """Signals of a window's raw frames [B][F][R] → [K·B,F,control_dim], null rows in branches without control."""
        if self.vocabulary is None:
            return None
        given = torch.tensor(indices, dtype=torch.long)  # [B,F,R]
        if self.device.type == "cuda":  # from pinned memory, or the copy would wait for all that is queued
            given = given.pin_memory().to(self.device, non_blocking=True)
        null = torch.full_like(given, -1)
        rows = torch.cat([given if branch.use_control else null for branch in self.branches])
        return self.vocabulary.frame_rows(rows).to(self.dtype)

    def __call__(self, latents: Tensor, timesteps: Tensor, control_embeds: Tensor | None = None) -> Tensor:
        """The guided prediction of v.

        Args:
            latents: [B,F,C,H,W], any float type.
            timesteps: [] for one, or [F].
            control_embeds: from `control_embeds`; None leaves the control blocks out.

        Returns:
            float32 [B,F,C,H,W].
        """
        num_branches = len(self.branches)
        hidden_states = latents.to(self.dtype).repeat(num_branches, 1, 1, 1, 1)  # [K·B,F,C,H,W]
        control = {} if control_embeds is None else {"control_embeds": control_embeds}
        output = self.transformer(
            hidden_states=hidden_states,
            timestep=timesteps.expand(len(hidden_states), *timesteps.shape),
            return_dict=False,
            **control,
            **self.constants,
        )[0]
        return combine_branches(output.float().chunk(num_branches), self.branches)
