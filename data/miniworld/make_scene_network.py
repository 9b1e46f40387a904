r"""Trains the network that judges videos of the mini world: what they show, how they move, whether they are damaged.

    python -m data.miniworld.make_videos --output_dir outputs/scene --num_clips 600 --seed 11
    python -m data.miniworld.make_scene_network --data_root outputs/scene --output_dir data/miniworld/scene_network

It learns from true videos: biome, weather and car colour are in the captions, speed and yaw rate in the truth files.
Half of the segments are damaged in one of five ways, and the network has to say in which and how badly: so its features
see damage, in proportion, instead of looking past it, while labels stay readable in the slightly blurred pictures that
a video autoencoder gives back. A killed run goes on from a checkpoint at most a minute old.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from common.config.command_line import ArgumentParser, positive_number, refuse_unwritable, whole_number
from common.config.errors import UserError, run_cli
from common.data.index import ClipRecord, read_index
from common.evaluation.degradations import degrade
from common.evaluation.scene_network import DEGRADATIONS, SceneNetwork, cut_segments
from data.miniworld.base_training import Batch, Budget, fit
from data.miniworld.captions import BIOME_WORDS, COLORS, WEATHER_WORDS
from data.miniworld.clips import decode_clips

LABELS = {"biome": BIOME_WORDS, "weather": WEATHER_WORDS, "color": {color: [f"{color} car"] for color in COLORS}}
MOTION_WEIGHT, DEGRADATION_WEIGHT = 2.0, 6.0
LOOK_DAMAGE = ("blur", "noise", "color_shift")  # may hide labels; the others leave every picture as it is


@dataclass(frozen=True)
class Clips:
    """Labelled videos in memory. All have n frames.

    frames: uint8 [clips, n, h, w, 3]; motion: float32 [clips, n, 2], speed (m/s) and yaw rate (rad/s, left positive);
    labels: kind → int64 [clips], the place of the value in the network's order.
    """

    frames: Tensor
    motion: Tensor
    labels: dict[str, Tensor]

    def to(self, device: str) -> Clips:
        return Clips(
            self.frames.to(device), self.motion.to(device), {kind: v.to(device) for kind, v in self.labels.items()}
        )

    def part(self, rows: slice) -> Clips:
        return Clips(self.frames[rows], self.motion[rows], {kind: v[rows] for kind, v in self.labels.items()})


def read_truth(record: ClipRecord) -> np.ndarray:
    """float32 [n, 2], speed and yaw rate of every frame, from the truth file beside a clip of make_videos."""
    folder = record.path.parent
    path = (folder.with_name(folder.name.replace("videos", "truth", 1)) / record.path.name).with_suffix(".npz")
    try:
        with np.load(path) as truth:
            return np.stack([truth["speed"], truth["yaw_rate"]], axis=-1)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"index entry {record.entry}: no truth in {path} ({error}); use make_videos") from error


def read_clips(records: list[ClipRecord], network: SceneNetwork) -> Clips:
    """Decodes all clips, at the network's size, with what is known of them."""
    motion = []
    labels: dict[str, list[int]] = {kind: [] for kind in LABELS}
    for record in records:
        named = network.labels_of_caption(record.caption)
        if missing := set(LABELS) - set(named):
            raise UserError(f"index entry {record.entry}: the caption names no {' and no '.join(sorted(missing))}")
        for kind, value in named.items():
            labels[kind].append(network.label_values(kind).index(value))
        motion.append(torch.from_numpy(read_truth(record)))
    config = network.config
    clips = decode_clips(records, config.num_frames, config.height, config.width)
    for record, clip, truth in zip(records, clips, motion, strict=True):
        if not len(clip) == len(truth) == len(clips[0]):
            raise UserError(
                f"index entry {record.entry}: {len(clip)} frames, truth of {len(truth)}; all clips need the length of "
                f"the first, {len(clips[0])}"
            )
    frames = torch.stack([clip.permute(0, 2, 3, 1) for clip in clips])
    return Clips(frames, torch.stack(motion), {kind: torch.tensor(v) for kind, v in labels.items()})


def mean_motion(motion: Tensor) -> Tensor:
    """[..., N, 2] → [..., 2]: what the steps from frame to frame show. The first frame's own step lies before it."""
    return motion[..., 1:, :].mean(-2)


