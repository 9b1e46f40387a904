"""The work behind `common.tools.evaluate`: every result that is not in the store yet is made and stored.

Shapes: B videos at once, V videos of a sampling seed, N raw frames, h w pixels.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from common.cogvideox.loading import device_and_dtype
from common.cogvideox.pipeline_io import load_component
from common.evaluation.parts import MEASURES, Part, PartKey, PartStore
from common.evaluation.scene_network import SceneNetwork
from common.tools.evaluate_measures import (
    control_values,
    drift_values,
    feature_values,
    latency_values,
    load_scene_network,
    statistics_of,
    values_of,
)
from common.tools.evaluate_models import (
    LiveCommands,
    Model,
    ModelPlan,
    ScheduledCommands,
    generators_for,
    reconstruct,
)
from common.tools.evaluate_samples import save_samples
from data.miniworld.heldout import LEAD_IN, Scene, SceneSet, draw_scenes
from data.miniworld.instruments import FRAMES_PER_LATENT
from data.miniworld.simulator import FPS

VIDEO_MEASURES = MEASURES[:3]  # all three of the same videos
TRUE_ROW, REFERENCE_ROW = "true", "reference"
TRUE_SECONDS = 20.0  # of true video a drive, against which drift is measured and from which its floor comes
PURPOSES = {"mixed": 0, "straight": 1, "live": 2}  # keep apart what is drawn for them


class Evaluation:
    """One model after another: `measure(plan)`.

    Args:
        args: those of `common.tools.evaluate`.
        store: where results go, and are found again.
    """

    def __init__(self, args: argparse.Namespace, store: PartStore):
        self.args, self.store = args, store
        self.device, self.dtype = device_and_dtype(args.device, args.dtype)

    @cached_property
    def network(self) -> SceneNetwork:
        return load_scene_network(self.device)

    def measure(self, plan: ModelPlan) -> None:
        """All measures that were asked for and that the model has, at all seeds."""
        model = Model(plan, self.args)
        for seed in self.args.seeds:
            self._videos(model, seed)
            if plan.streams and "latency" in self.args.measures:
                for width in plan.frames_per_group:
                    self._latency(model, seed, width)
            if plan.streams and "drift" in self.args.measures:
                for control in ("mixed", "straight"):
                    self._drift(model, seed, control)

    # ---- control, Fréchet distance and text: finished videos ---------------------------------------------------------

    def _videos(self, model: Model, seed: int) -> None:
        plan, args = model.plan, self.args
        variant, skip = ("streams", LEAD_IN) if plan.streams else ("clips", 0)
        num_frames = self._stream_frames(args.stream_seconds) if plan.streams else args.num_frames
        scene_set = SceneSet(args.held_out_seed, seed, args.num_videos, num_frames)
        scenes = scene_set.scenes()
        drawn: list[Tensor] = []  # true video, drawn when it is first needed

        def true() -> Tensor:
            if not drawn:
                drawn.append(draw_scenes(scenes, plan.height, plan.width))
            return drawn[0]

        def through_vae() -> Tensor:
            vae = load_component(plan.directory, "vae", self.dtype).to(self.device)
            return reconstruct(vae, true(), args.batch_size)

        def by_model() -> Tensor:
            model.effort.clear()
            desc = f"{plan.name}, {variant}, seed {seed}"
            return torch.cat([torch.cat(list(batch), dim=1) for batch in self._batches(model, scenes, seed, desc)])

        settings = self._scene_settings(scene_set, plan)
        own = {"weights": plan.settings["vae"], "dtype": plan.settings["dtype"]}
        for row, kind, more, make in (
            (TRUE_ROW, "true", {}, true),
            (f"vae-{plan.settings['vae']}", "vae", own, through_vae),
            (plan.name, "model", plan.settings, by_model),
        ):
            keys = [PartKey(row, m, variant, seed) for m in VIDEO_MEASURES if m in args.measures]
            missing = [key for key in keys if self.store.load(key, settings | more) is None]
            frames = make() if missing else None
            if missing and kind != "vae" and seed == args.seeds[0]:
                save_samples(args.output_dir / "videos", row, variant, frames, scenes)
            about = model.about() if kind == "model" and missing else {}
            for key in missing:
                values = values_of(key.measure, self.network, frames.to(self.device), scenes, skip)
                self._save(key, kind, settings | more, values, about)
        if "frechet" in args.measures:
            self._reference("frechet", variant, scene_set, plan, skip)

    def _batches(self, model: Model, scenes: list[Scene], seed: int, desc: str) -> Iterator[Iterator[Tensor]]:
        """The pieces uint8 [B, n, h, w, 3] of each batch of videos under commands known ahead."""
        for start in tqdm(range(0, len(scenes), self.args.batch_size), desc=desc, unit="batch"):
            batch = scenes[start : start + self.args.batch_size]
            generators = generators_for(seed, start, len(batch))
            if model.plan.streams:
                yield model.stream(batch, model.scheduled(batch), generators, len(scenes[0].signals))
            else:
                yield iter([model.clips(batch, generators)])

    def _reference(self, measure: str, variant: str, scene_set: SceneSet, plan: ModelPlan, skip: int) -> Part:
        """Features of true video of the same captions, in other drives."""
        drives = self.args.reference_drives
        settings = self._scene_settings(scene_set, plan, reference_drives=drives)
        key = PartKey(REFERENCE_ROW, measure, variant, scene_set.seed)
        part = self.store.load(key, settings)
        if part is None:
            frames = draw_scenes(scene_set.other_scenes(drives), plan.height, plan.width, "drawing the reference")
            part = self._save(key, "reference", settings, feature_values(self.network, frames[:, skip:]))
        return part

    # ---- latency -----------------------------------------------------------------------------------------------------

    def _latency(self, model: Model, seed: int, width: int) -> None:
        plan, args = model.plan, self.args
        num_frames = self._stream_frames(args.stream_seconds)
        scene_set = SceneSet(args.held_out_seed, seed, args.num_videos, num_frames, "live")
        scenes, settings = scene_set.scenes(), self._scene_settings(scene_set, plan)
        key = PartKey(TRUE_ROW, "latency", "live", seed)
        if self.store.load(key, settings) is None:
            frames = draw_scenes(scenes, plan.height, plan.width).to(self.device)
            self._save(key, "true", settings, latency_values(frames, scenes))
        settings |= plan.settings | {"frames_per_group": width}
        key = PartKey(plan.name, "latency", f"w{width}", seed)
        if self.store.load(key, settings) is not None:
            return
        model.effort.clear()
        live, ahead, delivered = [], [], []
        starts = range(0, len(scenes), args.batch_size)
        for start in tqdm(starts, desc=f"{plan.name}, live, W={width}, seed {seed}", unit="batch"):
            batch = scenes[start : start + args.batch_size]
            commands = LiveCommands([scene.signals for scene in batch])
            # The same noise twice: once with the newest command, once with what came of that known ahead.
            for made in (live, ahead):
                generators = generators_for(seed, start, len(batch), PURPOSES["live"])
                made.append(torch.cat(list(model.stream(batch, commands, generators, num_frames, width)), dim=1))
                if made is live:
                    delivered += commands.delivered
                    commands = ScheduledCommands([model.indices(row) for row in commands.delivered])
        frames, num_latents = torch.cat(live).to(self.device), (num_frames - 1) // FRAMES_PER_LATENT + 1
        signals = [row[LEAD_IN // FRAMES_PER_LATENT : num_latents] for row in delivered]
        values = latency_values(frames, scenes)
        values["live"] = control_values(frames[:, LEAD_IN:], signals)
        values["ahead"] = control_values(torch.cat(ahead).to(self.device)[:, LEAD_IN:], signals)
        about = model.about(width) if width == plan.frames_per_group[0] else {}  # a report tells the speed at its own W
        self._save(key, "model", settings, values, about)

    # ---- drift -------------------------------------------------------------------------------------------------------

    def _drift(self, model: Model, seed: int, control: str) -> None:
        plan, args = model.plan, self.args
        short = self._stream_frames(TRUE_SECONDS)
        scene_set = SceneSet(args.held_out_seed, seed, args.num_streams, short, control)
        reference = statistics_of(self._reference("drift", control, scene_set, plan, LEAD_IN).values)
        settings = self._scene_settings(scene_set, plan, reference_drives=args.reference_drives)
        key = PartKey(TRUE_ROW, "drift", control, seed)
        if self.store.load(key, settings) is None:
            frames = draw_scenes(scene_set.scenes(), plan.height, plan.width)
            self._save(key, "true", settings, drift_values(self.network, reference, [frames]))
        num_frames = self._stream_frames(60 * args.minutes)
        settings |= plan.settings | {"num_frames": num_frames, "frames_per_group": plan.frames_per_group[0]}
        key = PartKey(plan.name, "drift", control, seed)
        if self.store.load(key, settings) is not None:
            return
        scenes = SceneSet(args.held_out_seed, seed, args.num_streams, num_frames, control).scenes()
        model.effort.clear()
        generators = generators_for(seed, 0, len(scenes), PURPOSES[control])
        pieces = model.stream(scenes, model.scheduled(scenes), generators, num_frames)
        desc = f"{plan.name}, {control} drift, seed {seed}"
        with tqdm(total=num_frames, desc=desc, unit="frame") as progress:
            values = drift_values(self.network, reference, _watched(pieces, progress, self.device))
        self._save(key, "model", settings, values, model.about())

    # ---- what they share ---------------------------------------------------------------------------------------------

    def _stream_frames(self, seconds: float) -> int:
        """Raw frames of a stream of which `seconds` count, and one more: 4n + 1 are whole latent frames."""
        return LEAD_IN + FRAMES_PER_LATENT * round(seconds * FPS / FRAMES_PER_LATENT) + 1

    def _scene_settings(self, scene_set: SceneSet, plan: ModelPlan, **more: Any) -> dict[str, Any]:
        """What decides the numbers of true video."""
        return {
            "held_out_seed": scene_set.held_out_seed, "num_videos": scene_set.num_videos,
            "num_frames": scene_set.num_frames, "height": plan.height, "width": plan.width, **more,
        }  # fmt: skip

    def _save(self, key: PartKey, kind: str, settings: dict, values: dict, about: dict | None = None) -> Part:
        is_cuda = self.device.type == "cuda"
        machine = torch.cuda.get_device_name(self.device) if is_cuda else f"CPU ({platform.machine()})"
        about = {**(about or {}), "machine": machine, "threads": torch.get_num_threads(), "torch": torch.__version__}
        self.store.save(Part(key, kind, settings, about, values))
        return Part(key, kind, settings, about, values)


def _watched(pieces: Iterator[Tensor], progress: tqdm, device: torch.device) -> Iterator[Tensor]:
    for piece in pieces:
        progress.update(piece.shape[1])
        yield piece.to(device)
