"""The 5B's kind of base, with rotary positions, sharded and in bfloat16, through all four stages and their programs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import CogVideoXPipeline

from common.cogvideox.model_sizes import SIZES
from common.cogvideox.pipeline_io import load_component
from common.tools.make_model import make_model
from tests.stages.conftest import TinyStages

TRANSFORMER = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 4, "time_embed_dim": 16, "text_embed_dim": 24,
    "max_text_seq_length": 16, "sample_height": 4, "sample_width": 8, "sample_frames": 33,
}  # fmt: skip
VAE = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
TINY = replace(
    SIZES["5b"], transformer=SIZES["5b"].transformer | TRANSFORMER, vae=SIZES["5b"].vae | VAE
).with_small_text_encoder()


@pytest.fixture(scope="module")
def rotary_stages(tmp_path_factory, tiny_stages) -> TinyStages:
    root = tmp_path_factory.mktemp("rotary")
    make_model(root / "base", TINY, max_shard_size="20KB")
    return TinyStages(root, tiny_stages.world, str(root / "base"))


@pytest.mark.slow
def test_a_rotary_base_goes_through_all_stages(rotary_stages, run_program, tmp_path):
    base = Path(rotary_stages.base)
    assert (base / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    rotary_stages.run(4)
    fused = rotary_stages.root / "stage1_fused"
    assert CogVideoXPipeline.from_pretrained(fused).transformer.config.use_rotary_positional_embeddings
    for stage, words in (
        (1, ["--num_frames", 9]),
        (2, ["--control", "D*9"]),
        (3, ["--control", "D*9", "--num_inference_steps", 4]),
        (4, ["--control", "D*9"]),
    ):
        model = fused if stage == 1 else rotary_stages.root / f"stage{stage}"
        assert load_component(model, "transformer").config.use_rotary_positional_embeddings
        assert json.loads((model / "scheduler" / "scheduler_config.json").read_text())["snr_shift_scale"] == 1.0
        steps = [] if stage > 2 else ["--num_inference_steps", 2]
        video = tmp_path / f"{stage}.mp4"
        command = ["--model_path", model, "--prompt", "x", "--height", 32, "--width", 64, "--output", video]
        assert "9 frames" in run_program(f"stage{stage}/inference.py", *command, *words, *steps)