def draw_batch(clips: Clips, num_frames: int, batch_size: int, generator: torch.Generator) -> Batch:
    """Random segments, half of them mirrored, half of them damaged; a third is played backwards.

    Backwards the world moves against what the car's lean and its lights say: a network that sees such video too reads
    motion from what moves.

    Returns "frames" uint8 [B, N, h, w, 3], "motion" [B, 2], "strengths" of the damage [B, 5], and each kind of label
    by its name, int64 [B].
    """
    count, length = clips.frames.shape[:2]
    device = clips.frames.device
    rows = torch.randint(count, (batch_size,), generator=generator).to(device)
    starts = torch.randint(length - num_frames + 1, (batch_size,), generator=generator).to(device)
    window = starts[:, None] + torch.arange(num_frames, device=device)  # [B, N]
    frames, motion = clips.frames[rows[:, None], window], mean_motion(clips.motion[rows[:, None], window])
    mirrored = torch.arange(batch_size, device=device) % 2 == 0
    frames = torch.where(mirrored[:, None, None, None, None], frames.flip(3), frames)
    motion = torch.stack([motion[:, 0], torch.where(mirrored, -motion[:, 1], motion[:, 1])], dim=-1)
    backwards = torch.arange(batch_size, device=device) % 3 == 0
    frames = torch.where(backwards[:, None, None, None, None], frames.flip(1), frames)
    motion = torch.where(backwards[:, None], -motion, motion)
    strengths = torch.zeros(batch_size, len(DEGRADATIONS), device=device)
    on_device = torch.Generator(device).manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
    for i in range(batch_size // 2, batch_size):
        which = (i - batch_size // 2) % len(DEGRADATIONS)
        strength = float(torch.rand(1, generator=generator))
        frames[i : i + 1] = degrade(frames[i : i + 1], DEGRADATIONS[which], strength, on_device)
        strengths[i, which] = strength
    labels = {kind: values[rows] for kind, values in clips.labels.items()}
    return {"frames": frames, "motion": motion, "strengths": strengths, **labels}


def scene_loss(network: SceneNetwork) -> Callable[[Batch], Tensor]:
    """`loss_of_batch` for `fit`: cross entropy of the labels, mean squared error of motion and damage."""
    device = network.motion_unit.device
    of_look = torch.tensor([float(name in LOOK_DAMAGE) for name in DEGRADATIONS], device=device)

    def loss_of_batch(batch: Batch) -> Tensor:
        reading = network(batch["frames"])
        strengths = batch["strengths"]
        readable = 1 - strengths @ of_look  # the more damage, the less a label is asked for
        orderly = 1 - strengths @ (1 - of_look)  # and motion, where frames are missing or out of order
        names = sum(
            (readable * cross_entropy(logits, batch[kind], reduction="none")).mean()
            for kind, logits in reading.logits.items()
        )
        error = ((reading.motion - batch["motion"]) / network.motion_unit).square().mean(-1)
        damage = (reading.degradation - strengths).square().sum(-1).mean()
        return names + MOTION_WEIGHT * (orderly * readable * error).mean() + DEGRADATION_WEIGHT * damage

    return loss_of_batch


def measure(network: SceneNetwork, clips: Clips) -> dict[str, float]:
    """Accuracies of single segments of true video, and R² of speed and yaw rate."""
    length = network.config.num_frames
    reading = network.read(cut_segments(clips.frames, length))
    per_clip = clips.frames.shape[1] // length
    figures = {}
    for kind, values in clips.labels.items():
        right = reading.logits[kind].argmax(-1) == values.repeat_interleave(per_clip).cpu()
        figures[f"{kind} accuracy"] = right.double().mean().item()
    truth = mean_motion(cut_segments(clips.motion, length)).cpu()
    unexplained = (reading.motion - truth).square().mean(0) / truth.var(0, correction=0)
    figures["speed R²"], figures["yaw rate R²"] = (1 - unexplained).tolist()
    return {name: round(value, 4) for name, value in figures.items()}


def make_scene_network(args: argparse.Namespace) -> SceneNetwork:
    """Trains, measures on the held-out clips at the end of the index, and saves."""
    refuse_unwritable(args.output_dir, "--output_dir")
    records = read_index(args.index_file or args.data_root / "index.json", args.data_root, needs_control=False)
    if len(records) <= args.num_heldout:
        raise UserError(f"the index has {len(records)} clips; --num_heldout {args.num_heldout} leaves none to train on")
    torch.manual_seed(args.seed)
    network = SceneNetwork(LABELS)
    clips = read_clips(records, network)
    train, heldout = clips.part(slice(-args.num_heldout)).to(args.device), clips.part(slice(-args.num_heldout, None))
    network.to(args.device)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=args.learning_rate, weight_decay=0.01, betas=(0.9, 0.98), fused=True,
        capturable=torch.device(args.device).type == "cuda",
    )  # fmt: skip
    partial = args.output_dir / ".partial"
    partial.mkdir(parents=True, exist_ok=True)

    def batch_of_step(step: int, progress: float) -> Batch:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        return draw_batch(train, network.config.num_frames, args.batch_size, generator)

    checkpoint = partial / "scene.pt"
    fit(network, optimizer, batch_of_step, scene_loss(network), Budget(args.steps), checkpoint, "scene network")
    network.eval()
    network.rescale_features(network.features(cut_segments(train.frames[:200], network.config.num_frames)))
    network.half().float()  # what is shipped has half precision: measure that
    figures = measure(network, heldout)
    for name, value in figures.items():
        print(f"{name}: {value:.4f} on {args.num_heldout} held-out clips")
    network.to("cpu").half().save_pretrained(partial / "network")
    for file in (partial / "network").iterdir():
        os.replace(file, args.output_dir / file.name)
    settings = {name: getattr(args, name) for name in ("steps", "batch_size", "learning_rate", "seed", "num_heldout")}
    record = {"settings": {**settings, "num_clips": len(records)}, "heldout": figures}
    (args.output_dir / "training.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    shutil.rmtree(partial)
    return SceneNetwork.from_pretrained(args.output_dir)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--data_root", type=Path, required=True, help="folder of clips drawn by make_videos, with their truth")
    add("--index_file", type=Path, default=None, help="index of the clips; default: index.json in data_root")
    add("--output_dir", type=Path, required=True, help="where the network goes")
    add("--num_heldout", type=whole_number(1), default=60, help="clips at the end of the index kept for measuring")
    add("--steps", type=whole_number(1), default=1500)
    add("--batch_size", type=whole_number(2), default=20, help="segments a step")
    add("--learning_rate", type=positive_number, default=2e-3, help="peak")
    add("--seed", type=whole_number(0), default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main() -> None:
    make_scene_network(parse_arguments())


if __name__ == "__main__":
    run_cli(main)
