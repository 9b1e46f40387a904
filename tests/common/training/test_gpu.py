"""On GPUs: bf16, DDP and FSDP2 against one process, resuming under FSDP2 (all through scripts/launch.sh), a kernel."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

ROOT, CONFIG = Path(__file__).parents[3], Path(__file__).with_name("toy_video_config.py")
FSDP2 = str(ROOT / "scripts" / "accelerate" / "fsdp2.yaml")


def launch(toy_data, output_dir, gpus: str, *overrides, accelerate_config="") -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"TOY_DATA": str(toy_data), "TOY_OUTPUT": str(output_dir), "GPU_IDS": gpus, "PYTHON": sys.executable}
    environment["ACCELERATE_CONFIG_FILE"] = accelerate_config
    command = ["bash", str(ROOT / "scripts" / "launch.sh"), "unused.py", "--config", str(CONFIG), *overrides]
    run = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return [json.loads(line) for line in (output_dir / "logs" / "metrics.jsonl").read_text().splitlines()]


def losses(lines):
    return [line["loss"] for line in lines if "lr" in line]


@pytest.fixture(scope="module")
def one_gpu(toy_data, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("gpu") / "one"
    return output_dir, launch(toy_data, output_dir, "0", "--train_batch_size", "4", "--max_train_steps", "10")


def test_bf16_run_learns_in_float32_weights_and_logs_mfu(one_gpu):
    output_dir, lines = one_gpu
    weights = load_file(output_dir / "checkpoint-10" / "weights.safetensors")
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert losses(lines)[-1] < 0.9 * losses(lines)[0] and all(map(math.isfinite, losses(lines)))
    if "H200" in torch.cuda.get_device_name():
        assert 0 < [line for line in lines if "lr" in line][-1]["mfu"] < 1


@two_gpus
@pytest.mark.parametrize("accelerate_config", ["", FSDP2], ids=["ddp", "fsdp2"])
def test_two_gpus_interrupted_train_like_one_with_twice_the_batch(toy_data, tmp_path, one_gpu, accelerate_config):
    for last in ("5", "10"):  # the second run resumes
        options = ["--train_batch_size", "2", "--max_train_steps", last]
        lines = launch(toy_data, tmp_path, "0,1", *options, accelerate_config=accelerate_config)
    # bf16 sums in another order; without AdamW's moments the resumed losses are off by more.
    assert losses(lines) == pytest.approx(losses(one_gpu[1]), rel=2e-2)
    validation = [
        {line["step"]: line["validation/loss"] for line in run if "lr" not in line} for run in (lines, one_gpu[1])
    ]
    assert list(validation[0]) == [0, 5, 10] and validation[0] == pytest.approx(validation[1], rel=2e-2)

    moments = load_file(tmp_path / "checkpoint-10" / "optimizer.safetensors")
    assert all(value.item() == 10 for key, value in moments.items() if key.startswith("step:"))
    weights = load_file(tmp_path / "checkpoint-10" / "weights.safetensors")
    exported = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(exported[key], value) for key, value in weights.items())


def test_the_optimizers_kernel_takes_the_steps_that_pytorch_takes():
    program = [sys.executable, str(Path(__file__).with_name("triton_kernel.py"))]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(program, env=os.environ | {"PYTHONPATH": paths}, text=True, capture_output=True, timeout=300)
    assert run.returncode == 0, run.stderr
