"""Two real processes fill one cache, are killed, and start again."""

import os
import re
import sqlite3
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from cached_run import settings

from common.data.loader import build_train_loader, build_validation_batch

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("slow_precompute.py")
ROOT = Path(__file__).parents[3]


def start(args, config: Path, *launcher: str, **environment: str) -> subprocess.Popen:
    config.write_text("from common.config.settings import TrainingSettings\nargs = TrainingSettings()\n")
    words = [sys.executable, *launcher, str(PROGRAM), "--config", str(config)]
    for name, value in args.to_dict().items():
        words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    inherited |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, env=inherited | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def num_windows(cache: Path) -> int:
    try:
        with sqlite3.connect(f"{(cache / 'index.sqlite').as_uri()}?mode=ro", uri=True) as index:
            return index.execute("SELECT count(*) FROM windows WHERE refusal IS NULL").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def read(args) -> list[dict]:
    return [*islice(build_train_loader(args, True), 8), build_validation_batch(args, True)]


def test_two_processes_share_the_work_are_killed_and_go_on(cache, data, tiny_base, tmp_path):
    args = settings(data, tiny_base, tmp_path / "cache")
    first = [start(args, tmp_path / "config.py", PAUSE="0.5", RANK=str(n), WORLD_SIZE="2") for n in range(2)]
    deadline = time.time() + 120
    while num_windows(tmp_path / "cache") < 3:
        assert all(process.poll() is None for process in first) and time.time() < deadline
        time.sleep(0.02)
    for process in first:
        process.kill()
        process.communicate()
    kept = num_windows(tmp_path / "cache")
    assert 3 <= kept < 13  # 3 clips × 2 buckets × 2 windows, and one of a held-out clip

    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]  # torchrun
    second = start(args, tmp_path / "config.py", *launcher, PAUSE="0")
    output, _ = second.communicate(timeout=180)
    assert second.returncode == 0, output
    told = re.findall(r"(\d+) windows? and \d+ captions? added(.*); .* \(share (\d) of 2\)", output)
    assert sorted((share, refused) for _, refused, share in told) == [("1", ""), ("2", ", 1 clip refused")]
    assert sum(int(count) for count, _, _ in told) == 13 - kept  # none was made by both
    assert "windows (share 1 of 2): 100%" in output and "windows (share 2 of 2):" not in output
    for ours, theirs in zip(read(args), read(settings(data, tiny_base, cache)), strict=True):
        assert torch.equal(ours["latent_moments"], theirs["latent_moments"])
        assert torch.equal(ours["prompt_embeds"], theirs["prompt_embeds"])
