"""Pipeline directories: reading their components, and writing a stage's result as a complete one.

A directory holds model_index.json and one folder a component. What holds only diffusers' and transformers' classes
(base models, stage 1 fused) loads in plain diffusers. From stage 2 on the index names our classes, which
diffusers' `from_pretrained` refuses, so our pipelines load them here.
"""

import importlib
import inspect
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from common.cogvideox.autoencoder import make_streamable
from common.config.errors import UserError, one_line
from common.config.files import replace_text
from common.config.model_directory import resolve_pipeline_directory

INDEX_NAME = "model_index.json"
LORA_NAME = "pytorch_lora_weights.safetensors"
BASE_COMPONENTS = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")
OWN_MODULES = re.compile(r"common\.cogvideox(\.\w+)+")  # an index is data: it names no other module to import

# `_class_name` of the index → what such a directory is, in words.
PIPELINE_KINDS = {
    "CogVideoXPipeline": "a text-to-video pipeline (a base model, or stage 1 fused)",
    "CogVideoXControlPipeline": "a controlled pipeline (stage 2)",
    "CogVideoXStreamingPipeline": "a streaming pipeline (stage 3 or 4)",
}


def read_model_index(path: str | Path, expected: str | tuple[str, ...] = ()) -> dict[str, Any]:
    """model_index.json of a complete pipeline directory.

    Args:
        expected: the `_class_name` it must have, or several of which one; keys of `PIPELINE_KINDS`.

    Raises:
        UserError: no such directory, no pipeline, a component missing, or another kind of pipeline.
    """
    directory = resolve_pipeline_directory(path)
    if not (directory / INDEX_NAME).is_file():
        if (directory / LORA_NAME).is_file():
            raise UserError(
                f"{directory} holds a LoRA, not a pipeline: fuse it first with "
                f"stage1/fuse_lora_weights.py --lora_path {directory} --pretrained_model_path … --output_dir …"
            )
        raise UserError(f"{directory} is no pipeline directory: {INDEX_NAME} is missing (has the stage finished?)")
    try:
        index = json.loads((directory / INDEX_NAME).read_text())
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(f"{directory / INDEX_NAME} is not valid JSON: {error}") from error
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if kind not in PIPELINE_KINDS:
        raise UserError(f"{directory} holds a {kind}, not CogVideoX; known are {', '.join(PIPELINE_KINDS)}")
    for name in BASE_COMPONENTS:
        if not index.get(name) or not (directory / name).is_dir():
            raise UserError(
                f"{directory} is incomplete: the component {name!r} is missing; copy it there whole, with "
                f"{', '.join(BASE_COMPONENTS)}"
            )
    expected = (expected,) if isinstance(expected, str) else expected
    if expected and kind not in expected:
        belongs = ", or ".join(PIPELINE_KINDS[one] for one in expected)
        raise UserError(f"{directory} is {PIPELINE_KINDS[kind]}; here belongs {belongs}")
    return index


def component_class(directory: Path, name: str, index: dict[str, Any]) -> type:
    """The class that a pipeline directory's index names for a component: diffusers', transformers' or ours."""
    if name not in index:
        raise UserError(f"{directory} has no component {name!r}: {INDEX_NAME} names none")
    library, class_name = index[name]
    if library in ("diffusers", "transformers"):
        owner = {"diffusers": diffusers, "transformers": transformers}[library]
    elif isinstance(library, str) and OWN_MODULES.fullmatch(library):
        owner = importlib.import_module(library)
    else:
        raise UserError(f"{directory / INDEX_NAME} names an unknown library {library!r} for {name}")
    if not hasattr(owner, class_name):
        raise UserError(f"{directory / INDEX_NAME} names an unknown class {library}.{class_name} for {name}")
    return getattr(owner, class_name)


def component_config(directory: Path, name: str, index: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    """Class and config of one of diffusers' components, without its weights; what an older file leaves out has its
    default."""
    stored_class = component_class(directory, name, index)
    parameters = inspect.signature(stored_class).parameters.values()
    defaults = {
        parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty
    }
    try:
        return stored_class, {**defaults, **stored_class.load_config(directory / name)}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory / name} holds no config of a {stored_class.__name__}: {one_line(error)}"
        ) from error


