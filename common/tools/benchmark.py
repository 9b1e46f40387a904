"""How fast a stage 3 or 4 model streams, and where the time goes.

    python -m common.tools.benchmark --model_path outputs/miniworld/stage4 --device cpu
    python -m common.tools.benchmark --model_path models/random-2b-stage4 --ablation
    torchrun --nproc_per_node 2 -m common.tools.benchmark --model_path outputs/stage4   # one stream on two GPUs

Streams for --seconds after a warm-up, shows a table and writes the same figures as JSON. Every chunk is one window
shift: the transformer's forwards, the VAE's decode, and the transfer (rounding to uint8, copy to host). They are timed
one after the other, on a GPU by CUDA events; "chunk" is their wall-clock time, from reading the command to having the
frames in host memory. Frames per second are of a stream that decodes a chunk while it makes the next shift; "interval"
is the time between its chunks. The first chunk, which also samples the window from the prompt, is listed by itself.

--ablation does so again and again, with one change more each time, in one process: what each is worth, and what it
costs in exactness against a float32 run of the same weights. It tries --light_decoder last, if there is one.

Shapes: B batch, F latent frames of a window, N raw frames of a chunk, h w pixels.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from common.cogvideox.context_parallel import context_parallel_from_environment, in_lockstep, num_processes
from common.cogvideox.loading import COUNT, add_place_options, add_sampling_options, device_and_dtype
from common.cogvideox.pipeline_cogvideox import CogVideoXStreamingPipeline
from common.cogvideox.speed import SpeedOptions, add_speed_options, speed_options, speed_up
from common.cogvideox.streaming import VideoStream
from common.config.command_line import ArgumentParser, positive_number, refuse_unwritable
from common.config.errors import UserError, run_cli
from common.tools.benchmark_timing import PARTS, measure, surroundings
from common.tools.inference import OUT_OF_MEMORY_HELP, generator_for, load_scheduler, load_streaming_pipeline

# One more at a time, in this order; the first two leave results as they are, but for rounding.
CHANGES = {
    "compiled": SpeedOptions(compile=True),
    "decoding beside the next shift": None,
    "float8": SpeedOptions(float8=True, compile=True),
}


def about_run(pipeline: CogVideoXStreamingPipeline) -> dict:
    """What the figures depend on besides the model."""
    dtype = str(pipeline.transformer.dtype).removeprefix("torch.")
    return {"processes": num_processes(), "dtype": dtype, **surroundings(pipeline.device)}


def table(figures: dict) -> str:
    """The figures for a terminal."""
    rows = [f"{'ms':<12}{'median':>10}{'p99':>10}{'first':>10}"]
    for name in (*PARTS, "chunk"):
        columns = (figures[column][name] for column in ("median", "p99", "first_chunk"))
        rows.append(f"{name:<12}" + "".join(f"{value:>10.1f}" for value in columns))
    rows.append(f"{'interval':<12}{figures['interval']['median']:>10.1f}{figures['interval']['p99']:>10.1f}")
    streams = f"{figures['streams']} × " if figures["streams"] > 1 else ""
    per_chunk = f"{figures['frames_per_chunk']} a chunk, {figures['forwards_per_chunk']} forwards each"
    place = f"{figures['device']}, {figures['threads']} CPU threads, {figures['dtype']}, torch {figures['torch']}"
    return "\n".join([
        *rows,
        f"{streams}{figures['fps']:.1f} frames a second of {figures['width']}×{figures['height']}: {per_chunk}",
        f"{figures['chunks']} chunks; ready after {figures['ready_s']:.0f} s; "
        f"peak memory {figures['peak_memory_gib']:.2f} GiB allocated on the first device; {place}",
    ])  # fmt: skip


def ablation_table(rows: list[dict]) -> str:
    names = ("transformer", "vae", "transfer", "chunk", "interval")
    lines = [f"{'ms':<34}" + "".join(f"{name:>13}" for name in names) + f"{'FPS':>8}{'error':>9}{'in pixels':>11}"]
    for row in rows:
        times = (row["interval"]["median"] if name == "interval" else row["median"][name] for name in names)
        values = "".join(f"{value:>13.1f}" for value in times)
        errors = f"{100 * row['error']['transformer']:>8.2f}%{100 * row['error']['pixels']:>10.2f}%"
        lines.append(f"{row['change']:<34}{values}{row['fps']:>8.1f}{errors}")
    return "\n".join(lines)


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
    add_speed_options(parser)
    parser.add_argument("--ablation", action="store_true", help="measure one change after the other instead")
    parser.add_argument("--seed", type=int, default=42, help="of everything that is drawn")
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"), help="JSON file to write")
    args = parser.parse_args()
    if args.output.suffix != ".json" or args.output.is_dir():
        raise UserError(f"--output {args.output}: give a file whose name ends in .json")
    refuse_unwritable(args.output.parent, "--output")
    return args


def open_stream(
    pipeline: CogVideoXStreamingPipeline, embeds: dict[str, Tensor], args: argparse.Namespace, overlap: bool
) -> VideoStream:
    return pipeline.stream(
        None,
        None if args.batch_size == 1 else [None] * args.batch_size,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        control_guidance_scale=args.control_guidance_scale,
        height=args.height,
        width=args.width,
        generator=generator_for(pipeline, args.seed),
        overlap=overlap and pipeline.device.type == "cuda",
        **embeds,
    )


def benchmark(args: argparse.Namespace) -> dict | None:
    """Loads the model, streams, → figures; of --ablation those of all rows, under "rows".

    None in the processes that only help the first one.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    started = time.perf_counter()
    dtype, options = device_and_dtype(args.device, args.dtype)[1], speed_options(args)
    if args.ablation:
        if num_processes() > 1:
            raise UserError("--ablation compares settings of one process; start it without torchrun")
        args.dtype, options = "float32", SpeedOptions(decode_device=options.decode_device)
    prompts, scheduler = [args.prompt] * args.batch_size, load_scheduler(args)
    pipeline, embeds = load_streaming_pipeline(args, options, prompts, scheduler=scheduler)
    about = {"model": str(args.model_path)}
    if args.ablation:
        return about | {"rows": ablation(pipeline, embeds, args, dtype)} | about_run(pipeline)
    with in_lockstep(open_stream(pipeline, embeds, args, overlap=True)) as warm_up:
        for _ in range(2 if warm_up else 0):  # two kinds of chunk: the first, and all others
            next(warm_up)
    del warm_up  # the VAE's convolution cache of a stream takes gigabytes
    about |= {"ready_s": time.perf_counter() - started, **vars(options)}
    with in_lockstep(open_stream(pipeline, embeds, args, overlap=True)) as stream:
        figures = measure(stream, pipeline.device, args.seconds, args.warmup) if stream else None
    return about | figures | about_run(pipeline) if figures else None


