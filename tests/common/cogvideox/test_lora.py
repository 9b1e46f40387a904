"""LoRA files in diffusers' and ComfyUI's forms, against diffusers, PEFT and the sum W + alpha/r·BA written out."""

import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.cogvideox.lora import add_lora, cut_lora, read_lora, write_lora
from common.cogvideox.lora_names import FORMS, read_key, write_key
from common.cogvideox.pipeline_io import load_component
from common.config.errors import UserError

NAME = "pytorch_lora_weights.safetensors"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def trained(base: str, config: LoraConfig) -> CogVideoXTransformer3DModel:
    """The base with an adapter whose factors are all drawn."""
    transformer = load_component(base, "transformer")
    transformer.add_adapter(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return transformer


def saved(path: Path, transformer: CogVideoXTransformer3DModel, metadata: bool) -> Path:
    """As `CogVideoXPipeline.save_lora_weights` writes it, with metadata (since diffusers 0.34) or without."""
    more = _collate_lora_metadata({"transformer": transformer}) if metadata else {}
    layers = get_peft_model_state_dict(transformer)
    CogVideoXPipeline.save_lora_weights(path, transformer_lora_layers=layers, **more)
    return path / NAME


def fused_weights(transformer: CogVideoXTransformer3DModel) -> dict[str, torch.Tensor]:
    transformer.fuse_lora()
    transformer.unload_lora()
    return transformer.state_dict()


def summed(base: str, factors: Path, strength: float) -> dict[str, torch.Tensor]:
    """W + strength · B·A in float64, from the file's own tensors."""
    weights, pairs = load_component(base, "transformer").state_dict(), load_file(factors)
    for key, a in pairs.items():
        if key.endswith("lora_A.weight"):
            name = key.removeprefix("transformer.").replace("lora_A.weight", "weight")
            b = pairs[key.replace("lora_A", "lora_B")]
            weights[name] = (weights[name].double() + strength * (b.double() @ a.double())).float()
    return weights


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)


def content(file: Path) -> tuple[dict, dict]:
    with safe_open(file, "pt") as opened:
        return {k: opened.get_tensor(k) for k in opened.keys()}, opened.metadata()  # noqa: SIM118


@pytest.mark.parametrize(
    ("metadata", "stated", "strength"),
    [(True, None, 2 / 4), (False, None, 1.0), (False, 2.0, 2 / 4), (False, 12.0, 3.0)],
    ids=["metadata", "no-metadata", "alpha-stated", "alpha-above-rank"],
)
def test_diffusers_files_load_at_the_strength_that_was_trained(tiny_base, tmp_path, metadata, stated, strength):
    file = saved(tmp_path, trained(tiny_base, LoraConfig(r=4, lora_alpha=2, target_modules=ATTENTION)), metadata)
    transformer = load_component(tiny_base, "transformer")
    add_lora(transformer, file, stated)
    assert_close(fused_weights(transformer), summed(tiny_base, file, strength))


@pytest.mark.parametrize("metadata", [True, False])
def test_without_a_statement_it_loads_as_in_diffusers(tiny_base, tmp_path, metadata):
    file = saved(tmp_path, trained(tiny_base, LoraConfig(r=4, lora_alpha=2, target_modules=ATTENTION)), metadata)
    theirs = CogVideoXPipeline.from_pretrained(tiny_base)
    theirs.load_lora_weights(tmp_path)
    ours = load_component(tiny_base, "transformer")
    add_lora(ours, file)
    assert_close(fused_weights(ours), fused_weights(theirs.transformer))


def test_an_unknown_alpha_is_assumed_aloud(tiny_base, tmp_path, caplog):
    model = trained(tiny_base, LoraConfig(r=4, lora_alpha=2, target_modules=ATTENTION))
    with caplog.at_level(logging.WARNING):
        read_lora(saved(tmp_path / "with", model, metadata=True))
        assert not caplog.records
        read_lora(saved(tmp_path / "without", model, metadata=False))
    assert "alpha = rank = 4 is assumed" in caplog.text and "--lora_alpha" in caplog.text


UNEVEN = {
    "r": 4, "lora_alpha": 2, "target_modules": [*ATTENTION, "ff.net.0.proj", "ff.net.2", "norm1.linear", "proj_out"],
    "rank_pattern": {"attn1.to_k": 2}, "alpha_pattern": {"to_v": 7.0, "transformer_blocks.1.attn1.to_q": 5.0},
}  # fmt: skip


