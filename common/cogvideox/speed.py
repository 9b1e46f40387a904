"""What makes a streaming pipeline faster, each by a setting: what every program that streams offers, and applies.

All but float8 and the light decoder leave the results as they are, but for rounding.
"""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from common.cogvideox.compilation import compile_blocks, compile_decoder
from common.cogvideox.float8 import use_float8
from common.cogvideox.light_decoder import load_light_decoder
from common.config.errors import UserError, one_line


@dataclass(frozen=True)
class SpeedOptions:
    """Settings of a pipeline's speed.

    Attributes:
        compile: the transformer, block by block, and on a GPU the VAE's decoder.
        float8: linear layers of the transformer in float8; of use on GPUs from Ada and Hopper on.
        attention_backend: diffusers' name of a kernel for self-attention; None leaves it to PyTorch, which takes
            cuDNN's on an H100 or H200, the fastest exact one there.
        light_decoder: directory of a decoder that stands in for the VAE's (common.tools.distill_decoder).
        decode_device: where chunks are decoded, if not where the transformer is.
    """

    compile: bool = False
    float8: bool = False
    attention_backend: str | None = None
    light_decoder: Path | None = None
    decode_device: str | None = None


def add_speed_options(parser: argparse.ArgumentParser) -> None:
    """Options by the names of `SpeedOptions`, for `speed_options`."""
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the model: the first start takes minutes longer, further ones on the same machine less than one",
    )
    parser.add_argument("--float8", action="store_true", help="linear layers in float8: faster, less exact")
    backends = sorted(backend.value for backend in AttentionBackendName)
    parser.add_argument(
        "--attention_backend",
        choices=backends,
        metavar="NAME",
        help="diffusers' name of an attention kernel: _native_cudnn, flash, sage …; by default PyTorch's choice",
    )
    parser.add_argument(
        "--light_decoder", type=Path, help="directory of a distilled decoder, faster and less exact than the VAE's"
    )
    parser.add_argument("--decode_device", help="cuda:1 …: decode on another GPU than the transformer's")


def speed_options(args: argparse.Namespace) -> SpeedOptions:
    return SpeedOptions(**{field.name: getattr(args, field.name) for field in fields(SpeedOptions)})


def refuse_float8(device: torch.device, dtype: torch.dtype) -> None:
    """A `UserError` where float8 products would fail at the first step."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        version = ".".join(map(str, capability))
        raise UserError(f"--float8 needs compute capability 8.9 (Ada, Hopper) or more; {device} has {version}")
    if dtype != torch.bfloat16:
        raise UserError(f"--float8 makes bfloat16 of its products; leave --dtype {str(dtype).split('.')[1]} out")


def speed_up(pipeline: Any, options: SpeedOptions) -> None:
    """Applies the options to a pipeline that is where it shall run, in place.

    Raises:
        UserError: a backend or device that is not there.
    """
    transformer = pipeline.transformer
    if options.attention_backend:
        try:
            transformer.set_attention_backend(options.attention_backend)
        except (RuntimeError, ImportError, ValueError, KeyError) as error:
            raise UserError(f"--attention_backend {options.attention_backend}: {one_line(error)}") from error
    if options.float8:
        refuse_float8(transformer.device, transformer.dtype)
        use_float8(transformer)
    if options.decode_device:
        try:
            pipeline.vae.to(torch.device(options.decode_device))
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--decode_device {options.decode_device}: {one_line(error)}") from error
    if options.light_decoder:
        light = load_light_decoder(options.light_decoder, pipeline.vae, transformer.dtype)
        pipeline.light_decoder = light.to(pipeline.vae.device)
        if options.compile:
            pipeline.light_decoder.compile(fullgraph=True, dynamic=False)
    if options.compile:
        compile_blocks(transformer)
        if pipeline.vae.device.type == "cuda":
            compile_decoder(pipeline.vae)
