"""The videos behind an evaluation's numbers: its first scenes, true and as each model makes them, under one another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from common.config.files import replace_text
from common.data.video import NARROWEST
from common.data.video_writer import write_video
from common.tools.contact_sheet import make_contact_sheet
from data.miniworld.heldout import Scene
from data.miniworld.simulator import FPS

SHOWN = 2  # scenes
VARIANTS = ("clips", "streams")


def sample_path(folder: Path, row: str, variant: str, number: int) -> Path:
    return folder / f"{row}.{variant}.{number}.mp4"


def save_samples(folder: Path, row: str, variant: str, frames: Tensor, scenes: Sequence[Scene]) -> None:
    """Writes the first of a row's videos, uint8 [V, N, h, w, 3], each with a JSON of its caption and control."""
    folder.mkdir(parents=True, exist_ok=True)
    scale = -(-NARROWEST // frames.shape[-2])
    shown = frames[:SHOWN].repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3).cpu().numpy()
    for number, (video, scene) in enumerate(zip(shown, scenes, strict=False)):
        path = sample_path(folder, row, variant, number)
        write_video(path, video, FPS)
        about = {"prompt": scene.caption, "control": ",".join(scene.signals)}
        replace_text(path.with_suffix(".json"), json.dumps(about, indent=1) + "\n")


def draw_samples(folder: Path, rows: Sequence[str], output_dir: Path) -> list[str]:
    """A contact sheet of each kind of video, scene by scene in the order of `rows`; returns the names of the PNGs."""
    names = []
    for variant in VARIANTS:
        paths = [(row, sample_path(folder, row, variant, n)) for n in range(SHOWN) for row in rows]
        found = [(row, path) for row, path in paths if path.exists()]
        if found:
            names.append(f"samples_{variant}.png")
            make_contact_sheet(found).save(output_dir / names[-1])
    return names