@pytest.mark.parametrize("config", [UNEVEN, {**UNEVEN, "use_rslora": True}], ids=["alpha/r", "alpha/sqrt(r)"])
def test_the_scaling_is_pefts_layer_by_layer(tiny_base, tmp_path, config):
    model = trained(tiny_base, LoraConfig(**config))
    lora = read_lora(saved(tmp_path, model, metadata=True))
    assert {"transformer_blocks.3.ff.net.0.proj", "proj_out"} < set(lora.factors)
    for layer in lora.factors:
        assert lora.scaling(layer) == pytest.approx(model.get_submodule(layer).scaling["default"], rel=1e-12), layer


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", [UNEVEN, {**UNEVEN, "use_rslora": True}], ids=["alpha/r", "alpha/sqrt(r)"])
def test_export_and_import_are_bit_equal(tiny_base, tmp_path, form, config):
    file = saved(tmp_path, trained(tiny_base, LoraConfig(**config)), metadata=True)
    write_lora(tmp_path / "out.safetensors", read_lora(file), form)
    write_lora(tmp_path / "back.safetensors", read_lora(tmp_path / "out.safetensors"), "diffusers")
    (before, said), (after, says) = content(file), content(tmp_path / "back.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    unset = {k: v for k, v in json.loads(said["lora_adapter_metadata"]).items() if v is not None}
    assert unset.items() <= json.loads(says["lora_adapter_metadata"]).items()


@pytest.mark.parametrize("form", ["comfyui", "comfyui-wrapper"])
def test_comfyui_files_of_others_keep_their_strength(tiny_base, tmp_path, form):
    """Without our metadata, alpha stands beside each pair of factors, and may differ from layer to layer."""
    model = trained(tiny_base, LoraConfig(**UNEVEN))
    expected = fused_weights(load_model(tiny_base, saved(tmp_path, model, metadata=True)))
    write_lora(tmp_path / "ours.safetensors", read_lora(tmp_path / NAME), form)
    save_file(load_file(tmp_path / "ours.safetensors"), tmp_path / "theirs.safetensors")
    assert_close(fused_weights(load_model(tiny_base, tmp_path / "theirs.safetensors")), expected)


def load_model(base: str, file: Path) -> CogVideoXTransformer3DModel:
    transformer = load_component(base, "transformer")
    add_lora(transformer, file)
    return transformer


# Read off ComfyUI's comfy/ldm/cogvideo/model.py and kijai's lora_utils.py, not off our table.
COMFYUI_NAMES = {
    "transformer_blocks.7.attn1.to_q": ("blocks.7.q", "transformer_blocks_7_attn1_to_q"),
    "transformer_blocks.7.attn1.to_k": ("blocks.7.k", "transformer_blocks_7_attn1_to_k"),
    "transformer_blocks.7.attn1.to_v": ("blocks.7.v", "transformer_blocks_7_attn1_to_v"),
    "transformer_blocks.29.attn1.to_out.0": ("blocks.29.attn_out", "transformer_blocks_29_attn1_to_out_0"),
    "transformer_blocks.0.ff.net.0.proj": ("blocks.0.ff_proj", "transformer_blocks_0_ff_net_0_proj"),
    "transformer_blocks.0.ff.net.2": ("blocks.0.ff_out", "transformer_blocks_0_ff_net_2"),
    "transformer_blocks.10.norm2.linear": ("blocks.10.norm2.linear", "transformer_blocks_10_norm2_linear"),
    "time_embedding.linear_1": ("time_embedding_linear_1", "time_embedding_linear_1"),
    "norm_out.linear": ("norm_out.linear", "norm_out_linear"),
}


@pytest.mark.parametrize(("module", "names"), COMFYUI_NAMES.items(), ids=COMFYUI_NAMES)
def test_names_are_those_that_comfyui_reads(module, names):
    for form, name in zip(FORMS[1:], (f"diffusion_model.{names[0]}", f"lora_unet_{names[1]}"), strict=True):
        keys = {"A": f"{name}.lora_down.weight", "B": f"{name}.lora_up.weight", "alpha": f"{name}.alpha"}
        for part, key in keys.items():
            assert write_key(module, part, form) == key
            assert read_key(key) == (module, part)


def test_every_linear_layer_of_the_model_has_a_name_and_all_differ(tiny_base):
    transformer = load_component(tiny_base, "transformer")
    layers = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    for form in FORMS:
        keys = {write_key(layer, "A", form) for layer in layers}
        assert len(keys) == len(layers) and {read_key(key)[0] for key in keys} == set(layers)


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "transformer."])
def test_prefixes_of_trainers(prefix):
    assert read_key(f"{prefix}transformer_blocks.0.attn1.to_q.lora_B.weight") == (
        "transformer_blocks.0.attn1.to_q",
        "B",
    )


def without(state: dict, word: str) -> dict:
    return {key: value for key, value in state.items() if word not in key}


