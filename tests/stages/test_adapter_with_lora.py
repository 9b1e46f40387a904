"""Stage 2 with a LoRA beside the control adapter: what is trained, and that what is exported computes the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.cogvideox.pipeline_io import load_component
from common.cogvideox.transformer import CONTROL_PREFIXES
from common.config.errors import UserError
from common.training.checkpoints import base_digest
from common.training.encoding import EncodedBatch
from common.training.export import export_pipeline
from common.training.random import SampleRandom
from tests.stages.conftest import load_objective, random_batch, read_metrics

B = 2
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
RANK, ALPHA = 4, 2
LORA = ["--rank", str(RANK), "--lora_alpha", str(ALPHA), "--lora_target_modules", "to_q", "ff.net.2", "norm1.linear"]


@pytest.fixture
def batch() -> EncodedBatch:
    return random_batch(B, 9, 16, 4, 8)


def load(base, *overrides: str, dtype: torch.dtype = torch.float32):
    """Stage 2's objective, its trained parameters drawn at random so that all of them matter."""
    objective = load_objective(2, base, *overrides, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in objective.module.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return objective


@torch.no_grad()
def output_of(objective, transformer, batch: EncodedBatch) -> torch.Tensor:
    rows = objective.vocabulary.frame_rows(batch.control_indices)
    return objective.predict(transformer, batch.latents, torch.tensor([900, 100]), batch.prompt_embeds, rows)


def test_the_factors_are_the_bases_and_the_adapter_is_trained_whole(tiny_base):
    objective = load(tiny_base, *LORA)
    trained = {name for name, p in objective.module.named_parameters() if p.requires_grad}
    adapter = {name for name in trained if name.startswith(CONTROL_PREFIXES)}
    assert len(adapter) == len(objective.module.control_parameters())
    assert trained - adapter and all(n.startswith("transformer_blocks.") and ".lora_" in n for n in trained - adapter)
    assert not any("lora_" in name for name in adapter)


def test_what_is_exported_computes_what_was_trained(tiny_base, batch, tmp_path):
    objective = load(tiny_base, *LORA)
    expected = output_of(objective, objective.module, batch)
    objective.export(tmp_path)
    exported = load_component(tmp_path, "transformer")
    torch.testing.assert_close(output_of(objective, exported, batch), expected)
    without = load_component(tiny_base, "transformer").state_dict()
    changed = {name for name, value in without.items() if not torch.equal(value, exported.state_dict()[name])}
    assert {name.split(".", 2)[2] for name in changed} == {
        "attn1.to_q.weight",
        "ff.net.2.weight",
        "norm1.linear.weight",
    }


@pytest.mark.parametrize("lora", [[], LORA], ids=["adapter alone", "with a LoRA"])
def test_a_base_in_use_as_bf16_is_exported_as_it_was(tiny_base, batch, tmp_path, lora):
    objective = load(tiny_base, *lora, dtype=torch.bfloat16)
    frozen = {p.dtype for p in objective.module.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    batch.prompt_embeds = batch.prompt_embeds.bfloat16()
    with objective.autocast():
        objective.loss(batch, SampleRandom(0, 0, range(B)))[0].backward()
    gradients = [p.grad for p in objective.module.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    objective.export(tmp_path)
    before, after = (load_file(Path(directory) / WEIGHTS) for directory in (tiny_base, tmp_path))
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    learnt = dict(objective.module.named_parameters())
    for name, value in after.items():
        layer = name.removesuffix(".weight")
        if name.startswith(CONTROL_PREFIXES):
            assert torch.equal(value, learnt[name]), name
        elif f"{layer}.lora_A.default.weight" in learnt:
            first, second = (learnt[f"{layer}.lora_{factor}.default.weight"] for factor in "AB")
            torch.testing.assert_close(value, before[name].float() + ALPHA / RANK * second @ first)
        else:
            assert torch.equal(value, before[name].float()), name


def test_nothing_is_added_to_a_base_that_was_trained_anew_meanwhile(tiny_base, tmp_path):
    replaced = tmp_path / "stage1_fused"
    shutil.copytree(tiny_base, replaced)
    objective = load(replaced, *LORA)
    digest = base_digest(objective.settings)
    weights = {name: tensor + 1 for name, tensor in load_file(replaced / WEIGHTS).items()}
    save_file(weights, replaced / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match="stage1_fused, whose transformer has changed since"):
        export_pipeline(objective, tmp_path / "stage2", 1, objective.settings, digest)
    assert not (tmp_path / "stage2").exists()


def test_resumed_run_equals_an_unbroken_one_bit_for_bit(tiny_stages, tmp_path):
    tiny_stages.run(1)
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    tiny_stages.train(2, unbroken, *LORA)
    tiny_stages.train(2, resumed, *LORA, "--max_train_steps", "3", "--validation_steps", "0")
    tiny_stages.train(2, resumed, *LORA)
    for name in ("weights", "optimizer"):
        expected, got = (load_file(d / "checkpoint-6" / f"{name}.safetensors") for d in (unbroken, resumed))
        assert expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected)
        assert any("lora_B" in key for key in got) and not any("base_layer" in key for key in got)
    exported, again, base = (load_file(d / WEIGHTS) for d in (unbroken, resumed, tiny_stages.root / "stage1_fused"))
    assert all(torch.equal(exported[name], again[name]) for name in exported)
    changed = "transformer_blocks.0.attn1.to_q.weight"
    assert not torch.equal(exported[changed], base[changed].float())
    held_out = {m["step"]: m["validation/loss"] for m in read_metrics(unbroken) if "validation/loss" in m}
    assert held_out[6] < held_out[0]


def test_a_run_that_says_nothing_of_a_lora_had_none(tiny_stages, tmp_path):
    """Runs made before stage 2 knew of LoRAs: finished or not, one with a LoRA is another run."""
    tiny_stages.run(1)
    output = tiny_stages.train(2, tmp_path / "old", "--max_train_steps", "1", "--validation_steps", "0")
    mark = output / "training_finished.json"
    old = json.loads(mark.read_text())
    for name in ("rank", "lora_alpha", "lora_target_modules"):
        del old["settings"][name]
    mark.write_text(json.dumps(old))
    again = [2, output, "--max_train_steps", "1", "--validation_steps", "0"]
    tiny_stages.train(*again)  # nothing to do
    with pytest.raises(UserError, match="rank was 0, is 4"):
        tiny_stages.train(*again, *LORA)
