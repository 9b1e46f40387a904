r"""Draws a set of mini-world clips as H.264 files with captions, control labels and the truth behind them.

    python -m data.miniworld.make_videos --output_dir outputs/miniworld --num_clips 200 --seed 0
    python -m data.miniworld.make_videos --output_dir outputs/miniworld --num_clips 20 --seed 1 \
        --index_name heldout.json

writes, for the first,

    index.json          {"list": [{"path", "caption", "control_signal_seq", "valid_frame_idx"}, …]}
    videos/00000.mp4    97 frames of 64 x 96 at 16 fps
    truth/00000.npz     speed (m/s) and yaw_rate (rad/s, left is positive) of every frame

and for the second the same beside it, in heldout.json, videos_heldout/ and truth_heldout/. A clip depends on the
world, the seed and its own number only. Complete clips of the same settings are kept, so an interrupted run goes on
where it was. `--world broad` draws the same drives with another camera, road, vehicle and grading in every clip.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.config.command_line import ArgumentParser, refuse_unwritable, whole_number
from common.config.errors import UserError, run_cli
from common.config.files import replace_text, replacing
from common.data.video_writer import write_video
from data.miniworld.looks import random_look
from data.miniworld.render import render
from data.miniworld.simulator import FPS, random_signals, simulate
from data.miniworld.views import WORLDS

# Raise one when the same seed draws something else: kept clips are then drawn again.
DRAWING_VERSION = 1  # of everything
BROAD_VERSION = 3  # of the broad world's views


@dataclass(frozen=True)
class ClipJob:
    """What it takes to draw one clip, for a worker process."""

    number: int
    seed: int
    num_frames: int
    height: int
    width: int
    video: Path
    truth: Path
    world: str = "game"

    def clip_seed(self) -> int:
        return int(np.random.SeedSequence([self.seed, self.number]).generate_state(1)[0])

    def signals(self) -> list[str]:
        return random_signals(self.num_frames, np.random.default_rng([self.clip_seed(), 5]))

    def stamp(self) -> np.ndarray:
        """Kept in the truth file: a clip whose stamp differs was made with other settings."""
        settings = [DRAWING_VERSION, self.seed, self.number, self.num_frames, self.height, self.width]
        # The game has no number here: clips from before there was another world stay what they are.
        return np.array(settings + ([WORLDS.index(self.world), BROAD_VERSION] if self.world != "game" else []))

    def is_complete(self) -> bool:
        try:
            with np.load(self.truth) as truth:
                return self.video.stat().st_size > 0 and np.array_equal(truth["stamp"], self.stamp())
        except (OSError, ValueError, KeyError, EOFError):
            return False


def make_clip(job: ClipJob) -> None:
    """Simulates, draws and writes one clip; the truth file comes last and marks it complete."""
    look, _ = random_look(job.clip_seed(), job.world)
    trajectory = simulate(job.signals(), job.clip_seed())
    # High quality, and a key frame every second: reading a window from the middle is quick.
    write_video(job.video, render(trajectory, look, job.height, job.width), FPS, crf=12, gop=FPS)
    with replacing(job.truth) as beside:
        np.savez(
            beside, stamp=job.stamp(), speed=trajectory.speed.astype(np.float32), signals=trajectory.signals,
            yaw_rate=trajectory.yaw_rate.astype(np.float32),
        )  # fmt: skip


def make_jobs(args: argparse.Namespace) -> list[ClipJob]:
    """The clips of an index, their folders made."""
    if args.num_clips < 1 or args.num_frames < 1:
        raise UserError("--num_clips and --num_frames have to be at least 1")
    if args.height % 16 or args.width % 16 or args.height < 16 or args.width < 64:  # decord reads nothing narrower
        raise UserError(f"--height {args.height} --width {args.width}: use multiples of 16, at least 16 by 64")
    index = Path(args.index_name)
    if index.name != args.index_name or index.suffix != ".json":
        raise UserError(f"--index_name {args.index_name}: give a file name that ends in .json, without a folder")
    suffix = "" if index.stem == "index" else f"_{index.stem}"
    videos, truth = args.output_dir / f"videos{suffix}", args.output_dir / f"truth{suffix}"
    refuse_unwritable(args.output_dir, "--output_dir")
    for folder in (videos, truth):
        folder.mkdir(parents=True, exist_ok=True)
    return [
        ClipJob(
            i, args.seed, args.num_frames, args.height, args.width,
            videos / f"{i:05d}.mp4", truth / f"{i:05d}.npz", args.world,
        )
        for i in range(args.num_clips)
    ]  # fmt: skip


def index_entry(job: ClipJob, output_dir: Path) -> dict[str, object]:
    return {
        "path": job.video.relative_to(output_dir).as_posix(),
        "caption": random_look(job.clip_seed(), job.world)[1],
        "control_signal_seq": ",".join(job.signals()),
        "valid_frame_idx": 0,
    }


def make_videos(args: argparse.Namespace) -> Path:
    """Draws what is missing and writes the index; returns its path."""
    jobs = make_jobs(args)
    missing = [job for job in jobs if not job.is_complete()]
    path = args.output_dir / args.index_name
    if missing:  # an index of what was there would tell of clips that are drawn over
        path.unlink(missing_ok=True)
    progress = tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc="drawing clips", unit="clip")
    with progress:
        if args.num_workers == 0:
            for job in missing:
                make_clip(job)
                progress.update()
        elif missing:
            workers = min(args.num_workers, len(missing))
            # "spawn": a caller may have threads running (PyTorch), which a fork would copy in an unknown state.
            with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
                for _ in pool.map(make_clip, missing):
                    progress.update()
    replace_text(path, json.dumps({"list": [index_entry(job, args.output_dir) for job in jobs]}, indent=1) + "\n")
    return path


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for index, videos and truth")
    parser.add_argument(
        "--world", choices=WORLDS, default="game",
        help="game: one camera, one car, roads with kerbs; broad: others in every clip, for a base model",
    )  # fmt: skip
    parser.add_argument("--num_clips", type=int, default=200)
    parser.add_argument("--num_frames", type=int, default=97, help=f"frames per clip, at {FPS} a second")
    parser.add_argument("--height", type=int, default=64, help="pixels, a multiple of 16")
    parser.add_argument("--width", type=int, default=96, help="pixels, a multiple of 16")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="another seed gives other clips")
    parser.add_argument("--index_name", default="index.json", help="another name makes a further set of clips")
    workers = os.cpu_count() or 1
    parser.add_argument("--num_workers", type=whole_number(0), default=workers, help="processes; 0 draws in this one")
    return parser.parse_args(argv)


def main() -> None:
    path = make_videos(parse_arguments())
    print(f"index: {path}")


if __name__ == "__main__":
    run_cli(main)
