"""One transformer over several processes against one process; real processes."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from decord import VideoReader

from common.cogvideox.context_parallel import refuse_degree
from common.config.errors import UserError
from tests.common.cogvideox import sharded_transformer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
SIZE = ["--height", "32", "--width", "64", "--num_inference_steps", "4"]


def torchrun(processes: int, program: str, *words: object, gpus: str = "") -> str:
    """What the processes said, on stdout or on stderr. They have to succeed."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": gpus, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*launch, program, *map(str, words)],
        env=environment, cwd=ROOT, timeout=180, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def as_by_torchrun(rank: int, environment: dict[str, str], *words: str) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    sharded_transformer.main(*words)


def start(processes: int, port: int, *words: object) -> None:
    """The worker in processes that are split off one which has imported everything: that takes longest."""
    count = str(processes)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    place |= {"TORCHELASTIC_RUN_ID": "none", "CUDA_VISIBLE_DEVICES": ""}
    multiprocessing.get_context("forkserver").set_forkserver_preload([sharded_transformer.__name__])
    arguments = (place, *map(str, words))
    torch.multiprocessing.start_processes(as_by_torchrun, arguments, processes, start_method="forkserver")


def frames(path: Path) -> np.ndarray:
    """[N,h,w,3]"""
    reader = VideoReader(str(path))
    return reader.get_batch(range(len(reader))).asnumpy().astype(int)


def test_two_processes_equal_one_also_compiled_and_are_measured_as_one(tiny_models, free_port):
    start(2, free_port, "cpu", tiny_models / "stage3")


def test_three_processes_equal_one(free_port):
    start(3, free_port, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_equal_one(tiny_models):
    torchrun(2, "tests/common/cogvideox/sharded_transformer.py", "cuda", tiny_models / "stage3", gpus="0,1")


def test_two_processes_stream_what_one_streams_and_say_it_once(run_program, tiny_models, tmp_path):
    call = ["--model_path", tiny_models / "stage3", "--prompt", "x", *SIZE, "--control", "D*20"]
    alone, together = tmp_path / "alone.mp4", tmp_path / "together.mp4"
    run_program("stage3/inference.py", *call, "--output", alone)
    said = torchrun(2, "stage3/inference.py", *call, "--output", together)
    told = [line for line in said.splitlines() if str(together) in line]
    assert len(told) == 1 and told[0].startswith(f"{together}: 20 frames")
    assert said.count("100%") == 1  # one process shows what it loads
    assert frames(together).shape == (20, 32, 64, 3)
    assert np.abs(frames(together) - frames(alone)).mean() < 0.3  # a rounding apart, of which H.264 makes more


def test_heads_that_cannot_be_shared_are_refused():
    for degree in (2, 3, 4, 5, 6, 8, 10, 15, 30):
        refuse_degree(30, degree)
    with pytest.raises(UserError, match="30 attention heads cannot be shared by 7 processes; start 6 or 8"):
        refuse_degree(30, 7)
    with pytest.raises(UserError, match="start 30$"):
        refuse_degree(30, 32)
