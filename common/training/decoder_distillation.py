"""Training a light decoder on a VAE's reconstructions: loss, loop and checkpoint.

A step's batch and learning rate are functions of (settings, step), or of the time spent when minutes are given, so a
resumed run of so many steps equals an unbroken one. The checkpoint is one file, replaced whole.

Shapes: B batch, F latent frames, C latent channels, H W latent height/width, N raw frames, h w pixels.
"""

import itertools
import math
import pickle
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.cogvideox.light_decoder import LightVideoDecoder
from common.config.errors import UserError
from common.config.files import replacing
from common.training.decoder_targets import DecoderTargets, ahead
from common.training.interruption import StopRequest
from common.training.muon import MuonAdamW

NUM_SCALES = 3  # full size, a half, a quarter
GRADIENT_WEIGHT = 0.5
WARM_UP = 0.03  # share of the training
LOOK_EVERY = 20  # steps; reading the loss waits for the device


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 of pictures [B,N,3,h,w] and half the L1 of their differences along rows and columns, both at three sizes; and
    that along frames.

    Differences keep edges sharp, where L1 alone would rather blur than misplace them; smaller sizes see what is wrong
    over larger areas (colour, shade) and would be lost among the pixels.
    """
    loss = GRADIENT_WEIGHT * (output.diff(dim=1) - target.diff(dim=1)).abs().mean() if output.shape[1] > 1 else 0.0
    output, target = output.flatten(0, 1), target.flatten(0, 1)  # [B·N,3,h,w]
    for scale in range(NUM_SCALES):
        if scale:
            output, target = functional.avg_pool2d(output, 2), functional.avg_pool2d(target, 2)
        error = output - target
        loss = loss + error.abs().mean() / NUM_SCALES
        for dim in (-1, -2):
            loss = loss + GRADIENT_WEIGHT / NUM_SCALES * error.diff(dim=dim).abs().mean()
    return loss


@dataclass(frozen=True)
class DistillationPlan:
    """How a light decoder is trained.

    Args:
        steps: how many; 0 where `minutes` says how long.
        minutes: of training, interrupted runs added up.
        crop: latents to a side of what a sample shows; None for whole pictures.
        learning_rate: peak, after a linear warm-up; a cosine to zero follows.
        mixed_precision: bfloat16 autocast.
    """

    steps: int
    minutes: float
    batch_size: int
    crop: int | None
    learning_rate: float
    weight_decay: float
    mixed_precision: bool
    checkpointing_steps: int
    seed: int

    def progress(self, step: int, seconds: float) -> float:
        """0 at the start, 1 when done."""
        return step / self.steps if self.steps else min(seconds / (60 * self.minutes), 1.0)

    def rate(self, progress: float) -> float:
        return self.learning_rate * min((progress + 1e-3) / WARM_UP, 1.0) * 0.5 * (1 + math.cos(math.pi * progress))


class DecoderDistillation:
    """A module under training, and its optimizer.

    Args:
        module: float32, on its device; trained in place.
        checkpoint: file of the training's state; gone on from when it exists.
    """

    def __init__(self, module: LightVideoDecoder, plan: DistillationPlan, checkpoint: Path):
        self.module, self.plan, self.checkpoint = module, plan, checkpoint
        self.device = module.device
        options = {"betas": (0.9, 0.95), "weight_decay": plan.weight_decay, "fused": True}
        self.optimizer = MuonAdamW(list(module.parameters()), lr=plan.learning_rate, **options)
        self.step, self.seconds = 0, 0.0
        if checkpoint.exists():
            self._load()

    def _load(self) -> None:
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            self.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
        except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise UserError(f"{self.checkpoint} is damaged; delete it to train from the start") from error

    def save(self) -> None:
        """Writes the checkpoint; a killed process leaves the last one whole."""
        state: dict[str, Any] = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        with replacing(self.checkpoint) as beside:
            torch.save(state | {"step": self.step, "seconds": self.seconds}, beside)

    @property
    def progress(self) -> float:
        return self.plan.progress(self.step, self.seconds)

    def train(self, targets: DecoderTargets, stop: StopRequest, show: Callable[[float, str], object]) -> bool:
        """Trains to the end; False if asked to stop before. Either way, what was learnt is in the checkpoint.

        Args:
            show: called once in a while with the progress and what to say of it.
        """
        plan, loss, last_loss = self.plan, None, ""
        self.module.train()
        read = partial(targets.batch, plan.seed, batch_size=plan.batch_size, crop=plan.crop)
        with closing(ahead(read, itertools.count(self.step))) as batches:
            while self.progress < 1.0 and not stop.agreed():
                started = time.monotonic()
                loss = self.take_step(*next(batches))
                self.step += 1
                is_saving = self.step % plan.checkpointing_steps == 0
                if is_saving or self.step % LOOK_EVERY == 0:
                    last_loss = f"loss {self._finite(loss):.4f}"
                self.seconds += time.monotonic() - started
                show(self.progress, f"step {self.step}, {last_loss}")
                if is_saving:
                    self.save()
            if loss is not None:
                self._finite(loss)
                self.save()
        return self.progress >= 1.0

    def take_step(self, latents: Tensor, pictures: Tensor) -> Tensor:
        """One step on latents [B,F,C,H,W] and pictures uint8 [B,N,h,w,3]; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(self.progress)
        latents, target = (x.to(self.device, non_blocking=True) for x in (latents, pictures))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.mixed_precision):
            output, _ = self.module(latents)
        loss = reconstruction_loss(output.float(), target.movedim(-1, 2).float() / 127.5 - 1)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    def _finite(self, loss: Tensor) -> float:
        value = loss.item()
        if not math.isfinite(value):
            raise UserError(
                f"the loss is {value} at step {self.step}: give a lower --learning_rate and another --output_dir"
            )
        return value
