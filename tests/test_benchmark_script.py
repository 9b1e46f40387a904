"""scripts/benchmark_training.sh: the lines that it would start, and a row for real."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from common.tools.benchmark_training import parse_arguments, training_settings
from tests.conftest import ROOT

MODULE = "common.tools.benchmark_training"
TINY = (
    "--height_buckets 32 --width_buckets 48 --frames 17 --max_sequence_length 64 --compile False --steps 2 --warmup 1"
)


@pytest.fixture
def run_script(tmp_path):
    def run(*rows: str, **environment: str) -> tuple[int, str, str]:
        ours = ("CUDA_VISIBLE_DEVICES", "GPU_IDS", "SIZE", "OPTIONS")
        inherited = {name: value for name, value in os.environ.items() if name not in ours}
        places = {"OUTPUT": str(tmp_path / "rows"), "MODELS": str(tmp_path / "models"), "PYTHON": sys.executable}
        done = subprocess.run(
            ["bash", str(ROOT / "scripts" / "benchmark_training.sh"), *rows],
            env=inherited | places | environment, capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def started(run_script, noting_python):
    """What the script would start: (GPUs, words of the program) for each row."""
    python, starts = noting_python

    def run(*rows: str, **environment: str) -> list[tuple[str, list[str]]]:
        code, _, err = run_script(*rows, PYTHON=str(python), **environment)
        assert code == 0, err
        return [(gpus, words) for gpus, words in starts() if MODULE in words]

    return run


def settings_of(words: list[str]):
    return training_settings(*parse_arguments(words[words.index(MODULE) + 1 :]), "scratch")


def test_every_row_is_a_run_that_its_stage_accepts(started):
    rows = {Path(words[-1]).stem: (gpus, words) for gpus, words in started(GPU_IDS="4,5,6")}
    settings = {name: settings_of(words) for name, (_, words) in rows.items()}
    assert len(rows) == 20
    for name, (gpus, words) in rows.items():
        stage, form = int(name[1]), name[3:]
        assert words[words.index("--config") + 1].split("/")[-3] == f"stage{stage}"
        assert words[words.index("--model_path") + 1].endswith(f"models/random-2b-stage{max(stage - 1, 1)}")
        assert settings[name].train_batch_size == 1 and settings[name].compile == (form != "eager")
        assert settings[name].frame_buckets == [49 if stage == 1 else 33]
        assert getattr(settings[name], "rank", 0) == (128 if stage == 1 or form == "lora" else 0)
        if form in ("ddp", "fsdp2"):
            assert gpus == "4,5" and words[words.index("--num_processes") + 1] == "2"
            assert words[words.index("--config_file") + 1].endswith(f"{form}.yaml")
        else:
            assert gpus == "4" and words[:2] == ["-m", MODULE]
    assert [settings[name].gradient_checkpointing for name in ("s3", "s3-all", "s3-none")] == [3, True, False]
    assert settings["s3-memory"].step_in_backward and settings["s3-memory"].trained_weights == "bfloat16"
    assert settings["s2"].control_text_encoder == ""
    guided = {name: found.teacher_control_guidance_scale for name, found in settings.items() if name.startswith("s4")}
    assert guided.pop("s4-both") == 3 and set(guided.values()) == {1}


def test_a_row_can_have_65_frames_and_more_options(started):
    ((gpus, words),) = started("s4-lora-65", GPU_IDS="2", OPTIONS="--rank 8 --steps 20", SIZE="5b")
    settings = settings_of(words)
    assert (gpus, settings.frame_buckets, settings.rank, settings.compile) == ("2", [65], 8, True)
    assert shlex.join(words).endswith("rows/s4-lora-65.json") and "random-5b-stage3" in shlex.join(words)


def test_one_gpu_leaves_out_the_rows_of_two(run_script):
    code, out, err = run_script("s3-ddp", "s4-fsdp2", CUDA_VISIBLE_DEVICES="3")
    assert (code, out) == (0, "") and err.count('it takes two GPUs; GPU_IDS is "3"') == 2


@pytest.mark.parametrize("wrong", ["s3-fast", "s.", "s3-65-65"])
def test_an_unknown_row_is_refused_before_anything_starts(run_script, tmp_path, wrong):
    code, out, err = run_script("s3", wrong, SIZE="mini")
    assert code == 2 and not out and f"no row is called {wrong}; there are s1 s1-memory" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_rows_are_measured_once_and_shown_together_and_one_that_fails_is_left_out(run_script, tmp_path):
    (tmp_path / "models" / "random-mini-stage1").mkdir(parents=True)
    (tmp_path / "models" / "random-mini-stage1" / "model_index.json").write_text("{}")  # no model: stage 1 fails
    code, out, err = run_script("s1", "s3", "s3-memory", SIZE="mini", OPTIONS=TINY)
    assert code == 1 and err.count("error:") == 1 and "random-mini-stage1" in err
    names = [line.split()[0] for line in out[out.rindex("s/step") :].splitlines()[1:3]]
    assert names == ["s3", "s3-memory"]
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()}
    assert files.keys() == {"s3.json", "s3-memory.json"}
    code, again, err = run_script("s3", "s3-memory", SIZE="mini", OPTIONS=TINY)
    assert code == 0 and out.endswith(again) and err.count("is there already") == 2  # nothing is measured anew
    assert files == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()}
