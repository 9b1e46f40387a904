"""What makes a streaming pipeline faster, each by a setting: what every program that streams offers, and applies.

Compiling, decoding elsewhere and exact attention kernels leave the results as they are, but for rounding; float8, the
light decoder and kernels of less precision (sage) do not.
"""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from common.cogvideox.compilation import compile_blocks, compile_decoder
from common.cogvideox.float8 import use_float8
from common.cogvideox.light_decoder import load_light_decoder, refuse_missing
from common.config.errors import UserError, one_line


@dataclass(frozen=True)
class SpeedOptions:
    """Settings of a pipeline's speed.

    Attributes:
        compile: the transformer, block by block, and what decodes: the light decoder, or on a GPU the VAE.
        float8: linear layers of the transformer in float8; on GPUs from Ada and Hopper on.
        attention_backend: diffusers' name of a kernel for self-attention; None leaves it to PyTorch. On an H200 that
            takes cuDNN's: 2.8 ms a layer of CogVideoX-2B with 9 latent frames, where FlashAttention 2 takes 3.8.
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
        help="compile the model: the first start takes a minute or two longer, further ones on the same machine less",
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


def check_speed_options(options: SpeedOptions, device: torch.device, dtype: torch.dtype) -> None:
    """A `UserError` for what can be known to fail before any weights are read: a missing kernel, device or decoder."""
    if options.attention_backend:
        set_attention_backend(ModelMixin(), options.attention_backend)
    if options.float8 and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            version = ".".join(map(str, capability))
            raise UserError(f"float8: needs compute capability 8.9 (Ada, Hopper) or more; {device} has {version}")
        if dtype != torch.bfloat16:
            raise UserError(f"float8: its products are bfloat16; dtype {str(dtype).removeprefix('torch.')} is not")
    if options.light_decoder:
        refuse_missing(options.light_decoder)
    if options.decode_device:
        try:
            torch.empty(0, device=options.decode_device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"decode_device {options.decode_device}: {one_line(error)}") from error


def set_attention_backend(model: ModelMixin, name: str) -> None:
    """diffusers' method, for this model alone: that sets the kernel of every other model in the process, too.

    A `UserError` if the kernel's package, or a GPU that it runs on, is not there.
    """
    before = _AttentionBackendRegistry.get_active_backend()[0]
    try:
        model.set_attention_backend(name)
    except (RuntimeError, ImportError, ValueError, KeyError) as error:
        raise UserError(f"attention_backend {name}: {one_line(error)}") from error
    finally:
        _AttentionBackendRegistry.set_active_backend(before)


def speed_up(pipeline: Any, options: SpeedOptions) -> None:
    """Applies the options to a pipeline that is where it shall run, in place.

    Raises:
        UserError: see `check_speed_options`; or the light decoder is not one for this VAE.
    """
    transformer = pipeline.transformer
    check_speed_options(options, transformer.device, transformer.dtype)
    if options.attention_backend:
        set_attention_backend(transformer, options.attention_backend)
    if options.float8:
        use_float8(transformer)
    if options.decode_device:
        pipeline.vae.to(options.decode_device)
    if options.light_decoder:
        light = load_light_decoder(options.light_decoder, pipeline.vae, transformer.dtype)
        pipeline.light_decoder = light.to(pipeline.vae.device)
    if options.compile:
        compile_blocks(transformer)
        if pipeline.light_decoder is not None:
            pipeline.light_decoder.compile(fullgraph=True, dynamic=False)
        elif pipeline.vae.device.type == "cuda":
            compile_decoder(pipeline.vae)