@torch.no_grad()
def outputs(pipeline: CogVideoXStreamingPipeline, stream: VideoStream, seed: int) -> dict[str, Tensor]:
    """What the transformer says of a window of noise, and the VAE of some latents: float32 on the CPU."""
    generator, plan = torch.Generator().manual_seed(seed), stream.plan
    batch_size, _, *rest = stream.latent_shape
    latents = torch.randn(stream.latent_shape, generator=generator).to(pipeline.device)
    chunks = [plan.frames_per_group + 1, plan.frames_per_group]  # as in a stream: no other kinds are to be compiled
    finished = torch.randn((batch_size, sum(chunks), *rest), generator=generator)
    raw_frames = [[[0] * pipeline.vae_scale_factor_temporal] * plan.num_frames] * batch_size
    control = stream.denoiser.control_embeds(raw_frames)
    told = plan.steps[0].timesteps
    decoder = pipeline.make_decoder()
    pixels = [decoder.decode(chunk) for chunk in finished.split(chunks, dim=1)]
    return {"transformer": stream.denoiser(latents, told, control).cpu(), "pixels": torch.cat(pixels, 1).float().cpu()}


def ablation(
    pipeline: CogVideoXStreamingPipeline, embeds: dict[str, Tensor], args: argparse.Namespace, dtype: torch.dtype
) -> list[dict]:
    """Rows of figures, each with one change more than the one before; the pipeline comes in float32."""
    exact = outputs(pipeline, open_stream(pipeline, embeds, args, overlap=False), args.seed)
    for module in (pipeline.transformer, pipeline.vae):
        torch.nn.Module.to(module, dtype)  # diffusers' own `to` warns of an empty list of float32 modules
    rows, is_overlapped = [], False
    changes = {"eager": SpeedOptions(attention_backend=args.attention_backend), **CHANGES}
    if args.light_decoder:
        changes["light decoder"] = SpeedOptions(light_decoder=args.light_decoder, compile=True)
    for name, options in changes.items():
        if pipeline.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pipeline.device)  # of the rows before, and of the float32 weights
        if options is None:
            is_overlapped = True
        else:
            speed_up(pipeline, options)
        found = outputs(pipeline, open_stream(pipeline, embeds, args, overlap=False), args.seed)
        error = {part: ((found[part] - exact[part]).norm() / exact[part].norm()).item() for part in exact}
        stream = open_stream(pipeline, embeds, args, overlap=is_overlapped)
        figures = measure(stream, pipeline.device, args.seconds, args.warmup)
        rows.append({"change": name if not rows else f"+ {name}", "error": error, **figures})
    return rows


def main() -> None:
    args = parse_arguments()
    with context_parallel_from_environment(args.device):
        figures = benchmark(args)
    if figures is None:
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=1, default=str) + "\n")
    print(ablation_table(figures["rows"]) if args.ablation else table(figures))
    print(f"written to {args.output}")


if __name__ == "__main__":
    run_cli(main, OUT_OF_MEMORY_HELP)
