"""Checkpoints: `output_dir/checkpoint-N`, whole or not there at all.

    checkpoint-500/
      weights.safetensors     trained parameters and persistent buffers of the objective's module
      optimizer.safetensors   AdamW's moments
      ema.safetensors …       one file for each of the objective's checkpoint_modules
      state.json              step, sums of the log line under way, processes × batch, base (digest), clips
      settings.json           the settings of the run

The data's position, the learning rate and every random number are functions of the step (and of the seed), so the
step restores them. A checkpoint is written to `checkpoint-N.tmp`, flushed to the disk and renamed; what is deleted is
renamed first. A process killed at any moment leaves whole checkpoints and `.tmp` directories, which the next run
removes.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.config.errors import UserError
from common.config.files import flush_to_disk
from common.data.dataset import clip_identity
from common.data.fingerprint import component_digest
from common.data.index import ClipRecord
from common.training.optimizers import ENDLESS_SCHEDULES

NAME = re.compile(r"checkpoint-(\d+)")
DIGEST_FORMAT = 2  # of the base: since files are hashed whole up to 1 GiB

# What a resumed run may do otherwise than the run that wrote the checkpoint: none of it changes what is learnt, but for
# rounding.
# Everything that begins with "validation_" belongs here too, except validation_index_file, on which it depends what is
# held out of training. max_train_steps may change as long as the learning rate does not depend on it.
# train_batch_size may change with the number of processes: their product is compared.
MAY_CHANGE = (
    "output_dir", "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit", "report_to",
    "logging_steps", "dataloader_num_workers", "max_unreadable_share", "latent_cache_dir", "gradient_checkpointing",
    "train_batch_size", "compile", "cuda_graph", "activation_budget",
)  # fmt: skip


# What decides on nothing but the export: a finished run exports anew with another value, from its last checkpoint.
EXPORT_ONLY = ("learnt_share",)


def module_state(module: nn.Module) -> dict[str, Tensor]:
    """Trained parameters and persistent buffers, as they are (perhaps sharded)."""
    return {
        name: value
        for name, value in module.state_dict(keep_vars=True).items()
        if value.requires_grad or not isinstance(value, nn.Parameter)
    }


def load_module_state(module: nn.Module, state: dict[str, Tensor], where: Path) -> None:
    """The inverse of `module_state`, for a module that is not wrapped yet."""
    wanted = {name for name, p in module.named_parameters() if p.requires_grad}
    missing, unexpected = sorted(wanted - state.keys()), sorted(state.keys() - module.state_dict().keys())
    if missing or unexpected:
        what = f"lacks {missing[0]}" if missing else f"has {unexpected[0]}, which the model has not"
        raise UserError(f"{where} does not fit this model: it {what}; resume_from_checkpoint names another run's")
    module.load_state_dict(state, strict=False)


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, directory) of the whole checkpoints, oldest first."""
    if not output_dir.is_dir():
        return []
    found = [(NAME.fullmatch(path.name), path) for path in output_dir.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match and (path / "state.json").is_file())


