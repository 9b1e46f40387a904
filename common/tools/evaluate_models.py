"""Videos of the models that `common.tools.evaluate` measures, whatever stage wrote them.

Shapes: B videos at once, N raw frames, F latent frames, W latent frames a shift, h w pixels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.cogvideox.autoencoder import StreamingDecoder, encode_frames
from common.cogvideox.loading import device_and_dtype, picture_size
from common.cogvideox.pipeline_cogvideox import CogVideoXControlPipeline, CogVideoXStreamingPipeline
from common.cogvideox.pipeline_io import load_component, read_model_index
from common.cogvideox.window import make_window_plan, num_chunks_for
from common.config.model_directory import resolve_pipeline_directory
from common.data.fingerprint import pipeline_digests
from common.data.video_writer import to_frames
from data.miniworld.heldout import Scene
from data.miniworld.instruments import FRAMES_PER_LATENT
from data.miniworld.simulator import FPS

CLIP_STEPS = 20


@dataclass(frozen=True)
class ModelPlan:
    """A model before it is loaded: what it is, and how it will be sampled. Making one checks all that can be."""

    name: str
    directory: Path
    kind: str  # `_class_name` of its index
    height: int
    width: int
    frames_per_group: tuple[int, ...]  # W to measure, the model's own first; empty for whole clips
    settings: dict[str, Any]  # that decide its videos

    @property
    def streams(self) -> bool:
        return bool(self.frames_per_group)

    @property
    def has_control(self) -> bool:
        return self.kind != "CogVideoXPipeline"


def plan_model(path: str, name: str, args: argparse.Namespace) -> ModelPlan:
    """Raises UserError for a directory that no stage wrote, or steps that do not fit its window."""
    directory = resolve_pipeline_directory(path)
    index = read_model_index(directory)
    kind = index["_class_name"]
    steps, guidance, control_guidance = args.num_inference_steps, args.guidance_scale, args.control_guidance_scale
    widths: tuple[int, ...] = ()
    if kind == "CogVideoXStreamingPipeline":
        scheduler = load_component(directory, "scheduler", index=index)
        own = scheduler.config.frames_per_group
        widths = tuple(dict.fromkeys([own, *(args.frames_per_group or [])]))
        if scheduler.is_distilled:  # sampled as it was distilled
            steps, guidance, control_guidance = None, None, 1.0
        else:
            steps = steps or scheduler.default_inference_steps
        make_window_plan(scheduler, steps, torch.device("cpu"))
    else:
        steps = steps or CLIP_STEPS
        control_guidance = control_guidance if kind == "CogVideoXControlPipeline" else 1.0
    dtype = str(device_and_dtype(args.device, args.dtype)[1]).removeprefix("torch.")
    return ModelPlan(
        name, directory, kind, *picture_size(directory, index), widths,
        {
            **pipeline_digests(directory, index), "dtype": dtype,
            "num_inference_steps": steps, "guidance_scale": guidance, "control_guidance_scale": control_guidance,
        },
    )  # fmt: skip


@dataclass
class Effort:
    """What making videos took: seconds and forwards (each branch of guidance is one) for `frames` raw frames of each of
    `batch_size` videos. A stream's first chunk, which also samples the window from the prompt, is left out."""

    seconds: float = 0.0
    forwards: float = 0.0
    frames: int = 0
    batch_size: int = 0
    longest: int = 0  # raw frames made at once

    def clear(self) -> None:
        for entry in fields(self):
            setattr(self, entry.name, entry.default)

    def about(self, frames_per_unit: int) -> dict[str, Any]:
        """`forwards` for a unit of `frames_per_unit` frames of one video (a clip, or a shift of a stream)."""
        if not self.frames:
            return {}
        share = frames_per_unit / self.frames
        return {
            "seconds_per_frame": self.seconds / (self.frames * self.batch_size), "batch_size": self.batch_size,
            "forwards": round(self.forwards * share, 3), "forwards_per_frames": frames_per_unit,
        }  # fmt: skip


class ScheduledCommands:
    """Commands known ahead, one index a latent frame, for each of B streams."""

    def __init__(self, indices: Sequence[Sequence[int]]):
        self.controls: list[Any] = [list(row) for row in indices]

    def took(self, num_frames: int) -> None:
        """`num_frames` raw frames were made."""


