"""What the trained parts of the mini base model share: a budget of steps or minutes, a loop that survives a kill."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

WARM_UP = 0.05  # share of the budget


@dataclass(frozen=True)
class Budget:
    """How long to train: `steps` when given, else `minutes` of training (interrupted runs added up)."""

    steps: int = 0
    minutes: float = 0.0

    def progress(self, step: int, seconds: float) -> float:
        """0 at the start, 1 when done."""
        return step / self.steps if self.steps else min(seconds / max(60 * self.minutes, 1e-9), 1.0)


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first 5 %, then a cosine to zero."""
    return peak * min((progress + 1e-3) / WARM_UP, 1.0) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def save_beside(state: object, path: Path) -> None:
    """torch.save to a temporary name, then renamed: a kill leaves the old file whole."""
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of_step: Callable[[int, float], tuple[Tensor, dict[str, float]]],
    budget: Budget,
    checkpoint: Path,
    description: str,
    checkpoint_seconds: float = 60.0,
) -> int:
    """Trains `model` until the budget is spent; returns the number of steps.

    `loss_of_step(step, progress)` draws its batch from (seed, step), so a resumed run in steps sees what an unbroken
    one sees. The peak learning rate is what each parameter group of `optimizer` holds as "peak_lr". Gradients are
    clipped to norm 1. The state goes to `checkpoint` every `checkpoint_seconds` and at the end.

    Raises:
        FloatingPointError: when a loss is not finite.
    """
    step, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
        save_beside(state, checkpoint)

    model.train()
    last_save = time.monotonic()
    bar_format = "{desc} {percentage:5.1f}% |{bar}| {elapsed}<{remaining} {postfix}"
    with tqdm(total=1000, desc=description, bar_format=bar_format) as bar:
        while (progress := budget.progress(step, seconds)) < 1.0:
            started = time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, group["peak_lr"])
            loss, metrics = loss_of_step(step, progress)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 10 == 0:  # reading the loss waits for the device
                value = loss.item()
                if not math.isfinite(value):
                    raise FloatingPointError(f"{description}: the loss is {value} at step {step}")
                shown = {"step": step, "loss": f"{value:.4f}", **metrics}
                bar.set_postfix_str(", ".join(f"{name} {figure}" for name, figure in shown.items()))
            step += 1
            seconds += time.monotonic() - started
            bar.update(int(1000 * budget.progress(step, seconds)) - bar.n)
            if time.monotonic() - last_save > checkpoint_seconds:
                save()
                last_save = time.monotonic()
    save()
    return step
