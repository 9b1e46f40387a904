"""Fused equals unfused, at the strength that was trained, and LoRAs of other models are refused."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline

from common.cogvideox.pipeline_io import load_component, write_pipeline
from common.config.errors import UserError
from common.tools.fuse_lora_weights import fuse_lora_weights, stored_dtype

CALL = {
    "prompt": "a red car in the snow", "num_frames": 9, "height": 32, "width": 48, "num_inference_steps": 2,
    "max_sequence_length": 16, "output_type": "np",
}  # fmt: skip


def run(pipeline: CogVideoXPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(generator=torch.Generator().manual_seed(1), **CALL).frames[0]


def test_fused_equals_unfused_with_alpha_other_than_rank(tiny_base, tiny_lora, tmp_path):
    fuse_lora_weights(tiny_base, tiny_lora, tmp_path / "fused")
    fused = CogVideoXPipeline.from_pretrained(tmp_path / "fused")
    unfused = CogVideoXPipeline.from_pretrained(tiny_base)
    unfused.load_lora_weights(tiny_lora)
    expected = run(unfused)
    np.testing.assert_allclose(run(fused), expected, atol=2e-5)
    assert np.abs(expected - run(CogVideoXPipeline.from_pretrained(tiny_base))).max() > 1e-3

    weight = "transformer_blocks.0.attn1.to_q"
    base = CogVideoXPipeline.from_pretrained(tiny_base).transformer.get_submodule(weight).weight.double()
    lora = unfused.transformer.get_submodule(weight)
    delta = (lora.lora_B["default_0"].weight.double() @ lora.lora_A["default_0"].weight.double()) * (2.0 / 4)
    torch.testing.assert_close(fused.transformer.get_submodule(weight).weight.double(), base + delta, rtol=0, atol=1e-6)


def test_scale_and_dtype(tiny_base, tiny_lora, tmp_path):
    fuse_lora_weights(tiny_base, tiny_lora, tmp_path / "none", lora_scale=0.0, dtype=torch.bfloat16)
    fused = CogVideoXPipeline.from_pretrained(tmp_path / "none", torch_dtype=torch.bfloat16).transformer.state_dict()
    base = CogVideoXPipeline.from_pretrained(tiny_base).transformer.state_dict()
    assert all(torch.equal(fused[key], value.bfloat16()) for key, value in base.items())
    assert stored_dtype(tmp_path / "none" / "transformer") == torch.bfloat16


def test_a_base_from_the_hub_keeps_its_type(tiny_base, tiny_lora, tmp_path, monkeypatch):
    """The hub id is no folder here: what lies in its snapshot says which type the weights have."""
    base = tmp_path / "snapshot"
    transformer = load_component(tiny_base, "transformer", torch.bfloat16)
    write_pipeline(base, tiny_base, "CogVideoXPipeline", {"transformer": transformer})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", {"someone/model": str(base)}.__getitem__)
    fuse_lora_weights("someone/model", tiny_lora, tmp_path / "fused")
    assert stored_dtype(tmp_path / "fused" / "transformer") == torch.bfloat16


def test_a_model_of_a_later_stage_is_not_replaced(tiny_base, tiny_lora, tiny_models, tmp_path):
    shutil.copytree(tiny_models / "stage2", tmp_path / "stage2")
    before = {path: path.read_bytes() for path in (tmp_path / "stage2").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="stage2 holds a CogVideoXControlPipeline; give another directory"):
        fuse_lora_weights(tiny_base, tiny_lora, tmp_path / "stage2")
    assert {path: path.read_bytes() for path in (tmp_path / "stage2").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: {k.replace("blocks.0", "blocks.9"): v for k, v in s.items()}, r"no layer transformer_blocks.9"),
        (lambda s: {k: v.repeat(1, 2) if "lora_A" in k else v for k, v in s.items()}, r"is 32 wide there, 64"),
        (lambda s: {"something.weight": torch.zeros(1)}, r"no LoRA weights"),
    ],
    ids=["other-depth", "other-width", "no-lora"],
)
def test_lora_of_another_model_is_refused(tiny_base, tiny_lora, tmp_path, damage, message):
    from safetensors.torch import load_file, save_file

    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    file.parent.mkdir()
    state = load_file(tiny_lora / file.name)
    save_file({k: v.contiguous() for k, v in damage(state).items()}, file)
    with pytest.raises(UserError, match=message):
        fuse_lora_weights(tiny_base, tmp_path / "lora", tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def test_missing_lora_and_output_onto_the_base_are_refused(tiny_base, tmp_path):
    with pytest.raises(UserError, match="no LoRA at"):
        fuse_lora_weights(tiny_base, tmp_path, tmp_path / "fused")
    with pytest.raises(UserError, match="is the base itself"):
        fuse_lora_weights(tiny_base, tmp_path, tiny_base)