def load_component(
    path: str | Path, name: str, torch_dtype: torch.dtype | None = None, index: dict[str, Any] | None = None
) -> Any:
    """One component of a pipeline directory; modules in eval mode and in `torch_dtype` (float32 by default).

    Weights in one safetensors file or in several; a `UserError` names the first keys that are missing, too many, or of
    another shape than the config says, where diffusers would draw them at random or pass over them.
    """
    directory = resolve_pipeline_directory(path)
    loaded_class = component_class(directory, name, index or read_model_index(directory))
    arguments = {}
    if issubclass(loaded_class, torch.nn.Module):
        is_transformers = issubclass(loaded_class, transformers.PreTrainedModel)
        arguments["dtype" if is_transformers else "torch_dtype"] = torch_dtype or torch.float32
        arguments |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # told below, all in one line
    try:
        with _without_loading_reports():
            component = loaded_class.from_pretrained(directory / name, **arguments)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{directory / name} could not be loaded as {loaded_class.__name__}: {_first_line(error)}"
        ) from error
    if arguments:
        component, info = component
        refuse_other_keys(directory / name, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    if isinstance(component, diffusers.AutoencoderKLCogVideoX):
        make_streamable(component)  # diffusers decodes an even number of latents to three frames too many
    return component.eval() if isinstance(component, torch.nn.Module) else component


@contextmanager
def _without_loading_reports() -> Iterator[None]:
    """diffusers and transformers list differing keys over many lines, and go on; `refuse_other_keys` says it in one."""
    loggers = [logging.getLogger(f"{name}.modeling_utils") for name in ("diffusers.models", "transformers")]

    def is_error(record: logging.LogRecord) -> bool:  # a filter: at another level transformers reports other things
        return record.levelno >= logging.ERROR

    try:
        for logger in loggers:
            logger.addFilter(is_error)
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_error)


def refuse_other_keys(
    where: Path, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[tuple]
) -> None:
    """UserError with the first keys in which weights differ from the model.

    Args:
        where: the file or folder of the weights.
        mismatched: (key, shape in the file, shape in the model).
    """
    shapes = [f"{key} {list(found)}, not {list(wanted)}" for key, found, wanted in sorted(mismatched)]
    kinds = {"missing": sorted(missing), "not the model's": sorted(unexpected), "of another shape": shapes}
    told = [
        f"{len(keys)} keys are {kind} ({', '.join(keys[:3])}{', …' * (len(keys) > 3)})"
        for kind, keys in kinds.items()
        if keys
    ]
    if told:
        raise UserError(
            f"{where}: the weights are not those of the model that config.json describes: {'; '.join(told)}"
        )


def load_components(path: str | Path, torch_dtype: torch.dtype | None = None, **given: Any) -> dict[str, Any]:
    """All components of a pipeline directory, name → object; those passed by name are not loaded."""
    directory = resolve_pipeline_directory(path)
    index = read_model_index(directory)
    names = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None]
    return {
        name: given[name] if name in given else load_component(directory, name, torch_dtype, index) for name in names
    }


def write_pipeline(
    output_dir: str | Path, base_dir: str | Path | None, pipeline_class: str, replaced: dict[str, Any]
) -> None:
    """Writes a complete pipeline directory: `replaced` components anew, the others (if any) linked from `base_dir`.

    Links are hard where the file system allows (no space is taken twice), else copies. Every folder is written
    beside and renamed, the index goes first and comes last: a directory with an index is complete.
    """
    output_dir, base_index = Path(output_dir), {}
    if base_dir is not None:
        base_dir = resolve_pipeline_directory(base_dir)
        base_index = read_model_index(base_dir)
    index: dict[str, Any] = {"_class_name": pipeline_class, "_diffusers_version": diffusers.__version__}
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / INDEX_NAME).unlink(missing_ok=True)
    for name in [*(n for n, entry in base_index.items() if isinstance(entry, list)), *replaced]:
        if name in index:
            continue
        if name in replaced:
            index[name] = [library_of(replaced[name]), type(replaced[name]).__name__]
            replace_directory(output_dir / name, replaced[name].save_pretrained)
        else:
            index[name] = base_index[name]
            if base_index[name][0] is not None:
                replace_directory(output_dir / name, lambda target, name=name: _link_tree(base_dir / name, target))
    replace_text(output_dir / INDEX_NAME, json.dumps(index, indent=2) + "\n")


def replace_directory(target: Path, write: Any) -> None:
    """Calls `write(path)` on a new directory beside `target`, then puts it in the target's place.

    On an error the target stays as it was, and nothing is left beside it.
    """
    temporary, old = target.with_name(f".{target.name}.tmp"), target.with_name(f".{target.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write(temporary)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        temporary.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def library_of(component: Any) -> str:
    """What an index names as the library of a component: diffusers, transformers, or our own module."""
    module = type(component).__module__
    return module if OWN_MODULES.fullmatch(module) else module.split(".")[0]


def _link_tree(source: Path, target: Path) -> None:
    """Copies a folder by hard links; resolves symbolic links first (hub snapshots are made of them)."""

    def link(src: str, dst: str) -> str:
        src = os.path.realpath(src)
        try:
            os.link(src, dst)
        except OSError:  # another file system, or one without hard links
            shutil.copy2(src, dst)
        return dst

    shutil.copytree(source, target, copy_function=link)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
