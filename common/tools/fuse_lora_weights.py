"""Adds a LoRA to the weights of its base and writes the sum as a plain diffusers pipeline directory.

    python stage1/fuse_lora_weights.py --pretrained_model_path models/CogVideoX-2b --lora_path outputs/stage1 \
        --output_dir outputs/stage1_fused

The result holds no trace of the LoRA: plain diffusers loads it, and it is stage 2's base.
"""

from pathlib import Path

import torch
from diffusers import CogVideoXPipeline
from safetensors import SafetensorError, safe_open
from torch import nn

from common.cogvideox.loading import DTYPES
from common.cogvideox.pipeline_io import LORA_NAME, load_component, read_model_index, write_pipeline
from common.config.command_line import ArgumentParser, refuse_unwritable
from common.config.errors import UserError, run_cli
from common.config.model_directory import resolve_pipeline_directory


def fuse_lora_weights(
    pretrained_model_path: str,
    lora_path: str,
    output_dir: str,
    lora_scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> None:
    """W ← W + lora_scale · alpha/r · B·A for every pair in the LoRA, alpha and r from the file's metadata.

    Args:
        lora_path: a directory with pytorch_lora_weights.safetensors, or such a file. Without metadata alpha = r.
        lora_scale: 1 is the strength it was trained at.
        dtype: of the written transformer; by default the base's. The sum is formed in float32.

    Raises:
        UserError: a path does not hold what it should, or the LoRA belongs to another model.
    """
    read_model_index(pretrained_model_path, expected="CogVideoXPipeline")
    if Path(output_dir).resolve() == Path(pretrained_model_path).resolve():
        raise UserError(f"--output_dir {output_dir} is the base itself; give another directory")
    lora_file = find_lora_file(lora_path)
    refuse_unwritable(output_dir, "--output_dir")
    dtype = dtype or stored_dtype(resolve_pipeline_directory(pretrained_model_path) / "transformer")
    transformer = load_component(pretrained_model_path, "transformer")
    add_lora(transformer, lora_file)
    transformer.fuse_lora(lora_scale=lora_scale, safe_fusing=True)
    transformer.unload_lora()
    nn.Module.to(transformer, dtype)  # diffusers' own `to` warns of an empty list of float32 modules
    write_pipeline(output_dir, pretrained_model_path, "CogVideoXPipeline", {"transformer": transformer})


def find_lora_file(lora_path: str | Path) -> Path:
    path = Path(lora_path)
    file = path / LORA_NAME if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no LoRA at {lora_path}: give a {LORA_NAME}, or stage 1's output_dir once it has finished")
    return file


def add_lora(transformer: nn.Module, lora_file: Path) -> None:
    """Loads a LoRA file into a CogVideoX transformer as its adapter; a LoRA of another model is a `UserError`."""
    try:
        state, metadata = CogVideoXPipeline.lora_state_dict(
            lora_file.parent, weight_name=lora_file.name, return_lora_metadata=True
        )
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{lora_file} is not a LoRA file: {str(error).splitlines()[0]}") from error
    check_lora_fits(state, transformer, lora_file)
    CogVideoXPipeline.load_lora_into_transformer(state, transformer, metadata=metadata)


def check_lora_fits(state: dict[str, torch.Tensor], transformer: nn.Module, lora_file: Path) -> None:
    """Every pair has its layer, of its size: diffusers only warns about layers that it does not find."""
    modules = dict(transformer.named_modules())
    pairs = [key for key in state if key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if not pairs:
        raise UserError(f"{lora_file} holds no LoRA weights; its first key is {next(iter(state), 'none')!r}")
    for key in pairs:
        name, factor = key.removeprefix("transformer.").rsplit(".", 2)[:2]
        if name not in modules:
            raise UserError(f"{lora_file} belongs to another model: the base has no layer {name}")
        if not isinstance(modules[name], nn.Linear):
            raise UserError(f"{lora_file} belongs to another model: in the base {name} is no linear layer")
        rows, columns = modules[name].weight.shape
        size, wanted = (state[key].shape[1], columns) if factor == "lora_A" else (state[key].shape[0], rows)
        if size != wanted:
            raise UserError(f"{lora_file} belongs to another model: {name} is {wanted} wide there, {size} in the LoRA")


def stored_dtype(directory: Path) -> torch.dtype:
    """Type of the weights in a component's first safetensors file."""
    file = min(directory.glob("*.safetensors"), default=None)
    if file is None:
        return torch.float32
    with safe_open(file, "pt") as weights:
        return weights.get_tensor(next(iter(weights.keys()))).dtype


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--pretrained_model_path", required=True, help="the base that the LoRA was trained on")
    parser.add_argument("--lora_path", required=True, help="stage 1's output_dir, or a LoRA file")
    parser.add_argument("--output_dir", required=True, help="where the fused pipeline goes")
    parser.add_argument("--lora_scale", type=float, default=1.0, help="1 is the strength it was trained at")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the written weights; the base's by default")
    args = parser.parse_args()
    dtype = DTYPES[args.dtype] if args.dtype else None
    fuse_lora_weights(args.pretrained_model_path, args.lora_path, args.output_dir, args.lora_scale, dtype)
    print(f"fused pipeline: {args.output_dir}")


if __name__ == "__main__":
    run_cli(main)
