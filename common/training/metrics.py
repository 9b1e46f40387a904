"""The log: means since the last line, without waiting for the device in between, to JSONL and to the trackers."""

import json
import math
import uuid
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from common.config.errors import UserError
from common.config.files import replace_text


class Means:
    """Sums of scalars on the device; `read` waits for it and averages over processes and steps."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds one step's scalars. Within a step all processes have the same names."""
        for name, value in values.items():
            value = value.detach().to(torch.float64, copy=True)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Means since the last reading. All processes call it together."""
        totals = self._totals(accelerator)
        means = {name: totals[name] / (self.counts[name] * accelerator.num_processes) for name in totals}
        self.sums, self.counts = {}, {}
        return means

    def state(self, accelerator: Accelerator) -> dict[str, Any]:
        """The sums of a mean process, for a checkpoint between two log lines: any number of processes may go on."""
        sums = {name: total / accelerator.num_processes for name, total in self._totals(accelerator).items()}
        return {"sums": sums, "counts": dict(self.counts)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.sums = {
            name: torch.tensor(value, dtype=torch.float64, device=self.device) for name, value in state["sums"].items()
        }
        self.counts = dict(state["counts"])

    def _totals(self, accelerator: Accelerator) -> dict[str, float]:
        if not self.sums:
            return {}
        names = sorted(self.sums)
        totals = accelerator.reduce(torch.stack([self.sums[name] for name in names]), reduction="sum")
        return dict(zip(names, totals.tolist(), strict=True))


class FiniteGuard:
    """Notices the first step whose loss or gradient is not finite, and which samples it was made of.

    `note` costs the device a comparison; `check` waits for it. The weights are lost from that step on, so `check` comes
    before every checkpoint and every log line.
    """

    def __init__(self, device: torch.device):
        self.first_bad = torch.full((2,), -1, dtype=torch.int64, device=device)  # of the loss, of the gradient
        self.sample_ids: dict[int, list[str]] = {}

    def note(self, step: int, sample_ids: list[str], loss: Tensor, grad_norm: Tensor) -> None:
        bad = ~torch.isfinite(torch.stack([loss.detach().float(), grad_norm.detach().float()]))
        self.first_bad = torch.where(bad & (self.first_bad < 0), step, self.first_bad)
        self.sample_ids[step] = sample_ids

    def check(self, accelerator: Accelerator) -> None:
        """Raises UserError on all processes if any of them noted a bad step. All call it together."""
        every = accelerator.gather(self.first_bad[None])  # [processes, 2]
        bad = [(step, kind) for row in every.tolist() for kind, step in enumerate(row) if step >= 0]
        if bad:
            step, kind = min(bad)
            samples = gather_object(self.sample_ids.get(step, []))
            raise UserError(
                f"{('the loss', 'the gradient')[kind]} is not finite at step {step}, on the batch "
                f"{', '.join(samples)}; look at these clips, or lower learning_rate or max_grad_norm. The last "
                "checkpoint is from before this step"
            )
        self.sample_ids.clear()


class RunLog:
    """`output_dir/logs/metrics.jsonl`, one JSON object a line, and accelerate's trackers. Main process only.

    Args:
        start_step: lines of later steps are dropped: the run that wrote them was killed, and they are done again. A run
            that begins at 0 does step 0, the first validation, again as well.
    """

    def __init__(self, output_dir: Path, start_step: int, report_to: str, accelerator: Accelerator):
        self.accelerator = accelerator
        self.path = output_dir / "logs" / "metrics.jsonl"
        if not accelerator.is_main_process:
            return
        first_step = start_step + 1 if start_step else 0  # of the lines to come
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) < first_step]
            replace_text(self.path, "".join(line + "\n" for line in kept))
        if report_to != "none":
            identity = self._wandb_identity(start_step) if report_to == "wandb" else {}
            options = {"tensorboard": {"purge_step": first_step}, "wandb": {"name": output_dir.name, **identity}}
            name = {"tensorboard": "tensorboard", "wandb": "interactive-video-worlds"}[report_to]
            accelerator.init_trackers(name, init_kwargs={report_to: options[report_to]})

    def _wandb_identity(self, start_step: int) -> dict[str, str]:
        """Has wandb go on with the run whose id lies beside the log; what begins at step 0 is a new one.

        Of steps that are done again wandb keeps the first values.
        """
        path = self.path.with_name("wandb_id.txt")
        if start_step == 0 or not path.is_file():
            replace_text(path, uuid.uuid4().hex + "\n")
        return {"id": path.read_text().strip(), "resume": "allow"}

    def has_validation(self, step: int) -> bool:
        """True if the line of a validation at `step` is there."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return any(_step_of(line) == step and '"validation/' in line for line in lines)

    def write(self, step: int, values: dict[str, float | None]) -> None:
        """Appends a line; None and what is not finite become null, so that every line is JSON."""
        if not self.accelerator.is_main_process:
            return
        clean = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **clean}) + "\n")
        self.accelerator.log({k: v for k, v in clean.items() if v is not None}, step=step)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # the half line of a killed process
