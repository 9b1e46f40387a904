"""Real processes: killed at any moment, asked to stop, refused; and two processes against one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import toy_settings

from common.training.checkpoints import list_checkpoints
from common.training.trainer import Trainer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
CONFIG = Path(__file__).with_name("toy_config.py")


class Run:
    """`scripts/launch.sh` on the toy config, in its own process group."""

    def __init__(self, toy_data, output_dir, *overrides, processes=1, step_seconds=0.0, config=CONFIG, **more):
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        environment |= {
            "TOY_DATA": str(toy_data), "TOY_OUTPUT": str(output_dir), "TOY_STEP_SECONDS": str(step_seconds),
            "NUM_PROCESSES": str(processes), "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1", **more,
        }  # fmt: skip
        self.output_dir = output_dir
        self.process = subprocess.Popen(
            ["bash", str(ROOT / "scripts" / "launch.sh"), "unused.py", "--config", str(config), *overrides],
            env=environment, cwd=output_dir.parent, start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests may run where it is ignored
        )  # fmt: skip

    def wait_for_checkpoint(self, step: int) -> None:
        deadline = time.time() + 120
        while not any(found >= step for found, _ in list_checkpoints(self.output_dir)):
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.time() < deadline
            time.sleep(0.05)

    def finish(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=180)
        return self.process.returncode, output


def train_here(toy_data, output_dir, **changes):
    settings = toy_settings(toy_data, output_dir, **changes)
    Trainer(settings, settings.build_objective()).train()


def assert_same_weights(one, other, tolerance=0.0):
    a, b = load_file(one / "weights.safetensors"), load_file(other / "weights.safetensors")
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=tolerance, rtol=tolerance)


def test_killed_run_goes_on_from_its_last_checkpoint(toy_data, tmp_path, caplog):
    output_dir = tmp_path / "run"
    options = ["--max_train_steps", "12", "--checkpointing_steps", "2", "--dropout", "0.3"]
    run = Run(toy_data, output_dir, *options, "--dataloader_num_workers", "1", step_seconds=0.3)
    run.wait_for_checkpoint(4)
    time.sleep(0.4)  # into the steps after it
    os.killpg(run.process.pid, signal.SIGKILL)
    assert run.finish()[0] == -signal.SIGKILL
    reached = list_checkpoints(output_dir)[-1][0]
    assert 4 <= reached < 12

    with caplog.at_level("INFO"):
        train_here(toy_data, output_dir, max_train_steps=12, dropout=0.3, checkpointing_steps=2)
    assert f"resumed from {output_dir}/checkpoint-{reached}" in caplog.text
    train_here(toy_data, tmp_path / "whole", max_train_steps=12, dropout=0.3)
    assert_same_weights(output_dir / "checkpoint-12", tmp_path / "whole" / "checkpoint-12")
    steps = [json.loads(line)["step"] for line in (output_dir / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))  # none twice


def test_sigterm_to_the_whole_group_saves_and_exits_with_zero(toy_data, tmp_path):
    output_dir = tmp_path / "run"
    run = Run(toy_data, output_dir, "--max_train_steps", "500", "--dataloader_num_workers", "2", step_seconds=0.2)
    while not (output_dir / "logs" / "metrics.jsonl").exists():
        assert run.process.poll() is None, run.finish()[1]
        time.sleep(0.05)
    os.killpg(run.process.pid, signal.SIGTERM)  # as a batch system does: the data workers get it too
    code, output = run.finish()
    assert code == 0, output
    (step, _), *_ = list_checkpoints(output_dir)
    assert 1 <= step < 500 and f"stopped and saved at step {step}" in output


def test_two_processes_train_like_one_with_twice_the_batch_and_stop_together(toy_data, tmp_path):
    output_dir = tmp_path / "run"
    options = ["--train_batch_size", "1", "--max_train_steps", "8", "--gradient_accumulation_steps", "2"]
    options += ["--logging_steps", "8"]  # the one line is of steps in both layouts
    run = Run(toy_data, output_dir, *options, "--checkpointing_steps", "2", processes=2, step_seconds=1.5)
    run.wait_for_checkpoint(2)
    os.killpg(run.process.pid, signal.SIGINT)  # Ctrl-C: to the script, the launcher, the processes and their workers
    code, output = run.finish()
    assert code == 0, output
    reached = list_checkpoints(output_dir)[-1][0]
    assert 2 <= reached < 8 and f"stopped and saved at step {reached}" in output

    for directory in (output_dir, tmp_path / "one"):  # one process goes on from where the two were
        train_here(
            toy_data, directory, max_train_steps=8, train_batch_size=2, gradient_accumulation_steps=2, logging_steps=8
        )
    assert_same_weights(output_dir / "checkpoint-8", tmp_path / "one" / "checkpoint-8", tolerance=1e-6)
    losses = [
        {
            line["step"]: line["loss"]
            for line in map(json.loads, (d / "logs" / "metrics.jsonl").read_text().splitlines())
        }
        for d in (output_dir, tmp_path / "one")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and list(losses[0]) == [8]


def test_two_machines_train_like_one_with_twice_the_batch(toy_data, tmp_path, free_port):
    place = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    options = ["--train_batch_size", "1", "--max_train_steps", "3"]
    output_dir = tmp_path / "run"  # on storage that both machines see
    first, second = (
        Run(toy_data, output_dir, *options, processes=2, NODE_RANK=rank, **place) for rank in ("0", "1")
    )  # fmt: skip
    for run in (second, first):
        code, output = run.finish()
        assert code == 0, output
    train_here(toy_data, tmp_path / "one", max_train_steps=3, train_batch_size=2)
    assert_same_weights(output_dir / "checkpoint-3", tmp_path / "one" / "checkpoint-3", tolerance=1e-6)
    steps = [json.loads(line)["step"] for line in (output_dir / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]  # written by the first machine alone


def test_machines_that_do_not_share_a_disk_are_refused(toy_data, tmp_path, free_port):
    train_here(toy_data, tmp_path / "first", max_train_steps=2, train_batch_size=2)
    place = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    options = ["--train_batch_size", "1", "--max_train_steps", "3"]
    runs = [
        Run(toy_data, tmp_path / name, *options, processes=2, NODE_RANK=rank, **place)
        for rank, name in (("0", "first"), ("1", "second"))
    ]
    for run in runs:
        code, output = run.finish()
        seen = "some processes see checkpoint-2 and a result of 2 steps there, others no checkpoint; it"
        assert code == 2 and seen in output, output
    assert not (tmp_path / "second" / "checkpoint-3").exists()


def test_wrong_setting_is_one_line_and_exit_code_two(toy_data, tmp_path):
    code, output = Run(toy_data, tmp_path / "run", "--learning_rat", "1", processes=2).finish()
    assert code == 2 and output.startswith("error: ") and "learning_rate" in output
    assert len(output.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_what_two_processes_meet_is_said_once(toy_data, tmp_path):
    """Neither by both nor by their launcher, which would add a traceback of its own."""
    data = tmp_path / "data"
    shutil.copytree(toy_data, data)
    for video in data.glob("*.mp4"):
        video.write_bytes(b"")
    code, output = Run(data, tmp_path / "run", processes=2).finish()
    assert code == 2 and output.startswith("error: ") and "cannot be read" in output and "the file is empty" in output
    assert len(output.splitlines()) == 1 and not (tmp_path / "run").exists()
