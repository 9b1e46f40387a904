"""Writes a CogVideoX pipeline directory with random weights: everything but the weights is as published.

    python -m common.tools.make_model --size 2b --small_text_encoder --output_dir models/random-2b
    python -m common.tools.make_model --size mini --output_dir models/random-mini
    python -m common.tools.make_model --size 2b --stage 4 --small_text_encoder --output_dir models/random-2b-stage4

For measuring speed and memory, and for trying a chain of commands, where the real weights cannot be downloaded. Plain
diffusers loads the base, and stages 1 and 2 start from it; with --stage 2, 3 or 4 the directory is as that stage writes
it, its control signals told apart by orthogonal rows. What it generates is noise.

The tokenizer is a stand-in made here; --small_text_encoder also replaces T5-XXL (4.8 B parameters, 9.5 GB) by one of
16 M that feeds the transformer the same shapes. Memory stays at --max_shard_size and the largest tensor in float32.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn
from tqdm import tqdm
from transformers import T5EncoderModel

from common.cogvideox.control_adapter import ControlVocabulary
from common.cogvideox.loading import COUNT, DTYPES
from common.cogvideox.model_sizes import SIZES, ModelSize
from common.cogvideox.pipeline_io import INDEX_NAME, library_of, replace_directory
from common.cogvideox.random_weights import untied_state, write_random_weights
from common.cogvideox.scheduler import CogVideoXSwinDPMScheduler, CogVideoXSwinLCMScheduler
from common.cogvideox.stand_in_tokenizer import make_tokenizer
from common.cogvideox.transformer import CogVideoXControlTransformer3DModel
from common.config.command_line import ArgumentParser, refuse_unwritable, whole_number
from common.config.errors import SettingError, run_cli
from common.data.control_signals import CONTROL_TOKENS

# component → the stem of its weights' files
WEIGHTS_STEMS = {
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
    "transformer": "diffusion_pytorch_model",
}
# what a stage's output_dir holds: a pipeline, and a scheduler of its own; 1 is the base
PIPELINES = {
    1: "CogVideoXPipeline",
    2: "CogVideoXControlPipeline",
    3: "CogVideoXStreamingPipeline",
    4: "CogVideoXStreamingPipeline",
}
SCHEDULERS = {3: CogVideoXSwinDPMScheduler, 4: CogVideoXSwinLCMScheduler}


def make_model(
    output_dir: Path,
    size: ModelSize,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    max_shard_size: str = "2GB",
    overwrite: bool = False,
    stage: int = 1,
) -> dict[str, int]:
    """Writes a complete pipeline directory; an existing one is replaced when the new one is whole.

    Args:
        dtype: of the weights; None takes that of the published ones.
        overwrite: else an existing directory is refused.
        stage: whose output the directory looks like; 1 is a plain CogVideoX, the base of them all.

    Returns:
        Parameters of each component.

    Raises:
        SettingError: the directory exists, cannot be written, or the disk is too small.
    """
    if output_dir.exists() and not (overwrite and output_dir.is_dir()):
        raise SettingError("--output_dir", f"{output_dir} exists; choose another, or --overwrite to replace it")
    if output_dir.exists() and not (output_dir / INDEX_NAME).is_file():
        raise SettingError("--output_dir", f"{output_dir} is no pipeline directory; --overwrite replaces only such")
    refuse_unwritable(output_dir.parent, "--output_dir")
    dtype = dtype or size.dtype
    tokenizer = make_tokenizer(size.transformer["max_text_seq_length"])
    with init_empty_weights(include_buffers=True):
        models = {
            "text_encoder": T5EncoderModel(size.t5_config(len(tokenizer))),
            "vae": AutoencoderKLCogVideoX(**size.vae),
            "transformer": CogVideoXTransformer3DModel(**size.transformer)
            if stage == 1
            else CogVideoXControlTransformer3DModel(**size.transformer, **size.control_config()),
        }
    parameters = {name: sum(v.numel() for v in untied_state(model).values()) for name, model in models.items()}
    needed = sum(parameters.values()) * dtype.itemsize
    _refuse_full_disk(output_dir, needed)

    def write(directory: Path) -> None:
        with tqdm(total=needed, unit="B", unit_scale=True, desc=output_dir.name) as progress:
            for number, (name, model) in enumerate(models.items()):
                _write_component(model, directory / name, name, dtype, seed + number, max_shard_size, progress.update)
        scheduler = size.scheduler()
        if stage in SCHEDULERS:
            scheduler = SCHEDULERS[stage].from_config(scheduler.config)
        small = {"tokenizer": tokenizer, "scheduler": scheduler}
        if stage > 1:
            small["control_vocabulary"] = ControlVocabulary.orthogonal(list(CONTROL_TOKENS), size.control_dim)
        for name, component in small.items():
            component.save_pretrained(directory / name)
        index = {"_class_name": PIPELINES[stage], "_diffusers_version": diffusers.__version__}
        index |= {name: [library_of(part), type(part).__name__] for name, part in sorted((models | small).items())}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    replace_directory(output_dir, write)
    return parameters


def _write_component(
    model: nn.Module,
    directory: Path,
    name: str,
    dtype: torch.dtype,
    seed: int,
    max_shard_size: str,
    report: Callable[[int], None],
) -> None:
    if isinstance(model, T5EncoderModel):
        model.config.dtype = dtype
        model.config.save_pretrained(directory)
    else:
        model.save_config(directory)
    write_random_weights(model, directory, WEIGHTS_STEMS[name], dtype, seed, max_shard_size, report)


def _refuse_full_disk(output_dir: Path, needed: int) -> None:
    existing = next(path for path in output_dir.absolute().parents if path.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise SettingError(
            "--output_dir",
            f"{output_dir} needs {needed / 1e9:.1f} GB, {existing} has {free / 1e9:.1f} GB free; --small_text_encoder, "
            "--layers or another --dtype take less",
        )


def shard_size(text: str) -> str:
    """An argument's `type`: a size as huggingface_hub reads it, "500MB" or "2GB"."""
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 500MB or 2GB") from None
    return text


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--size", choices=SIZES, required=True, help="CogVideoX-2B, CogVideoX-5B, or the mini world's")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the pipeline goes")
    parser.add_argument(
        "--stage", type=int, choices=PIPELINES, default=1, help="write what this stage makes; 1: a base"
    )
    parser.add_argument("--small_text_encoder", action="store_true", help="two T5 layers of the same output width")
    parser.add_argument("--layers", type=COUNT, help="transformer layers, by default as published")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; float16 (2b), bfloat16 (5b), float32 (mini)")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="the same seed gives the same weights")
    parser.add_argument("--max_shard_size", type=shard_size, default="2GB", help="of a file of weights, and of memory")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing directory")
    args = parser.parse_args()
    size = SIZES[args.size]
    if args.layers:
        size = size.with_layers(args.layers)
    if args.small_text_encoder:
        size = size.with_small_text_encoder()
    dtype = DTYPES[args.dtype] if args.dtype else None
    parameters = make_model(args.output_dir, size, dtype, args.seed, args.max_shard_size, args.overwrite, args.stage)
    counts = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in parameters.items())
    print(f"random model: {args.output_dir} ({counts} parameters)")


if __name__ == "__main__":
    run_cli(main)
