"""Programs start from the root and from their stage's folder alike, and launch scripts hand everything on."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = ["stage1/fuse_lora_weights.py", *(f"stage{n}/inference.py" for n in (1, 2, 3, 4))]
SCRIPTS = {
    "stage1/train_text_to_video_lora.sh": "lora_config.py",
    "stage2/train_text_to_video_sft.sh": "sft_config.py",
    "stage3/train_text_to_video_sft.sh": "sft_config.py",
    "stage4/train_text_to_video_scm.sh": "scm_config.py",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_explains_itself(program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    assert end.value.code == 0
    usage = capsys.readouterr().out
    assert "usage:" in usage and f"python {program}" in usage


@pytest.mark.slow
def test_program_starts_from_its_folder():
    done = subprocess.run(
        [sys.executable, "inference.py", "--help"], cwd=ROOT / "stage4", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("from_folder", [True, False])
def test_launch_script_hands_on_config_and_arguments(script, from_folder):
    """With `echo` for Python: what would be run, from the root and from the stage's folder."""
    folder, name = ROOT / Path(script).parent, Path(script).name
    config = ["--config", "training/miniworld_config.py"] if from_folder else []
    done = subprocess.run(
        ["bash", name if from_folder else script, *config, "--seed", "7", "--validation_prompts", "a b"],
        cwd=folder if from_folder else ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHON": "echo", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    expected = "training/miniworld_config.py" if from_folder else str(folder / "training" / SCRIPTS[script])
    assert done.returncode == 0, done.stderr
    assert f"-m common.tools.train --config {expected} --seed 7 --validation_prompts a b" in done.stdout


def test_launch_script_from_its_folder_for_real():
    """`cd stageN && bash train_*.sh --config training/miniworld_config.py`, as the README says."""
    command = ["bash", "train_text_to_video_scm.sh", "--config", "training/miniworld_config.py", "--dry_run"]
    done = subprocess.run([*command, "--seed", "1234"], cwd=ROOT / "stage4", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"seed": 1234' in done.stdout and "latent frames per window" in done.stdout
