"""scripts/benchmark_training.sh: the lines that it would start, and a row for real."""

import json
import os
import shlex
import subprocess
import sys

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
        environment = {"OUTPUT": str(tmp_path / "rows"), "MODELS": str(tmp_path / "models"), **environment}
        done = subprocess.run(
            ["bash", str(ROOT / "scripts" / "benchmark_training.sh"), *rows],
            env=os.environ | {"PYTHON": sys.executable} | environment, capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def started(run_script, tmp_path):
    """What the script would start: (GPUs, words of the program) for each row."""
    noted, python = tmp_path / "noted.jsonl", tmp_path / "python"
    note = "import json, os, sys; line = json.dumps([os.environ.get('CUDA_VISIBLE_DEVICES'), sys.argv[1:]]); "
    note += f"print(line, file=open({str(noted)!r}, 'a'))"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -c "{note}" "$@"\n')
    python.chmod(0o755)

    def run(*rows: str, **environment: str) -> list[tuple[str, list[str]]]:
        code, _, err = run_script(*rows, PYTHON=str(python), **environment)
        assert code == 0, err
        lines = [json.loads(line) for line in noted.read_text().splitlines()]
        noted.unlink()
        return [(gpus, words) for gpus, words in lines if MODULE in words]

    return run


def settings_of(words: list[str]):
    return training_settings(*parse_arguments(words[words.index(MODULE) + 1 :]), "scratch")


def test_every_row_is_a_run_that_its_stage_accepts(started):
    rows = started(GPU_IDS="4,5")
    names = [settings_of(words) and words[-1] for _, words in rows]
    assert len(set(names)) == len(names) == 20
    stages = [words[words.index("--config") + 1].split("/")[-3] for _, words in rows]
    assert set(stages) == {"stage1", "stage2", "stage3", "stage4"}
    for (gpus, words), stage in zip(rows, stages, strict=True):
        base = {"stage1": 1, "stage2": 1, "stage3": 2, "stage4": 3}[stage]
        assert words[words.index("--model_path") + 1].endswith(f"models/random-2b-stage{base}")
        layout = [word for word in words if word.endswith(".yaml")]
        assert gpus == ("4,5" if layout else "4") and len(layout) == ("--num_processes" in words)
        assert settings_of(words).frame_buckets == [49 if stage == "stage1" else 33]


def test_a_row_can_have_65_frames_and_more_options(started):
    ((gpus, words),) = started("s4-lora-65", OPTIONS="--rank 8 --steps 20", SIZE="5b")
    settings = settings_of(words)
    assert (gpus, settings.frame_buckets, settings.rank, settings.compile) == ("0", [65], 8, True)
    assert shlex.join(words).endswith("rows/s4-lora-65.json") and "random-5b-stage3" in shlex.join(words)


def test_an_unknown_row_is_refused_before_anything_starts(run_script, tmp_path):
    code, out, err = run_script("s3", "s3-fast", SIZE="mini")
    assert code == 2 and not out and "no row is called s3-fast; there are s1 s1-memory" in err
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
    assert code == 0 and again == out[out.rindex(again) :]  # the table alone: nothing is measured anew
    assert files == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()}
