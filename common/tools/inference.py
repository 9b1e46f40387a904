"""What the stages' inference.py share: their command-line options, and from options to a video file.

Shapes: N raw frames · h w pixels.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from common.cogvideox.context_parallel import (
    context_parallel_from_environment,
    in_lockstep,
    is_first_process,
    refuse_taken_device,
    shard_over_processes,
)
from common.cogvideox.loading import (
    COUNT,
    add_place_options,
    add_sampling_options,
    device_and_dtype,
    load_streaming_scheduler,
    picture_size,
)
from common.cogvideox.pipeline_cogvideox import CogVideoXStreamingPipeline
from common.cogvideox.pipeline_io import read_model_index
from common.cogvideox.speed import SpeedOptions, add_speed_options, check_speed_options, speed_options, speed_up
from common.cogvideox.window_scheduler import SwinSchedulerMixin
from common.config.command_line import ArgumentParser, positive_number, refuse_unwritable, whole_number
from common.config.errors import UserError
from common.config.model_directory import resolve_pipeline_directory
from common.config.settings import VAE_TIME_FACTOR
from common.data.control_signals import parse_control_string, read_control_file
from common.data.video import read_clip
from common.data.video_writer import VideoWriter

logger = logging.getLogger(__name__)

OUT_OF_MEMORY_HELP = (
    "out of memory: lower --height and --width or the number of frames, take --dtype bfloat16, or --guidance_scale 1 "
    "and --control_guidance_scale 1, with which a step is one forward"
)


def make_parser(description: str | None) -> ArgumentParser:
    """Options that every stage's inference has."""
    parser = ArgumentParser(description)
    parser.add_argument("--model_path", required=True, help="pipeline directory (or hub id)")
    parser.add_argument("--prompt", required=True, help="what the video shows")
    parser.add_argument("--negative_prompt", default="", help="what guidance leads away from")
    parser.add_argument("--output", type=Path, default=Path("video.mp4"), help="mp4 file to write")
    add_sampling_options(parser)
    parser.add_argument("--fps", type=COUNT, default=16, help="frames per second, as in training")
    guidance = "guidance on the prompt; 1 for none, by default 6, of distilled models what they have learnt"
    parser.add_argument("--guidance_scale", type=float, help=guidance)
    parser.add_argument("--seed", type=int, default=42, help="the same seed gives the same video")
    add_place_options(parser)
    return parser


def add_clip_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Options of the stages that make one clip."""
    frames = whole_number(1, step=VAE_TIME_FACTOR)
    parser.add_argument("--num_frames", type=frames, help=f"raw frames, 4n+1; by default {default}")


def add_control_options(parser: argparse.ArgumentParser) -> None:
    """Options of the stages that obey a control signal."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--control", help='control string, signal*raw frames: "D*32,DL*16,D*16"')
    group.add_argument("--control_file", type=Path, help="text file with a control string; # starts a comment")
    parser.add_argument("--control_guidance_scale", type=float, default=1.0, help="guidance on control; 1 for none")


def add_stream_options(parser: argparse.ArgumentParser) -> None:
    """Options of the stages that stream."""
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=positive_number, help="length; by default that of the control string")
    length.add_argument("--groups", type=COUNT, help="length in window shifts")
    parser.add_argument("--init_video", type=Path, help="begin at the end of this video instead of from text alone")
    parser.add_argument("--frames_per_group", type=COUNT, help="latent frames per shift; by default as trained")


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The launch line's arguments; a video that could not be written is refused now, and not when it is made."""
    args = parser.parse_args()
    if args.output.suffix != ".mp4" or args.output.is_dir():
        raise UserError(f"--output {args.output}: give a file whose name ends in .mp4")
    refuse_unwritable(args.output.parent, "--output")
    refuse_idle_prompt(args, is_guided=args.guidance_scale != 1)
    return args


def refuse_idle_prompt(args: argparse.Namespace, is_guided: bool) -> None:
    """UserError when there is a negative prompt, which only guidance reads, and no guidance."""
    if args.negative_prompt and not is_guided:
        raise UserError(
            "--negative_prompt does nothing without guidance on the prompt, which distilled models never have"
        )


def read_control(args: argparse.Namespace) -> list[str] | None:
    """One token per raw frame, None when no control was given."""
    if args.control_file:
        return read_control_file(args.control_file)
    return parse_control_string(args.control, where="--control") if args.control is not None else None


def load_pipeline(pipeline_class: type, args: argparse.Namespace, **components: Any) -> Any:
    """The pipeline of --model_path on its device, quiet enough for a terminal."""
    pipeline, device = read_pipeline(pipeline_class, args, **components)
    return pipeline.to(device)


def read_pipeline(pipeline_class: type, args: argparse.Namespace, **components: Any) -> tuple[Any, torch.device]:
    """The pipeline of --model_path in host memory, and where it shall go. Only the first process of a launch talks."""
    logging.basicConfig(level=logging.INFO if is_first_process() else logging.ERROR, format="%(message)s")
    read_model_index(args.model_path, expected=pipeline_class.__name__)
    device, dtype = device_and_dtype(args.device, args.dtype)
    return pipeline_class.from_pretrained(args.model_path, torch_dtype=dtype, **components), device