LAYER = "transformer_blocks.0.attn1.to_q"
MISTAKES = {
    "half": (lambda s: without(s, f"{LAYER}.lora_B"), f"incomplete: factor B of {LAYER} is missing"),
    "dora": (lambda s: s | {f"transformer.{LAYER}.lora_magnitude_vector": torch.ones(1)}, "lora_magnitude_vector"),
    "text": (lambda s: s | {"text_encoder.x.lora_A.weight": torch.ones(1, 1)}, "factor B of text_encoder.x is missing"),
    "comfyui-layer": (lambda s: {"lora_unet_mid_0.lora_up.weight": torch.ones(1, 1)}, "is no layer of CogVideoX"),
    "ranks": (lambda s: s | {f"transformer.{LAYER}.lora_A.weight": torch.ones(3, 32)}, r"\[3, 32\] and \[32, 4\]"),
    "nothing": (lambda s: {}, "holds no LoRA weights"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_no_lora_is_refused_with_its_key(tiny_lora, tmp_path, mistake):
    damage, message = MISTAKES[mistake]
    file = tmp_path / "lora.safetensors"
    save_file({k: v.contiguous() for k, v in damage(load_file(tiny_lora / NAME)).items()}, file)
    with pytest.raises(UserError, match=message) as error:
        read_lora(file)
    assert str(file) in str(error.value)


def test_two_statements_of_alpha_are_refused(tiny_lora):
    with pytest.raises(UserError, match=r"lora_alpha 8 was given, but .* itself says 2; leave it out"):
        read_lora(tiny_lora / NAME, lora_alpha=8.0)


def test_metadata_of_another_rank_is_refused(tiny_lora, tmp_path):
    tensors, metadata = content(tiny_lora / NAME)
    said = metadata["lora_adapter_metadata"].replace('"transformer.r": 4', '"transformer.r": 8')
    save_file(tensors, tmp_path / "lora.safetensors", {**metadata, "lora_adapter_metadata": said})
    with pytest.raises(UserError, match="metadata says rank 8, but the factors of .* have rank 4"):
        read_lora(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("config", [{"lora_alpha": 2}, {"lora_alpha": 3, "use_rslora": True}])
@pytest.mark.parametrize("share", [0.6, 0.95, 1.0])
def test_a_cut_lora_is_the_nearest_of_its_rank(tiny_base, tmp_path, config, share):
    """Against the singular values of B·A itself: what is left out has the sum of their squares, and no more than
    asked; plain diffusers loads the file and adds the same."""
    whole = trained(tiny_base, LoraConfig(r=4, target_modules=ATTENTION, **config))
    lora = read_lora(saved(tmp_path / "whole", whole, metadata=True))
    cut = cut_lora(lora, share)
    for layer, (a, b) in lora.factors.items():
        small_a, small_b = cut.factors[layer]
        values = torch.linalg.svdvals(b.double() @ a.double()).square()
        rank, lost = len(small_a), (b.double() @ a.double() - small_b.double() @ small_a.double()).square().sum()
        torch.testing.assert_close(lost, values[rank:].sum(), rtol=1e-4, atol=1e-8)
        assert lost <= (1 - share) * values.sum() + 1e-8
        assert rank == 1 or values[: rank - 1].sum() < share * values.sum()
        assert cut.scaling(layer) == pytest.approx(lora.scaling(layer))
    write_lora(tmp_path / NAME, cut)
    loaded = CogVideoXPipeline.from_pretrained(tiny_base)
    loaded.load_lora_weights(tmp_path, weight_name=NAME)
    ours = load_component(tiny_base, "transformer").state_dict()
    for layer, (a, b) in cut.factors.items():
        ours[f"{layer}.weight"] += cut.scaling(layer) * (b @ a)
    assert_close(fused_weights(loaded.transformer), ours)


def test_the_tool_converts_there_and_back(tiny_lora, tmp_path, monkeypatch, capsys, refused):
    import sys

    from common.tools import convert_lora

    def convert(source, form, target, *more):
        words = ["--lora_path", source, "--form", form, "--output", target, *more]
        monkeypatch.setattr(sys, "argv", ["convert_lora", *map(str, words)])
        convert_lora.main()
        return capsys.readouterr().out

    there, back = tmp_path / "new" / "comfy.safetensors", tmp_path / "back.safetensors"
    assert "16 layers, rank 4, alpha/rank [0.5], as comfyui" in convert(tiny_lora, "comfyui", there)
    assert "diffusion_model.blocks.3.attn_out.alpha" in load_file(there)
    convert(there, "diffusers", back)
    assert content(back)[0].keys() == content(tiny_lora / NAME)[0].keys()
    assert "ranks 1 to " in convert(tiny_lora, "diffusers", tmp_path / "small.safetensors", "--keep", 0.5)
    words = ["--lora_path", tiny_lora, "--form", "comfyui", "--output"]
    assert "--keep: '2' is not a number from 0 to 1" in refused(
        convert_lora.main, *words, tmp_path / "x.safetensors", "--keep", 2
    )
    assert "exists; give another name, or --overwrite" in refused(convert_lora.main, *words, back)
    assert "ends in .safetensors" in refused(convert_lora.main, *words, tmp_path / "lora.bin")
