"""The end of a run: the deliverable, and the mark that says that it is complete."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.cogvideox.pipeline_io import INDEX_NAME
from common.config.errors import UserError
from common.config.files import flush_to_disk
from common.training.checkpoints import EXPORT_ONLY, base_digest, check_same_base, check_same_run
from common.training.objective import Objective

MARK = "training_finished.json"
SETTINGS = "settings.json"  # of the newest run in a folder


def is_finished(output_dir: Path, settings: Any) -> bool:
    """True if a run with these settings has been exported; False if it is to be exported otherwise. UserError if it was
    one with other settings, or from a base that has been trained anew since."""
    mark = output_dir / MARK
    if not mark.is_file() or settings.resume_from_checkpoint != "latest":
        return False
    finished = json.loads(mark.read_text())
    check_same_run(output_dir, finished["settings"], settings)
    check_same_base(output_dir, finished, base_digest(settings), settings)
    before, now = finished["settings"], settings.to_dict()
    exported_alike = all(before[name] == now[name] for name in EXPORT_ONLY if name in before and name in now)
    return finished["step"] >= settings.max_train_steps and exported_alike


def finished_steps(output_dir: Path) -> int:
    """Of the run whose result is there; 0 without one."""
    mark = output_dir / MARK
    return json.loads(mark.read_text())["step"] if mark.is_file() else 0


def check_result_is_kept(output_dir: Path, step: int) -> None:
    """UserError if a run that begins at `step` would replace the result of one that went beyond, or a pipeline that was
    not trained here: fused, imported or downloaded.

    Where that one's checkpoints are, `is_finished` and `find_checkpoint` have answered; here they were removed.
    """
    if (output_dir / INDEX_NAME).is_file() and not any((output_dir / name).is_file() for name in (MARK, SETTINGS)):
        raise UserError(f"output_dir: {output_dir} holds a pipeline that no training made; choose another output_dir")
    finished = finished_steps(output_dir)
    if finished > step:
        raise UserError(
            f"output_dir: {output_dir} holds the result of a run of {finished} steps, but no checkpoint of its end; "
            f"training would begin at step {step} and replace it. Restore checkpoint-{finished} to go on, choose "
            f"another output_dir, or remove {MARK} there to train anew"
        )


def make_skeleton(module: nn.Module) -> nn.Module:
    """A copy of `module` whose parameters take no memory, to be filled when FSDP2's sharded weights are gathered.

    Buffers are copied as they are: some are computed when the model is built and in no state dict.
    """
    empty = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        for parameter in module.parameters()
    }
    return copy.deepcopy(module, memo=empty)


def export_pipeline(
    objective: Objective,
    output_dir: Path,
    step: int,
    settings: Any,
    base: str | None,
) -> None:
    """Calls `objective.export` with an unwrapped module, then writes the mark. UserError if what is exported would be
    added to another base than the run started from.

    Args:
        objective: its weights are whole.
        base: digest of the weights that the run started from, for the mark.
    """
    if objective.adds_to_base:
        check_same_base(output_dir, {"base": base}, base_digest(settings), settings)
    mark = output_dir / MARK
    mark.unlink(missing_ok=True)  # of a shorter run that this one prolongs
    objective.module = objective.plain_module
    objective.module.eval()
    with torch.no_grad():
        objective.export(output_dir)
    partial = mark.with_suffix(".tmp")
    partial.write_text(json.dumps({"step": step, "base": base, "settings": settings.to_dict()}, indent=2) + "\n")
    flush_to_disk(partial)
    partial.replace(mark)
    flush_to_disk(output_dir)
