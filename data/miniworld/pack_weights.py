r"""Packs pipeline directories for shipping: float16 weights, and no component twice.

    python -m data.miniworld.pack_weights --output_dir data/miniworld/weights \
        base=outputs/miniworld/base stage1=outputs/miniworld/stage1 stage4=outputs/miniworld/stage4

writes weights/base/ and weights/stage4/, each a complete pipeline directory, and weights/stage1/, a LoRA. A component
that equals the one of a pipeline named before it becomes a link to that: weights/stage4/vae -> ../base/vae.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.cogvideox.pipeline_io import INDEX_NAME, LORA_NAME, read_model_index
from common.config.command_line import ArgumentParser, refuse_unwritable
from common.config.errors import UserError, run_cli

LARGEST_FILE = 16_000_000  # bytes


def pack_file(source: Path, target: Path) -> None:
    """A copy of one file: weights in float16, with the same metadata; a config without its origin."""
    if source.suffix == ".json":
        content = json.loads(source.read_text())
        if content.pop("_name_or_path", None):  # where it was loaded from, on the machine that trained it
            target.write_text(json.dumps(content, indent=2) + "\n")
            return
    if source.suffix != ".safetensors":
        shutil.copyfile(source, target)
        return
    with safe_open(source, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        metadata = file.metadata()
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = tensor.half()
            if not torch.isfinite(tensors[name]).all():
                raise UserError(f"{source}: {name} does not fit into float16")
    save_file(tensors, target, metadata=metadata)
    if target.stat().st_size > LARGEST_FILE:
        size = target.stat().st_size / 1e6
        raise UserError(f"{source} takes {size:.1f} MB in float16; at most {LARGEST_FILE / 1e6:.0f} are shipped")


def same_files(a: Path, b: Path) -> bool:
    """True when two directories hold the same files with the same content."""
    names = sorted(path.name for path in a.iterdir())
    return names == sorted(path.name for path in b.iterdir()) and not any(filecmp.cmpfiles(a, b, names, False)[1:])


def pack_pipeline(source: Path, target: Path, before: list[Path]) -> None:
    """Packs one pipeline directory; `before` are those packed already, whose components it may share."""
    index = read_model_index(source)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    shutil.copyfile(source / INDEX_NAME, target / INDEX_NAME)
    for component in sorted(name for name in index if (source / name).is_dir()):
        (target / component).mkdir()
        for file in sorted((source / component).iterdir()):
            pack_file(file, target / component / file.name)
        for other in before:
            if (other / component).is_dir() and same_files(target / component, other / component):
                shutil.rmtree(target / component)
                (target / component).symlink_to(os.path.relpath(other / component, target), target_is_directory=True)
                break


def pack(args: argparse.Namespace) -> int:
    """Packs all pipelines; returns the bytes of what is in the output directory."""
    refuse_unwritable(args.output_dir, "--output_dir")
    packed: list[Path] = []
    for word in args.pipelines:
        name, _, source = word.partition("=")
        directory, target = Path(source), args.output_dir / name
        has_plain_name = Path(name).name == name and name not in ("", "..")
        is_lora, is_pipeline = ((directory / file).is_file() for file in (LORA_NAME, INDEX_NAME))
        if not (has_plain_name and source and (is_lora or is_pipeline)):
            raise UserError(f"{word}: give NAME=DIRECTORY: a plain NAME, and a pipeline's directory or stage 1's LoRA")
        if directory.resolve().is_relative_to(target.resolve()):
            raise UserError(f"{word}: would be written over itself; choose another --output_dir")
        if is_lora:
            target.mkdir(parents=True, exist_ok=True)
            pack_file(directory / LORA_NAME, target / LORA_NAME)
        else:
            pack_pipeline(directory, target, packed)
            packed.append(target)
    return sum(path.stat().st_size for path in args.output_dir.rglob("*") if path.is_file() and not path.is_symlink())


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("pipelines", nargs="+", help="NAME=DIRECTORY; those named first lend their components")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder that gets a directory for each NAME")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_arguments()
    print(f"{args.output_dir}: {pack(args) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_cli(main)