def find_checkpoint(settings: Any) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means, or None to begin at step 0."""
    wanted, output_dir = settings.resume_from_checkpoint, Path(settings.output_dir)
    existing = list_checkpoints(output_dir)
    if wanted == "latest":
        return existing[-1][1] if existing else None
    start = None if wanted == "none" else Path(wanted)
    if start is not None and not (start / "state.json").is_file():
        hint = f"; {output_dir} has {', '.join(p.name for _, p in existing)}" if existing else ""
        raise UserError(f"resume_from_checkpoint: {start} is not a checkpoint directory{hint}")
    step = 0 if start is None else read_state(start)["step"]
    if existing and existing[-1][0] > step:
        # The next "latest" would be a mixture of two runs.
        raise UserError(
            f"output_dir: {existing[-1][1]} is from a run that went beyond step {step}; choose another output_dir, "
            "remove that checkpoint, or set resume_from_checkpoint to 'latest'"
        )
    return start


def read_state(checkpoint: Path) -> dict[str, Any]:
    return read_json(checkpoint, "state.json")


def read_json(checkpoint: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / name).read_text())
    except (OSError, ValueError) as error:
        raise damaged(checkpoint / name) from error


def damaged(path: Path) -> UserError:
    return UserError(f"resume_from_checkpoint: {path} is missing or damaged; resume from another checkpoint")


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    path = checkpoint / f"{name}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise damaged(path) from error


def write_checkpoint(
    output_dir: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], settings: Any
) -> Path:
    """Writes checkpoint-`step` so that it is either whole or absent. One process calls it."""
    final, partial = output_dir / f"checkpoint-{step}", output_dir / f"checkpoint-{step}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, values in tensors.items():
        save_file(values, partial / f"{name}.safetensors")
    settings.save(partial / "settings.json")
    (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=2) + "\n")
    for path in [*partial.iterdir(), partial]:
        flush_to_disk(path)
    if final.exists():
        delete_directory(final)
    partial.rename(final)
    flush_to_disk(output_dir)
    return final


def keep_newest(output_dir: Path, limit: int | None) -> None:
    """Deletes the oldest checkpoints beyond `limit`."""
    checkpoints = list_checkpoints(output_dir)
    for _, path in checkpoints[: -limit if limit else 0]:
        delete_directory(path)


def remove_leftovers(output_dir: Path) -> None:
    """Removes what a killed run left half written or half deleted."""
    for path in output_dir.glob("checkpoint-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def delete_directory(path: Path) -> None:
    doomed = path.with_name(f"{path.name}.deleted.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def check_same_run(where: Path, saved: dict[str, Any], settings: Any) -> None:
    """Refuses to continue in `where` with settings that would train something else, naming each of them.

    Args:
        saved: the settings of the run that wrote `where`.
    """
    # What runs did before there was a setting for it.
    now, saved = settings.to_dict(), {"rank": 0, "key_press_share": 0.0, **saved}
    differences = [
        f"{name} was {saved[name]!r}, is {now[name]!r}"
        for name in now
        if name in saved and not _may_differ(name, settings) and not _same(name, saved, now)
    ]
    if differences:
        raise UserError(
            f"{where} was made with other settings: {'; '.join(differences)}; restore them or choose another output_dir"
        )


def base_digest(settings: Any) -> str | None:
    """A hash of the weights that the run starts from, wherever they lie; None for a hub id, which stays as it is.

    It costs reading 1 GB of a file at most (see fingerprint.py), whatever the models' sizes.
    """
    transformers = [Path(model) / "transformer" for model in settings.starting_models()]
    digests = [component_digest(transformer) for transformer in transformers if transformer.is_dir()]
    return f"{DIGEST_FORMAT}:{'+'.join(digests)}" if digests else None


def check_same_base(where: Path, saved: dict[str, Any], digest: str | None, settings: Any) -> None:
    """Refuses to continue, or to call finished, what was trained from weights that have been replaced since.

    Args:
        saved: holds "base", the digest when the run that wrote `where` started.
        digest: now.
    """
    before, now = ((text or "").partition(":") for text in (saved.get("base"), digest))
    if before != now and before[0] == now[0]:  # an earlier version's cannot be compared
        raise UserError(
            f"{where} was trained from {' and '.join(settings.starting_models())}, whose transformer has changed "
            f"since; to train anew remove {settings.output_dir} or choose another output_dir"
        )


def describe_clips(records: Sequence[ClipRecord]) -> dict[str, Any]:
    """How many clips there are, and a hash of which and in what order: on this depends what is trained on when."""
    identities = "\n".join(map(clip_identity, records))
    return {"number": len(records), "digest": hashlib.blake2b(identities.encode(), digest_size=8).hexdigest()}


def _may_differ(name: str, settings: Any) -> bool:
    if name == "max_train_steps":
        return settings.lr_scheduler in ENDLESS_SCHEDULES
    return name in (*MAY_CHANGE, *EXPORT_ONLY) or (name.startswith("validation_") and name != "validation_index_file")


def _same(name: str, saved: dict[str, Any], now: dict[str, Any]) -> bool:
    if saved[name] == now[name]:
        return True
    # A tree of directories that was moved as a whole: the same path, seen from the run's own directory.
    old, new = saved[name], now[name]
    if not (isinstance(old, str) and isinstance(new, str) and os.path.isabs(old) and os.path.isabs(new)):
        return False
    return os.path.relpath(old, saved["output_dir"]) == os.path.relpath(new, now["output_dir"])