class LiveCommands:
    """A player at each of B streams: who asks gets the command of the frame that is due, and cannot know the next ones.

    `delivered` [B][F]: which command each latent frame was finished under.
    """

    def __init__(self, signals: Sequence[Sequence[str]]):
        """signals: [B][N], the command at each raw frame."""
        self.signals, self.frame = signals, 0
        self.delivered: list[list[str]] = [[] for _ in signals]
        self.controls: list[Callable[[], str]] = [lambda i=i: self._now(i) for i in range(len(signals))]

    def _now(self, stream: int) -> str:
        row = self.signals[stream]
        return row[min(self.frame, len(row) - 1)]

    def took(self, num_frames: int) -> None:
        """`num_frames` raw frames were made under the commands of the moment."""
        latents = -(-num_frames // FRAMES_PER_LATENT)  # the first chunk begins with a latent of one frame
        for stream, delivered in enumerate(self.delivered):
            delivered += [self._now(stream)] * latents
        self.frame += num_frames


class Model:
    """A model that makes videos of scenes; loaded when the first is made."""

    def __init__(self, plan: ModelPlan, args: argparse.Namespace):
        self.plan, self.effort = plan, Effort()
        self.device, self.dtype = device_and_dtype(args.device, args.dtype)

    @cached_property
    def pipeline(self) -> CogVideoXControlPipeline:
        loaded = CogVideoXStreamingPipeline if self.plan.streams else CogVideoXControlPipeline
        pipeline = loaded.from_pretrained(self.plan.directory, torch_dtype=self.dtype).to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def about(self, frames_per_group: int | None = None) -> dict[str, Any]:
        """The effort since it was cleared: forwards of a clip, or of a shift."""
        if not self.plan.streams:
            return self.effort.about(self.effort.longest)
        return self.effort.about((frames_per_group or self.plan.frames_per_group[0]) * FRAMES_PER_LATENT)

    def scheduled(self, scenes: Sequence[Scene]) -> ScheduledCommands:
        """The scenes' signals, known ahead."""
        return ScheduledCommands([self.indices(scene.latent_signals()) for scene in scenes])

    def indices(self, signals: Sequence[str]) -> list[int]:
        """Names of signals as this model's own indices."""
        return self.pipeline.control_vocabulary.indices(list(signals)).tolist()

    def clips(self, scenes: Sequence[Scene], generators: list[torch.Generator]) -> Tensor:
        """Whole clips of scenes: uint8 [B, N, h, w, 3]."""
        signals = [self.indices(scene.latent_signals()) for scene in scenes] if self.plan.has_control else None
        settings, num_frames = self.plan.settings, len(scenes[0].signals)
        with self._forwards() as count:
            started = time.perf_counter()
            video = self.pipeline(
                [scene.caption for scene in scenes],
                num_frames=num_frames,
                num_inference_steps=settings["num_inference_steps"],
                guidance_scale=settings["guidance_scale"],
                control_signal=signals,
                control_guidance_scale=settings["control_guidance_scale"],
                generator=generators,
                output_type="np",
            ).frames
            self._add_effort(time.perf_counter() - started, count, num_frames, len(scenes))
        return torch.from_numpy(to_frames(video))

    def stream(
        self,
        scenes: Sequence[Scene],
        commands: ScheduledCommands | LiveCommands,
        generators: list[torch.Generator],
        num_frames: int,
        frames_per_group: int | None = None,
    ) -> Iterator[Tensor]:
        """Streams side by side, as pieces uint8 [B, n, h, w, 3] that make up exactly `num_frames`."""
        pipeline, settings = self.pipeline, self.plan.settings
        width = frames_per_group or self.plan.frames_per_group[0]
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, frames_per_group=width)
        chunks = pipeline.stream(
            [scene.caption for scene in scenes],
            commands.controls,
            num_chunks=num_chunks_for(num_frames / FPS, FPS, FRAMES_PER_LATENT * width),
            num_inference_steps=settings["num_inference_steps"],
            guidance_scale=settings["guidance_scale"],
            control_guidance_scale=settings["control_guidance_scale"],
            generator=generators,
        )
        made = 0
        while made < num_frames:
            with self._forwards() as count:
                started = time.perf_counter()
                chunk = torch.from_numpy(next(chunks))
                seconds = time.perf_counter() - started
            chunk = chunk[None] if chunk.ndim == 4 else chunk  # a batch of one comes without its axis
            commands.took(chunk.shape[1])
            if made:
                self._add_effort(seconds, count, chunk.shape[1], len(chunk))
            yield chunk[:, : num_frames - made]
            made += chunk.shape[1]

    def _forwards(self) -> _ForwardCount:
        return _ForwardCount(self.pipeline.transformer)

    def _add_effort(self, seconds: float, count: _ForwardCount, num_frames: int, batch_size: int) -> None:
        # Batches may differ in size (the last is smaller); seconds and forwards are kept for one video of the first.
        effort = self.effort
        effort.batch_size = effort.batch_size or batch_size
        effort.seconds += seconds * effort.batch_size / batch_size
        effort.forwards += count.rows / batch_size
        effort.frames += num_frames
        effort.longest = max(effort.longest, num_frames)


class _ForwardCount:
    """Counts the rows that go through a transformer: `with _ForwardCount(transformer) as count: … count.rows`."""

    def __init__(self, transformer: torch.nn.Module):
        self.transformer, self.rows = transformer, 0

    def _see(self, module: torch.nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        self.rows += len(named["hidden_states"])

    def __enter__(self) -> _ForwardCount:
        self.hook = self.transformer.register_forward_pre_hook(self._see, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.hook.remove()


def reconstruct(vae: torch.nn.Module, frames: Tensor, batch_size: int) -> Tensor:
    """True video through the VAE and back, as a stream is decoded: uint8 [B, N, h, w, 3], N = 4(F − 1) + 1."""
    decoded = []
    for piece in frames.split(batch_size):
        latents = encode_frames(vae, piece.permute(0, 1, 4, 2, 3))
        back = StreamingDecoder(vae).decode_uint8(latents)
        decoded.append(torch.from_numpy(back[None] if back.ndim == 4 else back))
    return torch.cat(decoded)


def generators_for(seed: int, first: int, count: int, purpose: int = 0) -> list[torch.Generator]:
    """One for each video, from its own number: what a video is does not depend on the batch it is made in, and, drawn
    on the CPU, not on the device."""
    states = [np.random.SeedSequence([seed, first + i, purpose]).generate_state(1)[0] for i in range(count)]
    return [torch.Generator().manual_seed(int(state)) for state in states]
