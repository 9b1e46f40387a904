"""Pipeline directories: what we write loads in plain diffusers where it should, and bad ones are named."""

import json
import os
import shutil

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel

from common.cogvideox.control_adapter import ControlVocabulary
from common.cogvideox.pipeline_io import load_component, load_components, read_model_index, write_pipeline
from common.cogvideox.transformer import CogVideoXControlTransformer3DModel
from common.config.errors import UserError

NAMES = ["D", "DL", "N"]


def test_plain_directory_round_trips_through_diffusers_and_shares_its_files(tiny_base, tmp_path):
    transformer = load_component(tiny_base, "transformer")
    assert type(transformer) is CogVideoXTransformer3DModel
    torch.nn.init.ones_(transformer.proj_out.bias)
    write_pipeline(tmp_path / "out", tiny_base, "CogVideoXPipeline", {"transformer": transformer})
    loaded = CogVideoXPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.transformer.proj_out.bias, transformer.proj_out.bias)
    assert loaded.tokenizer("a red car").input_ids == load_component(tiny_base, "tokenizer")("a red car").input_ids
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert os.path.samefile(tmp_path / "out" / weights, os.path.join(tiny_base, weights))


def test_control_directory_round_trips(tiny_base, tmp_path):
    base = load_component(tiny_base, "transformer")
    model = CogVideoXControlTransformer3DModel.from_transformer(
        base, control_dim=12, control_start_layer=1, control_end_layer=3, control_attention="frame_causal"
    )
    vocabulary = ControlVocabulary.orthogonal(NAMES, 12)
    parts = {"transformer": model, "control_vocabulary": vocabulary}
    write_pipeline(tmp_path, tiny_base, "CogVideoXControlPipeline", parts)
    loaded = load_components(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded["transformer"].config.control_attention == "frame_causal"
    assert loaded["transformer"].dtype == loaded["vae"].dtype == loaded["text_encoder"].dtype == torch.bfloat16
    for key, value in model.state_dict().items():
        assert torch.equal(loaded["transformer"].state_dict()[key], value.to(torch.bfloat16)), key
    assert loaded["control_vocabulary"].names == NAMES
    assert torch.equal(loaded["control_vocabulary"].table, vocabulary.table)


def test_writing_again_replaces_and_leaves_the_base_alone(tiny_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    before = (base / "transformer/diffusion_pytorch_model.safetensors").read_bytes()
    write_pipeline(tmp_path / "out", base, "CogVideoXPipeline", {})
    transformer = load_component(base, "transformer")
    torch.nn.init.ones_(transformer.proj_out.bias)
    write_pipeline(tmp_path / "out", base, "CogVideoXPipeline", {"transformer": transformer})
    assert (base / "transformer/diffusion_pytorch_model.safetensors").read_bytes() == before
    assert torch.equal(load_component(tmp_path / "out", "transformer").proj_out.bias, transformer.proj_out.bias)


def test_vocabulary_is_orthogonal_and_its_null_row_is_found_by_minus_one():
    vocabulary = ControlVocabulary.orthogonal(NAMES, 16, seed=5)
    gram = vocabulary.table.double() @ vocabulary.table.double().T
    torch.testing.assert_close(gram, 16.0 * torch.eye(3, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert vocabulary.indices(["N", "D", "N"]).tolist() == [2, 0, 2]
    rows = vocabulary.embed(torch.tensor([[0, -1], [2, 1]]))
    assert rows.shape == (2, 2, 16) and torch.equal(rows[0, 1], torch.zeros(16))
    assert torch.equal(rows[1, 0], vocabulary.table[2])
    with pytest.raises(UserError, match=r"'X' \(number 2\).*D, DL, N"):
        vocabulary.indices(["D", "X"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "model_index.json").unlink(), "model_index.json is missing"),
        (lambda d: (d / "model_index.json").write_text("{"), "not valid JSON"),
        (lambda d: shutil.rmtree(d / "vae"), "component 'vae' is missing"),
        (lambda d: (d / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"x"), "vae could not be loaded"),
        (lambda d: shutil.rmtree(d), "no model directory"),
    ],
    ids=["no-index", "bad-json", "no-vae", "truncated-weights", "nothing"],
)
def test_damaged_directories_are_refused_in_one_line(tiny_base, tmp_path, damage, message):
    directory = tmp_path / "base"
    shutil.copytree(tiny_base, directory)
    damage(directory)
    with pytest.raises(UserError, match=message) as error:
        load_components(directory)
    assert "\n" not in str(error.value)


def test_another_stages_directory_is_refused(tiny_base, tmp_path):
    with pytest.raises(UserError, match=r"base model.*here belongs a streaming pipeline"):
        read_model_index(tiny_base, expected="CogVideoXStreamingPipeline")
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(UserError, match=r"fuse it first"):
        read_model_index(lora)


def test_an_index_cannot_name_a_module_outside_the_project(tiny_base, tmp_path):
    directory = tmp_path / "base"
    shutil.copytree(tiny_base, directory)
    index = json.loads((directory / "model_index.json").read_text())
    (directory / "model_index.json").write_text(json.dumps({**index, "vae": ["os", "system"]}))
    with pytest.raises(UserError, match="unknown library 'os'"):
        load_components(directory)


def edit_weights(directory, name, edit, shard_size=None):
    """Rewrites a component's weights as `edit` leaves them, in shards of `shard_size` if given."""
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import load_file

    file = next((directory / name).glob("*.safetensors"))
    state = edit(load_file(file))
    file.unlink()
    pattern = f"{file.stem}{{suffix}}.safetensors"
    save_torch_state_dict(state, directory / name, filename_pattern=pattern, max_shard_size=shard_size or "5GB")


def without(state, word):
    return {key: value for key, value in state.items() if word not in key}


FIRST = "transformer_blocks.0.attn1.norm_k.bias"
PARTIAL = {
    "missing": ("transformer", lambda s: without(s, FIRST), rf"1 keys are missing \({FIRST}\)"),
    "unexpected": ("transformer", lambda s: s | {"x.bias": torch.ones(1)}, r"1 keys are not the model's \(x.bias\)"),
    "shape": ("transformer", lambda s: s | {FIRST: torch.ones(3)}, rf"of another shape \({FIRST} \[3\], not \[16\]\)"),
    "many": ("vae", lambda s: without(s, "encoder"), r"keys are missing \(encoder.*, …\)"),
    "text": ("text_encoder", lambda s: without(s, "wo"), r"missing \(encoder.*wo.weight\)"),
}  # fmt: skip


@pytest.mark.parametrize("shard_size", [None, "4KB"], ids=["one-file", "sharded"])
@pytest.mark.parametrize("case", PARTIAL)
def test_partial_or_foreign_weights_are_refused_with_their_keys(tiny_base, tmp_path, case, shard_size):
    name, edit, message = PARTIAL[case]
    directory = tmp_path / "base"
    shutil.copytree(tiny_base, directory)
    edit_weights(directory, name, edit, shard_size)
    with pytest.raises(UserError, match=message) as error:
        load_component(directory, name)
    assert str(directory / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder"])
def test_sharded_weights_load_as_they_were(tiny_base, tmp_path, name):
    directory = tmp_path / "base"
    shutil.copytree(tiny_base, directory)
    edit_weights(directory, name, lambda state: state, "4KB")
    assert len(list((directory / name).glob("*.safetensors"))) > 2
    expected = load_component(tiny_base, name).state_dict()
    for key, value in load_component(directory, name).state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_a_missing_shard_is_refused(tiny_base, tmp_path):
    directory = tmp_path / "base"
    shutil.copytree(tiny_base, directory)
    edit_weights(directory, "transformer", lambda state: state, "4KB")
    gone = sorted((directory / "transformer").glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=gone.name):
        load_component(directory, "transformer")


@pytest.mark.parametrize("stored", [["shared.weight", "encoder.embed_tokens.weight"], ["encoder.embed_tokens.weight"]])
def test_the_second_name_of_t5s_embedding_is_no_foreign_key(tiny_base, tmp_path, stored):
    """Published text encoders store it under one name or both."""
    directory = tmp_path / "base"
    shutil.copytree(tiny_base, directory)
    embedding = load_component(tiny_base, "text_encoder").shared.weight.detach()
    names = {name: embedding.clone() for name in stored}
    edit_weights(directory, "text_encoder", lambda state: without(state, "shared") | names)
    assert torch.equal(load_component(directory, "text_encoder").encoder.embed_tokens.weight, embedding)
