"""What every program that runs a pipeline settles before the weights are read: its place, scheduler, picture size."""

import argparse
from pathlib import Path
from typing import Any

import torch

from common.cogvideox.guidance import checked_guidance_scale
from common.cogvideox.pipeline_io import component_config, load_component
from common.cogvideox.window import make_window_plan
from common.cogvideox.window_scheduler import SwinSchedulerMixin
from common.config.command_line import whole_number
from common.config.errors import UserError
from common.config.settings import SIZE_MULTIPLE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PIXELS = whole_number(SIZE_MULTIPLE, step=SIZE_MULTIPLE)
COUNT = whole_number(1)


def add_place_options(parser: argparse.ArgumentParser) -> None:
    """--device and --dtype, for `device_and_dtype`."""
    parser.add_argument("--device", help="cuda, cuda:1, cpu …; by default a GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="by default bfloat16 on a GPU, float32 on the CPU")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """--height, --width and --num_inference_steps; None is the model's own."""
    parser.add_argument("--height", type=PIXELS, help="pixels, a multiple of 16; by default the model's")
    parser.add_argument("--width", type=PIXELS, help="pixels, a multiple of 16; by default the model's")
    parser.add_argument("--num_inference_steps", type=COUNT, help="denoising steps; the default suits the stage")


def device_and_dtype(name: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """Where to compute, and in what; None takes a GPU if there is one, and what suits it."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device, or torch was built without it
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device, DTYPES[dtype or ("float32" if device.type == "cpu" else "bfloat16")]


def load_streaming_scheduler(
    model_path: str,
    frames_per_group: int | None,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    control_guidance_scale: float,
) -> SwinSchedulerMixin:
    """The model's scheduler with the frames per group that were asked for; a `UserError` if it cannot do the rest."""
    scheduler = load_component(model_path, "scheduler")
    if frames_per_group:
        scheduler = type(scheduler).from_config(scheduler.config, frames_per_group=frames_per_group)
    make_window_plan(scheduler, num_inference_steps, torch.device("cpu"))
    checked_guidance_scale(scheduler, guidance_scale, control_guidance_scale)
    return scheduler


def pixels_per_latent(directory: Path, index: dict[str, Any]) -> int:
    """How many pixels wide and high a latent of a pipeline directory's VAE is."""
    return 2 ** (len(component_config(directory, "vae", index)[1]["block_out_channels"]) - 1)


def picture_size(
    directory: Path, index: dict[str, Any], height: int | None = None, width: int | None = None
) -> tuple[int, int]:
    """Height and width in pixels: those given, else those the model was made for. Reads configs, no weights."""
    config, scale = component_config(directory, "transformer", index)[1], pixels_per_latent(directory, index)
    return height or config["sample_height"] * scale, width or config["sample_width"] * scale
