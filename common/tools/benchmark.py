"""How fast a stage 3 or 4 model streams, and where the time goes.

    python -m common.tools.benchmark --model_path outputs/miniworld/stage4 --device cpu

Streams for --seconds after a warm-up, shows a table and writes the same figures as JSON. Every chunk is one window
shift: the transformer's forwards, the VAE's decode, and the transfer (rounding to uint8, copy to host). A chunk's
time is wall-clock, from asking for it to having its frames in host memory; on a GPU its three parts are timed by CUDA
events. The first chunk, which also samples the window from the prompt, is listed by itself.

Shapes: B batch, F latent frames of a window, N raw frames of a chunk, h w pixels.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import diffusers
import numpy as np
import torch

from common.cogvideox.autoencoder import to_uint8
from common.cogvideox.compilation import compile_blocks
from common.cogvideox.loading import COUNT, add_place_options, add_sampling_options
from common.cogvideox.pipeline_cogvideox import CogVideoXStreamingPipeline
from common.cogvideox.streaming import VideoStream
from common.config.command_line import ArgumentParser, positive_number, refuse_unwritable
from common.config.errors import UserError, run_cli
from common.tools.inference import OUT_OF_MEMORY_HELP, generator_for, load_pipeline, load_scheduler
from common.training.throughput import peak_memory_gib

PARTS = ("transformer", "vae", "transfer")


def device_clock(device: torch.device) -> tuple[Callable[[], object], Callable[[list], list[float]]]:
    """(mark, read): `mark()` notes a moment in the device's order of work, `read(marks)` → milliseconds between them.

    Read only once the device has done all that was asked of it.
    """
    if device.type != "cuda":
        return time.perf_counter, lambda marks: [1000 * (after - before) for before, after in pairwise(marks)]

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    return mark, lambda marks: [before.elapsed_time(after) for before, after in pairwise(marks)]


def time_chunk(stream: VideoStream, device: torch.device) -> tuple[tuple[int, ...], dict[str, float]]:
    """One chunk → the shape [B,N,h,w,3] of its frames, and milliseconds by part and in all ("chunk")."""
    mark, read = device_clock(device)
    started, marks = time.perf_counter(), [mark()]
    latents = stream.advance()
    marks.append(mark())
    frames = stream.decoder.decode(latents)  # [B,N,3,h,w]
    marks.append(mark())
    levels = to_uint8(frames)  # waits for the device
    marks.append(mark())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    total = 1000 * (time.perf_counter() - started)
    return levels.shape, dict(zip(PARTS, read(marks), strict=True)) | {"chunk": total}


def measure(stream: VideoStream, device: torch.device, seconds: float, warmup: int) -> dict:
    """Takes the first chunk, `warmup` more, and then chunks for `seconds` (two at least) → figures, times in ms."""
    shape, first = time_chunk(stream, device)
    first["frames"] = shape[1]
    for _ in range(warmup):
        time_chunk(stream, device)
    times, started = [], time.perf_counter()
    while len(times) < 2 or time.perf_counter() - started < seconds:
        (batch_size, num_frames, height, width, _), parts = time_chunk(stream, device)
        times.append(parts)
    elapsed = time.perf_counter() - started
    columns = {name: [parts[name] for parts in times] for name in (*PARTS, "chunk")}
    return {
        "fps": len(times) * num_frames / elapsed,  # of each stream
        "streams": batch_size,
        "height": height,
        "width": width,
        "chunks": len(times),
        "frames_per_chunk": num_frames,
        "forwards_per_chunk": len(stream.plan.steady),
        "first_chunk": first,
        "median": {name: float(np.percentile(column, 50)) for name, column in columns.items()},
        "p99": {name: float(np.percentile(column, 99, method="inverted_cdf")) for name, column in columns.items()},
        "peak_memory_gib": peak_memory_gib(device),
    }


def surroundings(pipeline: CogVideoXStreamingPipeline) -> dict:
    """What the figures depend on besides the model."""
    device = pipeline.device
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else f"{device.type} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def table(figures: dict) -> str:
    """The figures for a terminal."""
    rows = [f"{'ms':<12}{'median':>10}{'p99':>10}{'first':>10}"]
    for name in (*PARTS, "chunk"):
        columns = (figures[column][name] for column in ("median", "p99", "first_chunk"))
        rows.append(f"{name:<12}" + "".join(f"{value:>10.1f}" for value in columns))
    streams = f"{figures['streams']} × " if figures["streams"] > 1 else ""
    per_chunk = f"{figures['frames_per_chunk']} a chunk, {figures['forwards_per_chunk']} forwards each"
    place = f"{figures['device']}, {figures['threads']} CPU threads, {figures['dtype']}, torch {figures['torch']}"
    return "\n".join([
        *rows,
        f"{streams}{figures['fps']:.1f} frames a second of {figures['width']}×{figures['height']}: {per_chunk}",
        f"{figures['chunks']} chunks; peak memory {figures['peak_memory_gib']:.2f} GiB; {place}",
    ])  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--model_path", required=True, help="pipeline directory of stage 3 or 4 (or hub id)")
    parser.add_argument("--seconds", type=positive_number, default=10.0, help="how long to measure after the warm-up")
    parser.add_argument("--warmup", type=COUNT, default=3, help="chunks after the first that do not count")
    parser.add_argument("--prompt", default="A red car drives along a road.", help="what the video shows")
    parser.add_argument("--batch_size", type=COUNT, default=1, help="streams side by side")
    add_sampling_options(parser)
    parser.add_argument("--frames_per_group", type=COUNT, help="latent frames per shift; by default as trained")
    parser.add_argument("--guidance_scale", type=float, help="guidance on the prompt; 1 for none, the default")
    parser.add_argument("--control_guidance_scale", type=float, default=1.0, help="guidance on control; 1 for none")
    add_place_options(parser)
    parser.add_argument("--threads", type=COUNT, help="CPU threads; by default PyTorch's choice")
    parser.add_argument(
        "--compile", action="store_true", help="compile the transformer; the first chunks take a minute or two"
    )
    parser.add_argument("--seed", type=int, default=42, help="of everything that is drawn")
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"), help="JSON file to write")
    args = parser.parse_args()
    if args.output.suffix != ".json" or args.output.is_dir():
        raise UserError(f"--output {args.output}: give a file whose name ends in .json")
    refuse_unwritable(args.output.parent, "--output")
    return args


def benchmark(args: argparse.Namespace) -> dict:
    """Loads the model, streams, → figures."""
    if args.threads:
        torch.set_num_threads(args.threads)
    scheduler = load_scheduler(args)
    pipeline = load_pipeline(CogVideoXStreamingPipeline, args, scheduler=scheduler)
    if args.compile:
        compile_blocks(pipeline.transformer)
    stream = pipeline.stream(
        [args.prompt] * args.batch_size,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        control_guidance_scale=args.control_guidance_scale,
        height=args.height,
        width=args.width,
        generator=generator_for(pipeline, args.seed),
    )
    figures = measure(stream, pipeline.device, args.seconds, args.warmup)
    return {"model": str(args.model_path), **figures, **surroundings(pipeline), "compiled": args.compile}


def main() -> None:
    args = parse_arguments()
    figures = benchmark(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(table(figures))
    print(f"written to {args.output}")


if __name__ == "__main__":
    run_cli(main, OUT_OF_MEMORY_HELP)
