"""Scenes to measure models on: captions, drives and the true video of them, none of which any training clip has.

A scene follows from three numbers: the seed of the held-out set, the sampling seed (each has scenes of its own, so that
videos are independent draws), and its number. They are mixed with a constant that no training clip uses.

Shapes: B scenes, N raw frames, F latent frames, h w pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.miniworld.instruments import FRAMES_PER_LATENT, latent_signals, signals_of_frames
from data.miniworld.looks import Look, random_look
from data.miniworld.render import render
from data.miniworld.simulator import SIGNALS, State, random_start, simulate

HELD_OUT = 0x4E1D0F7  # keeps every draw here apart from those of make_videos
CONTROLS = ("mixed", "straight", "live")
LEAD_IN = 32  # raw frames of a stream that do not count: its first window is sampled as a clip is
HOLD = (28, 45)  # raw frames that a live command is held: long enough to wait for its answer


@dataclass(frozen=True)
class Scene:
    """A caption, the look it names, and a drive: where it starts and the signal of each raw frame."""

    look: Look
    caption: str
    start: State
    signals: tuple[str, ...]

    def latent_signals(self) -> list[str]:
        """The signal of each of the F latent frames under the 4(F − 1) + 1 raw ones."""
        return list(self.signals[::FRAMES_PER_LATENT])


@dataclass(frozen=True)
class SceneSet:
    """`num_videos` scenes of `num_frames` raw frames each, 4n + 1.

    control: "mixed" changes at random, per latent frame, all nine signals alike; "straight" drives straight on; "live"
    changes at any raw frame, now and then, as a player does.
    """

    held_out_seed: int
    seed: int
    num_videos: int
    num_frames: int
    control: str = "mixed"

    def scenes(self) -> list[Scene]:
        return [self._scene(number) for number in range(self.num_videos)]

    def other_scenes(self, drives: int) -> list[Scene]:
        """For each scene `drives` more of the same caption, with another drive and other landmarks: all that a caption
        leaves open. What a perfect model makes differs from these as they differ from one another."""
        scenes = [self._scene(number, drive) for number in range(self.num_videos) for drive in range(1, drives + 1)]
        return [replace(scene, look=replace(scene.look, seed=scene.look.seed ^ (i + 1)))
                for i, scene in enumerate(scenes)]  # fmt: skip

    def _scene(self, number: int, drive: int = 0) -> Scene:
        key = [HELD_OUT, self.held_out_seed, self.seed, number]
        look, caption = random_look(int(np.random.SeedSequence(key).generate_state(1)[0]))
        rng = np.random.default_rng([*key, CONTROLS.index(self.control), drive])
        return Scene(look, caption, random_start(rng), tuple(self._signals(rng)))

    def _signals(self, rng: np.random.Generator) -> list[str]:
        if self.control == "straight":
            return ["D"] * self.num_frames
        if self.control == "mixed":
            return signals_of_frames(latent_signals((self.num_frames - 1) // FRAMES_PER_LATENT + 1, rng))
        signals = [str(rng.choice(SIGNALS))] * (LEAD_IN + int(rng.integers(8)))
        while len(signals) < self.num_frames:
            others = [signal for signal in SIGNALS if signal != signals[-1]]
            signals += [str(rng.choice(others))] * int(rng.integers(*HOLD))
        return signals[: self.num_frames]


def draw_scenes(scenes: Sequence[Scene], height: int, width: int, desc: str = "drawing true video") -> Tensor:
    """The true video of scenes of equal length: uint8 [B, N, height, width, 3]."""

    def draw(scene: Scene) -> np.ndarray:
        return render(simulate(scene.signals, start=scene.start), scene.look, height, width)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        drawn = tqdm(pool.map(draw, scenes), total=len(scenes), desc=desc, unit="clip", leave=False)
        return torch.from_numpy(np.stack(list(drawn)))
