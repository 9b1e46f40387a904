"""The four stages on a GPU: bf16 over float32 masters, gradient checkpointing, sample videos, compiled streams."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.cogvideox.pipeline_cogvideox import CogVideoXStreamingPipeline
from common.cogvideox.speed import SpeedOptions, speed_up
from tests.stages.conftest import TinyStages, read_metrics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PROMPT = "A red car drives along a sandy desert road."
BF16 = ["--mixed_precision", "bf16", "--gradient_checkpointing", "--compile", "--validation_num_inference_steps", "4"]


@pytest.fixture(scope="module")
def bf16_stages(tmp_path_factory, tiny_stages):
    """All four stages in bf16 with a sample video each, trained in a row."""
    stages = TinyStages(tmp_path_factory.mktemp("bf16"), tiny_stages.world, tiny_stages.base)
    train = stages.train
    stages.train = lambda stage, out: train(
        stage, out, *BF16, "--validation_prompts", PROMPT, *(["--validation_control", "D*33"] if stage > 1 else [])
    )
    stages.run(4)
    return stages


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_bf16_learns_in_float32_and_shows_a_video(bf16_stages, stage):
    output = bf16_stages.run(stage)
    held_out = {m["step"]: m["validation/loss"] for m in read_metrics(output) if "validation/loss" in m}
    assert held_out[6] < held_out[0]
    weights = load_file(next((output / "checkpoint-6").glob("weights*.safetensors")))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert (output / "validation" / "step-6-0.mp4").stat().st_size > 0


def frames_of(pipeline, chunks: int = 3, **options) -> np.ndarray:
    stream = pipeline.stream(PROMPT, control=["D"] * 60, seed=0, height=32, width=64, **options)
    return np.concatenate([next(stream) for _ in range(chunks)]).astype(np.float32)


@pytest.mark.parametrize("stage", [3, 4])
def test_bf16_stream_is_close_to_float32(bf16_stages, stage):
    path = bf16_stages.run(stage)
    exact = frames_of(CogVideoXStreamingPipeline.from_pretrained(path).to("cuda"))
    rounded = frames_of(CogVideoXStreamingPipeline.from_pretrained(path, torch_dtype=torch.bfloat16).to("cuda"))
    assert exact.std() > 1
    assert np.abs(exact - rounded).mean() < 0.1 * exact.std()


def test_a_compiled_pipeline_streams_what_an_eager_one_does(bf16_stages):
    pipeline = CogVideoXStreamingPipeline.from_pretrained(bf16_stages.run(4)).to("cuda")
    eager = frames_of(pipeline)
    speed_up(pipeline, SpeedOptions(compile=True))
    assert np.abs(frames_of(pipeline) - eager).max() <= 2  # of 255


@pytest.mark.parametrize("stage", [3, 4])
def test_a_running_stream_does_not_wait_for_the_device(bf16_stages, stage):
    pipeline = CogVideoXStreamingPipeline.from_pretrained(bf16_stages.run(stage), torch_dtype=torch.bfloat16)
    stream = pipeline.to("cuda").stream(PROMPT, control=["D"] * 600, seed=0, height=32, width=64)
    for _ in range(3):
        stream.advance()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        latents = [stream.advance() for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(x).all() for x in latents)
