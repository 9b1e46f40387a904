"""Adds a LoRA to the weights of its base and writes the sum as a plain diffusers pipeline directory.

    python stage1/fuse_lora_weights.py --pretrained_model_path models/CogVideoX-2b --lora_path outputs/stage1 \
        --output_dir outputs/stage1_fused

The result holds no trace of the LoRA: plain diffusers loads it, and it is stage 2's base.
"""

import argparse
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from common.cogvideox.loading import DTYPES
from common.cogvideox.lora import add_lora, find_lora_file
from common.cogvideox.pipeline_io import INDEX_NAME, load_component, read_model_index, write_pipeline
from common.config.command_line import ArgumentParser, positive_number, refuse_unwritable
from common.config.errors import UserError, run_cli
from common.config.model_directory import resolve_pipeline_directory


def fuse_lora_weights(
    pretrained_model_path: str,
    lora_path: str,
    output_dir: str,
    lora_scale: float = 1.0,
    dtype: torch.dtype | None = None,
    lora_alpha: float | None = None,
) -> None:
    """W ← W + lora_scale · alpha/r · B·A for every pair in the LoRA.

    Args:
        lora_path: a directory with pytorch_lora_weights.safetensors, or such a file, also in ComfyUI's forms.
        lora_scale: 1 is the strength it was trained at.
        dtype: of the written transformer; by default the base's. The sum is formed in float32.
        lora_alpha: alpha, for a file that does not say it (diffusers before 0.34); None assumes alpha = r.

    Raises:
        UserError: a path does not hold what it should, or the LoRA belongs to another model.
    """
    read_model_index(pretrained_model_path, expected="CogVideoXPipeline")
    if Path(output_dir).resolve() == Path(pretrained_model_path).resolve():
        raise UserError(f"--output_dir {output_dir} is the base itself; give another directory")
    if (Path(output_dir) / INDEX_NAME).is_file():
        there = read_model_index(output_dir)["_class_name"]
        if there != "CogVideoXPipeline":  # an earlier fused one may be replaced
            raise UserError(f"--output_dir {output_dir} holds a {there}; give another directory")
    lora_file = find_lora_file(lora_path)
    refuse_unwritable(output_dir, "--output_dir")
    dtype = dtype or stored_dtype(resolve_pipeline_directory(pretrained_model_path) / "transformer")
    transformer = load_component(pretrained_model_path, "transformer")
    add_lora(transformer, lora_file, lora_alpha)
    transformer.fuse_lora(lora_scale=lora_scale, safe_fusing=True)
    transformer.unload_lora()
    nn.Module.to(transformer, dtype)  # diffusers' own `to` warns of an empty list of float32 modules
    write_pipeline(output_dir, pretrained_model_path, "CogVideoXPipeline", {"transformer": transformer})


def stored_dtype(directory: Path) -> torch.dtype:
    """Type of the weights in a component's first safetensors file."""
    file = min(directory.glob("*.safetensors"), default=None)
    if file is None:
        return torch.float32
    with safe_open(file, "pt") as weights:
        return weights.get_tensor(next(iter(weights.keys()))).dtype


def add_lora_option(parser: argparse.ArgumentParser) -> None:
    """--lora_alpha, for every program that reads a LoRA."""
    parser.add_argument("--lora_alpha", type=positive_number, help="for a file that does not say it; else alpha = rank")


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--pretrained_model_path", required=True, help="the base that the LoRA was trained on")
    parser.add_argument("--lora_path", required=True, help="stage 1's output_dir, or a LoRA file")
    parser.add_argument("--output_dir", required=True, help="where the fused pipeline goes")
    parser.add_argument("--lora_scale", type=float, default=1.0, help="1 is the strength it was trained at")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the written weights; the base's by default")
    add_lora_option(parser)
    args = parser.parse_args()
    dtype = DTYPES[args.dtype] if args.dtype else None
    fuse_lora_weights(
        args.pretrained_model_path, args.lora_path, args.output_dir, args.lora_scale, dtype, args.lora_alpha
    )
    print(f"fused pipeline: {args.output_dir}")


if __name__ == "__main__":
    run_cli(main)
