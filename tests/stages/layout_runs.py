"""Trains what a plan says, run after run, in the processes that accelerate has started; for test_processes.py.

    python -m common.tools.launch --config_file scripts/accelerate/fsdp2.yaml … tests/stages/layout_runs.py PLAN.json

A plan is a list of runs: "config" and "words" of a launch line, "layout" ("ddp" or "fsdp2"), "mixed_precision". Each
process writes PLAN.json.RANK: for every run the share of each role's elements that it held.
"""

import functools
import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from common.config.loader import load_settings
from common.training import accelerator, state, trainer
from common.training.sharding import local_part


def let_accelerate_shard_on_a_cpu() -> None:
    """On CPUs accelerate takes FSDP2's configuration and runs DDP. Here what it does on GPUs is done after it."""
    start = AcceleratorState.__init__

    def start_sharded(self, *args, fsdp_plugin=None, **more):
        start(self, *args, fsdp_plugin=fsdp_plugin, **more)
        if fsdp_plugin is not None:
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = start_sharded
    PartialState.destroy_process_group = lambda self, group=None: None  # the next run meets in the same one


class Trainer(trainer.Trainer):
    """Counts, at the end of training, what this process holds of the models."""

    def loop(self, stop) -> bool:
        completed = super().loop(stop)
        roles = {"module": self.objective.plain_module, **self.objective.frozen_roles()}
        self.shares = {name: share_held_here(role) for name, role in roles.items()}
        return completed


def share_held_here(module: torch.nn.Module) -> float:
    """Elements of the module's parameters in this process's memory, of all; gathered ones count whole."""
    parameters = list(module.parameters())
    here = sum(local_part(p).numel() for p in parameters)
    return here / sum(p.numel() for p in parameters)


def main(plan: Path) -> None:
    let_accelerate_shard_on_a_cpu()
    # Traced and checked as strictly, without making C++ of it.
    torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    shares = []
    for run in json.loads(plan.read_text()):
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ["ACCELERATE_USE_FSDP"] = str(run["layout"] == "fsdp2").lower()
        dtype = torch.bfloat16 if run["mixed_precision"] == "bf16" else torch.float32
        for module in (accelerator, state):  # of itself the trainer takes bf16 on GPUs alone
            module.compute_dtype = lambda settings, device, dtype=dtype: dtype
        settings = load_settings(run["config"], run["words"])
        training = Trainer(settings, settings.build_objective())
        training.train()
        assert training.accelerator.is_fsdp2 == (run["layout"] == "fsdp2")
        shares.append(training.shares)
    plan.with_name(f"{plan.name}.{os.environ['RANK']}").write_text(json.dumps(shares))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
