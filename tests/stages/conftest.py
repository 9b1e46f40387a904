"""A tiny world on disk and a way to train a stage on it: real videos, the real configs' code path, seconds a stage."""

import json
from pathlib import Path

import pytest
import torch

from common.config.loader import load_settings
from common.tools.fuse_lora_weights import fuse_lora_weights
from common.training.encoding import EncodedBatch
from common.training.trainer import Trainer
from data.miniworld import make_videos

ROOT = Path(__file__).parents[2]
# 64 pixels wide, not 48: decord cannot read H.264 that narrow.
TINY = """
    --height_buckets 32 --width_buckets 64 --frame_buckets 33 --windows_per_clip 0 --latent_cache_dir=
    --max_sequence_length 16 --train_batch_size 2 --max_train_steps 6 --checkpointing_steps 3 --logging_steps 1
    --validation_steps 6 --num_validation_clips 2 --lr_warmup_steps 1 --learning_rate 5e-3 --report_to none
"""
STAGE_ARGUMENTS = {
    1: "--rank 4 --lora_alpha 2",
    2: "--control_dim 12 --control_start_layer 1 --control_end_layer 4",
    3: "",
    4: "--learning_rate 1e-3",
}


def random_batch(batch_size: int, num_frames: int, channels: int, height: int, width: int) -> EncodedBatch:
    """Samples as the tiny models take them, the same every time."""
    g = torch.Generator().manual_seed(0)
    return EncodedBatch(
        torch.randn(batch_size, num_frames, channels, height, width, generator=g),
        torch.randn(batch_size, 16, 24, generator=g),
        torch.randint(0, 9, (batch_size, num_frames, 1), generator=g).repeat(1, 1, 4),
        [str(i) for i in range(batch_size)],
    )


def make_objective(stage: int, base, *overrides: str):
    """A stage's objective on a tiny base, with nothing loaded."""
    words = [*TINY.split(), "--pretrained_model_name_or_path", str(base), *overrides]
    if stage == 2:
        words += ["--control_dim", "12", "--control_start_layer", "1", "--control_end_layer", "2"]
    return load_settings(ROOT / f"stage{stage}" / "training" / "miniworld_config.py", words).build_objective()


def load_objective(stage: int, base, *overrides: str, device: str = "cpu", dtype: torch.dtype = torch.float32):
    objective = make_objective(stage, base, *overrides)
    torch.manual_seed(0)
    objective.load(torch.device(device), dtype)
    return objective


class TinyStages:
    """Trains stages in this process, each on what the last one wrote."""

    def __init__(self, root: Path, world: Path, base: str):
        self.root, self.world, self.base = root, world, base

    def base_of(self, stage: int) -> str:
        return {1: self.base, 2: str(self.root / "stage1_fused")}.get(stage, str(self.root / f"stage{stage - 1}"))

    def settings(self, stage: int, output_dir: Path, *overrides: str):
        config = ROOT / f"stage{stage}" / "training" / "miniworld_config.py"
        paths = {
            "pretrained_model_name_or_path": self.base_of(stage),
            "output_dir": output_dir,
            "data_root": self.world,
            "index_file": self.world / "index.json",
            "validation_index_file": self.world / "heldout.json",
        }
        words = [word for name, value in paths.items() for word in (f"--{name}", str(value))]
        return load_settings(
            config, [*words, *TINY.split(), "--validation_prompts", *STAGE_ARGUMENTS[stage].split(), *overrides]
        )

    def train(self, stage: int, output_dir: Path, *overrides: str) -> Path:
        settings = self.settings(stage, output_dir, *overrides)
        settings.check_files()
        Trainer(settings, settings.build_objective()).train()
        return output_dir

    def run(self, stage: int) -> Path:
        """The stage's own output, trained once."""
        output_dir = self.root / f"stage{stage}"
        if not output_dir.exists():
            if stage > 1:
                self.run(stage - 1)
            self.train(stage, output_dir)
            if stage == 1:
                fuse_lora_weights(self.base, output_dir, self.root / "stage1_fused")
        return output_dir


def read_metrics(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "logs" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def tiny_stages(tmp_path_factory, tiny_base) -> TinyStages:
    world = tmp_path_factory.mktemp("world")
    size = ["--height", "32", "--width", "64", "--num_frames", "41", "--num_workers", "0", "--output_dir", str(world)]
    make_videos.make_videos(make_videos.parse_arguments([*size, "--num_clips", "6"]))
    held_out = ["--num_clips", "2", "--seed", "1", "--index_name", "heldout.json"]
    make_videos.make_videos(make_videos.parse_arguments([*size, *held_out]))
    return TinyStages(tmp_path_factory.mktemp("stages"), world, tiny_base)
