"""What the trained parts of the mini base model share: where they are put, how long and in which steps they train."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.config.errors import UserError
from common.config.files import replace_text, replacing
from common.training.step_graph import StepGraph

WARM_UP = 0.05  # share of the budget
LOOK_EVERY = 10  # steps; reading the loss waits for the device

# These do not change what is trained.
IGNORED_ON_RESUME = ("device", "compile", "output_dir", "data_root", "index_file", "vae_index_file", "init_vae")

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Budget:
    """How long to train: `steps` when given, else `minutes` of training (interrupted runs added up)."""

    steps: int = 0
    minutes: float = 0.0

    def progress(self, step: int, seconds: float) -> float:
        """0 at the start, 1 when done."""
        if not (self.steps or self.minutes):
            return 1.0
        return step / self.steps if self.steps else min(seconds / (60 * self.minutes), 1.0)


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first 5 %, then a cosine to zero."""
    return peak * min((progress + 1e-3) / WARM_UP, 1.0) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class Workplace:
    """The output directory: which parts are finished, and how they get there (beside first, then renamed)."""

    def __init__(self, args: argparse.Namespace):
        self.output_dir: Path = args.output_dir
        self.partial = self.output_dir / ".partial"
        settings = {k: v for k, v in vars(args).items() if k not in IGNORED_ON_RESUME}
        stamp = self.output_dir / "make_base.json"
        if stamp.exists():
            found = json.loads(stamp.read_text())["settings"]
            changed = [f"{k} {found.get(k)} -> {v}" for k, v in settings.items() if found.get(k) != v]
            if changed:
                raise UserError(
                    f"{self.output_dir} was begun with other settings ({', '.join(changed)}); "
                    "give those, or another --output_dir, or delete that one"
                )
        self.partial.mkdir(parents=True, exist_ok=True)
        self.record = json.loads(stamp.read_text()) if stamp.exists() else {"settings": settings}
        self.note()

    def note(self, **figures: object) -> None:
        """Keeps figures in make_base.json."""
        self.record.update(figures)
        replace_text(self.output_dir / "make_base.json", json.dumps(self.record, indent=1) + "\n")

    def has(self, name: str) -> bool:
        return (self.output_dir / name).is_dir()

    def finish(self, name: str, save: Callable[[Path], object]) -> None:
        """Puts a finished part in its place."""
        shutil.rmtree(self.partial / name, ignore_errors=True)
        save(self.partial / name)
        os.replace(self.partial / name, self.output_dir / name)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch_of_step: Callable[[int, float], Batch],
    loss_of_batch: Callable[[Batch], Tensor],
    budget: Budget,
    checkpoint: Path,
    description: str,
    checkpoint_seconds: float = 60.0,
) -> int:
    """Trains `model` until the budget is spent; returns the number of steps.

    `batch_of_step(step, progress)` draws from (seed, step), so a resumed run in steps sees what an unbroken one sees;
    `loss_of_batch` draws nothing. `optimizer` comes with its peak learning rate. The state goes to `checkpoint` every
    `checkpoint_seconds` and at the end.

    Raises:
        UserError: when the loss or its gradient is not finite; such weights are never saved.
    """
    step, seconds, peak = 0, 0.0, float(optimizer.param_groups[0]["lr"])
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
    device = next(model.parameters()).device
    rate = torch.zeros((), device=device)
    for group in optimizer.param_groups:
        group["lr"] = rate

    def step_of(batch: Batch, _: object) -> Tensor:
        loss = loss_of_batch(batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack([loss.detach(), norm])

    take_step = StepGraph(step_of, device)  # models this small wait for Python, not for the GPU

    def finite_loss(figures: Tensor) -> float:
        loss, norm = figures.tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(
                f"{description}: the loss is {loss} at step {step}, its gradient's norm {norm}: give a lower learning "
                "rate and another --output_dir"
            )
        return loss

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
        with replacing(checkpoint) as beside:
            torch.save(state, beside)

    model.train()
    figures = None  # the last step's loss and gradient norm
    last_save = time.monotonic()
    bar_format = "{desc} {percentage:5.1f}% |{bar}| {elapsed}<{remaining} {postfix}"
    with tqdm(total=1000, desc=description, bar_format=bar_format) as bar:
        while (progress := budget.progress(step, seconds)) < 1.0:
            started = time.monotonic()
            rate.fill_(learning_rate(progress, peak))
            figures = take_step(batch_of_step(step, progress))
            step += 1
            is_saving = time.monotonic() - last_save > checkpoint_seconds
            if is_saving or step % LOOK_EVERY == 0:
                bar.set_postfix_str(f"step {step}, loss {finite_loss(figures):.4f}")
            seconds += time.monotonic() - started
            bar.update(int(1000 * budget.progress(step, seconds)) - bar.n)
            if is_saving:
                save()
                last_save = time.monotonic()
    if figures is not None:
        finite_loss(figures)
        save()
    return step