def load_streaming_pipeline(
    args: argparse.Namespace,
    options: SpeedOptions,
    prompt: str | list[str],
    negative_prompt: str = "",
    **components: Any,
) -> tuple[CogVideoXStreamingPipeline, dict[str, torch.Tensor]]:
    """The pipeline of --model_path as `options` ask for it, and the prompt as arguments of `stream`.

    All processes of a launch share the transformer. The text encoder has the device for itself and is gone afterwards:
    T5-XXL takes more memory than all the rest.
    """
    check_speed_options(options, *device_and_dtype(args.device, args.dtype))
    refuse_taken_device(options.decode_device)
    pipeline, device = read_pipeline(CogVideoXStreamingPipeline, args, **components)
    pipeline.text_encoder.to(device)
    length = pipeline.transformer.config.max_text_seq_length
    with torch.no_grad():
        embeds = pipeline.encode_prompt(prompt, negative_prompt, max_sequence_length=length, device=device)
    pipeline.text_encoder = None
    pipeline.to(device)
    shard_over_processes(pipeline.transformer)
    if not is_first_process():  # decodes nothing
        options = replace(options, decode_device=None, light_decoder=None)
    speed_up(pipeline, options)
    return pipeline, dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeds, strict=True))


def generator_for(pipeline: Any, seed: int) -> torch.Generator:
    return torch.Generator(pipeline.device).manual_seed(seed)


def clip_length(args: argparse.Namespace, control: list[str] | None) -> int | None:
    """Raw frames of a clip: --num_frames, else as many as the control string covers; None for the model's own."""
    if control is None:
        return args.num_frames
    groups = max((len(control) - 1) // VAE_TIME_FACTOR, 1)
    num_frames = args.num_frames or groups * VAE_TIME_FACTOR + 1
    if len(control) < num_frames:
        raise UserError(
            f"the control string covers {len(control)} raw frames, the clip has {num_frames}; hold a signal longer, as "
            f"in {control[-1]}*{num_frames}"
        )
    if args.num_frames is None and len(control) > num_frames:
        logger.warning(
            "the last %d raw frames of the control string are left out: a clip has 4n+1", len(control) - num_frames
        )
    return num_frames


def save(args: argparse.Namespace, chunks: Iterable[np.ndarray], control: list[str] | None, total: int | None) -> None:
    """Writes chunks of uint8 frames [N,h,w,3] as they come, up to `total` frames, and a JSON of how they were made."""
    started = time.perf_counter()
    with (
        VideoWriter(args.output, args.fps) as video,
        tqdm(total=total, unit="frame", desc=args.output.name, disable=not sys.stderr.isatty()) as progress,
    ):
        for chunk in chunks:
            chunk = chunk if total is None else chunk[: total - video.num_frames]
            video.write(chunk)  # at once: what is made is on disk
            progress.update(len(chunk))
            if total is not None and video.num_frames >= total:
                break
    seconds = time.perf_counter() - started
    about = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    about |= {"control": None if control is None else ",".join(control), "num_frames": video.num_frames}
    args.output.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"{args.output}: {video.num_frames} frames in {seconds:.1f} s ({video.num_frames / seconds:.1f} a second)")


def one_chunk(make: Callable[[], np.ndarray]) -> Iterator[np.ndarray]:
    """A whole clip as `save` takes it, made when it is asked for, so that its time counts. `make` → [N,h,w,3]."""
    yield make()


def read_init_video(args: argparse.Namespace, scheduler: SwinSchedulerMixin) -> torch.Tensor:
    """The end of --init_video at the stream's rate and size, as many frames as a window has: uint8 [N,3,h,w]."""
    directory = resolve_pipeline_directory(args.model_path)
    index = read_model_index(directory)
    height, width = picture_size(directory, index, args.height, args.width)
    num_frames = VAE_TIME_FACTOR * (scheduler.num_window_frames - 1) + 1
    return read_clip(args.init_video, num_frames, height, width, args.fps, from_end=True)


def load_scheduler(args: argparse.Namespace) -> SwinSchedulerMixin:
    """The model's scheduler with --frames_per_group; steps or guidance that do not fit it are a `UserError`."""
    read_model_index(args.model_path, expected="CogVideoXStreamingPipeline")
    return load_streaming_scheduler(
        args.model_path,
        args.frames_per_group,
        args.num_inference_steps,
        args.guidance_scale,
        args.control_guidance_scale,
    )


def stream(description: str | None) -> None:
    """`inference.py` of stages 3 and 4: streams a video to a file. What can be checked is, before weights are read.

    Started by torchrun, all processes share the transformer's work, and the first one decodes and writes.
    """
    parser = make_parser(description)
    add_control_options(parser)
    add_stream_options(parser)
    add_speed_options(parser)
    args = parse_arguments(parser)
    control = read_control(args)
    total = max(round(args.seconds * args.fps), 1) if args.seconds else None
    if total is None and args.groups is None:
        if control is None:
            raise UserError("how long? give --seconds or --groups, or a control string that says it")
        total = len(control)
    with context_parallel_from_environment(args.device):
        scheduler = load_scheduler(args)
        refuse_idle_prompt(args, is_guided=not scheduler.is_distilled)
        init_video = read_init_video(args, scheduler) if args.init_video else None
        pipeline, embeds = load_streaming_pipeline(
            args, speed_options(args), args.prompt, args.negative_prompt, scheduler=scheduler
        )
        guidance = args.guidance_scale
        if guidance is None and not scheduler.is_distilled:  # what is distilled has learnt its own
            guidance = 6.0
        chunks = pipeline.stream(
            None,
            control,
            init_video,
            **embeds,
            num_chunks=args.groups,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=guidance,
            control_guidance_scale=args.control_guidance_scale,
            height=args.height,
            width=args.width,
            generator=generator_for(pipeline, args.seed),
            overlap=pipeline.device.type == "cuda",
        )
        with in_lockstep(chunks) as stream_here:
            if stream_here:
                save(args, stream_here, control, total)
