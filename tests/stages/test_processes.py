"""A real stage in two processes, started as a user starts it, against one process with twice the batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.config.loader import load_settings
from common.training.trainer import Trainer
from tests.stages.conftest import STAGE_ARGUMENTS, TINY

ROOT = Path(__file__).parents[2]
STAGE4 = ROOT / "stage4"
CONFIG = str(STAGE4 / "training" / "miniworld_config.py")


def all_of(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def settings_words(base: Path, world: Path) -> list[str]:
    """Two steps of stage 4."""
    paths = {
        "pretrained_model_name_or_path": base, "data_root": world, "index_file": world / "index.json",
        "validation_index_file": "",
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in paths.items()]
    words += [*TINY.split(), *STAGE_ARGUMENTS[4].split(), "--validation_prompts", "--validation_steps", "0"]
    return [*words, "--num_validation_clips", "0", "--max_train_steps", "2"]


def launch(*words: str, **environment: str) -> None:
    """stage4/train_…sh with a sample a process."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = ["bash", str(STAGE4 / "train_text_to_video_scm.sh"), "--config", CONFIG, *words]
    run = subprocess.run(
        [*command, "--train_batch_size", "1"], text=True, capture_output=True, timeout=180,
        env=inherited | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr


def train_here(*words: str) -> None:
    settings = load_settings(CONFIG, [*words, "--train_batch_size", "2"])
    Trainer(settings, settings.build_objective()).train()


@pytest.mark.slow
def test_two_processes_train_stage_4_like_one_with_twice_the_batch(tiny_models, tiny_world, tmp_path):
    base = tiny_models / "stage3"
    words = settings_words(base, tiny_world)
    launch(*words, f"--output_dir={tmp_path / 'two'}", NUM_PROCESSES="2", CUDA_VISIBLE_DEVICES="")
    train_here(*words, f"--output_dir={tmp_path / 'one'}")

    start = all_of(load_file(base / "transformer" / "diffusion_pytorch_model.safetensors"))
    for name in ("weights", "target"):
        two, one = (
            all_of(load_file(tmp_path / run / "checkpoint-2" / f"{name}.safetensors")) for run in ("two", "one")
        )
        assert (two - one).norm() < 1e-5 * one.norm()
        assert (two - one).norm() < 1e-3 * (one - start).norm()  # what was learnt
