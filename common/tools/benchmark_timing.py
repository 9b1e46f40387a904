"""The benchmarks' clocks and surroundings; and a stream's chunks, part by part and as a whole.

Shapes: B batch, N raw frames of a chunk, h w pixels.
"""

import platform
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import accelerate
import diffusers
import numpy as np
import torch

from common.cogvideox.chunk_decoder import to_uint8
from common.cogvideox.streaming import VideoStream
from common.training.throughput import peak_memory_gib

PARTS = ("transformer", "vae", "transfer")
PARTS_SECONDS = 10.0  # the longest that parts are timed


def surroundings(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the settings."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{device.type} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "diffusers": diffusers.__version__,
        "accelerate": accelerate.__version__,
    }


def device_clock(
    device: torch.device, decode_device: torch.device | None = None
) -> tuple[Callable[[], object], Callable[[list], list[float]]]:
    """(mark, read): `mark()` notes a moment in the device's order of work, `read(marks)` → milliseconds between them.

    Read only once the device has done all that was asked of it. With a device for each part, a mark waits for both.
    """
    decode_device = decode_device or device
    if device.type != "cuda" or device != decode_device:

        def wait() -> float:
            for each in {device, decode_device}:
                if each.type == "cuda":
                    torch.cuda.synchronize(each)
            return time.perf_counter()

        return wait, lambda marks: [1000 * (after - before) for before, after in pairwise(marks)]

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    return mark, lambda marks: [before.elapsed_time(after) for before, after in pairwise(marks)]


def time_chunk(stream: VideoStream, device: torch.device) -> tuple[tuple[int, ...], dict[str, float]]:
    """One chunk → the shape [B,N,h,w,3] of its frames, and milliseconds by part and in all ("chunk")."""
    mark, read = device_clock(device, stream.decoder.device)
    started, marks = time.perf_counter(), [mark()]
    latents = stream.advance()
    marks.append(mark())
    with stream.decoder.on_stream(latents):
        frames = stream.decoder.decode(latents)  # [B,N,3,h,w]
        marks.append(mark())
        levels = to_uint8(frames).cpu()  # waits for the device
        marks.append(mark())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    total = 1000 * (time.perf_counter() - started)
    return levels.shape, dict(zip(PARTS, read(marks), strict=True)) | {"chunk": total}


def time_parts(stream: VideoStream, device: torch.device, seconds: float, warmup: int) -> dict:
    """The first chunk, `warmup` more that do not count, then chunks for `seconds` (at least two, at most for ten); →
    figures in ms."""
    shape, first = time_chunk(stream, device)
    first["frames"] = shape[1]
    for _ in range(warmup):
        time_chunk(stream, device)
    times, started = [], time.perf_counter()
    while len(times) < 2 or time.perf_counter() - started < min(seconds, PARTS_SECONDS):
        (batch_size, num_frames, height, width, _), parts = time_chunk(stream, device)
        times.append(parts)
    columns = {name: [parts[name] for parts in times] for name in (*PARTS, "chunk")}
    return {
        "streams": batch_size,
        "height": height,
        "width": width,
        "frames_per_chunk": num_frames,
        "forwards_per_chunk": len(stream.plan.steps),
        "first_chunk": first,
        "median": {name: float(np.percentile(column, 50)) for name, column in columns.items()},
        "p99": {name: float(np.percentile(column, 99, method="inverted_cdf")) for name, column in columns.items()},
    }


def time_stream(stream: VideoStream, seconds: float) -> dict:
    """Takes chunks as a user does, for `seconds` (two at least); → chunks, frames a second, intervals in ms."""
    next(stream)
    marks = [time.perf_counter()]
    while len(marks) < 3 or marks[-1] - marks[0] < seconds:
        num_frames = next(stream).shape[-4]
        marks.append(time.perf_counter())
    intervals = [1000 * (after - before) for before, after in pairwise(marks)]
    return {
        "fps": len(intervals) * num_frames / (marks[-1] - marks[0]),  # of each stream
        "chunks": len(intervals),
        "interval": {
            "median": float(np.percentile(intervals, 50)),
            "p99": float(np.percentile(intervals, 99, method="inverted_cdf")),
        },
    }


def measure(stream: VideoStream, device: torch.device, seconds: float, warmup: int) -> dict:
    parts = time_parts(stream, device, seconds, warmup)
    figures = parts | time_stream(stream, seconds) | {"peak_memory_gib": peak_memory_gib(device)}
    if device.type == "cuda":
        figures["reserved_memory_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    return figures
