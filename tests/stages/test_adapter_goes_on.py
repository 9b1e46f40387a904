"""Stage 2 from what an earlier stage 2 wrote: on further footage, or with a LoRA that the first run did without."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.cogvideox.pipeline_io import load_component
from common.cogvideox.transformer import CONTROL_PREFIXES
from common.config.errors import SettingError
from tests.stages.conftest import random_batch

LORA = ["--rank", "4", "--lora_alpha", "2", "--lora_target_modules", "to_q", "ff.net.2"]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def first(tiny_stages):
    return tiny_stages.run(2)


def from_first(tiny_stages, first, tmp_path, *overrides, dtype=torch.float32):
    settings = tiny_stages.settings(2, tmp_path / "again", "--pretrained_model_name_or_path", str(first), *overrides)
    objective = settings.build_objective()
    objective.load(torch.device("cpu"), dtype)
    return objective


@pytest.mark.parametrize("lora", [[], LORA], ids=["adapter alone", "with a LoRA"])
def test_it_starts_as_what_the_first_run_ended_with(tiny_stages, first, tmp_path, lora):
    objective, transformer = from_first(tiny_stages, first, tmp_path, *lora), load_component(first, "transformer")
    batch = random_batch(2, 9, 16, 4, 8)
    rows = objective.vocabulary.frame_rows(batch.control_indices)
    with torch.no_grad():
        expected, got = (
            objective.predict(module, batch.latents, torch.tensor([900, 100]), batch.prompt_embeds, rows)
            for module in (transformer, objective.module)
        )
    assert torch.equal(got, expected)
    assert {name for name, p in objective.module.named_parameters() if p.requires_grad} >= {
        name for name, _ in transformer.named_parameters() if name.startswith(CONTROL_PREFIXES)
    }


def test_in_bf16_the_adapter_goes_on_from_all_of_its_digits(tiny_stages, first, tmp_path):
    objective, weights = from_first(tiny_stages, first, tmp_path, dtype=torch.bfloat16), load_file(first / WEIGHTS)
    adapter = {name: value for name, value in weights.items() if name.startswith(CONTROL_PREFIXES)}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in adapter.values())
    for name, value in adapter.items():
        assert torch.equal(objective.module.get_parameter(name), value), name


@pytest.mark.parametrize("lora", [[], LORA], ids=["adapter alone", "with a LoRA"])
def test_a_second_run_trains_the_adapter_and_leaves_the_base(tiny_stages, first, tmp_path, lora):
    words = ["--pretrained_model_name_or_path", str(first), "--mixed_precision", "bf16", *lora]
    again = tiny_stages.train(2, tmp_path / "again", *words)
    before, after = load_file(first / WEIGHTS), load_file(again / WEIGHTS)
    assert before.keys() == after.keys()
    in_lora = (".attn1.to_q.weight", ".ff.net.2.weight") if lora else ()
    for name, value in after.items():
        if name.startswith(CONTROL_PREFIXES):
            assert not (name.endswith("attn1.to_out.0.weight") and torch.equal(value, before[name])), name
        else:
            assert torch.equal(value, before[name]) is not name.endswith(in_lora), name
    vocabularies = (load_component(directory, "control_vocabulary") for directory in (first, again))
    assert len({str(vocabulary.table.tolist()) for vocabulary in vocabularies}) == 1


@pytest.mark.parametrize(
    ("setting", "value", "was"),
    [("control_tokens_per_frame", "2", "8"), ("control_label", "last", "'mean'"), ("control_end_layer", "3", "4")],
)
def test_what_the_adapter_is_cannot_change(tiny_stages, first, tmp_path, setting, value, was):
    words = ["--pretrained_model_name_or_path", str(first), f"--{setting}", value]
    objective = tiny_stages.settings(2, tmp_path / "again", *words).build_objective()
    with pytest.raises(SettingError, match=rf"{setting}: is '?{value}'?; .* was trained with {was}"):
        objective.describe()  # as a dry run does, before any weights are read


def test_what_a_config_leaves_out_is_as_published(tiny_stages, first, tmp_path):
    copy = Path(shutil.copytree(first, tmp_path / "copy"))
    file = copy / "transformer" / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("control_tokens_per_frame") == 8
    file.write_text(json.dumps(config))
    words = ["--pretrained_model_name_or_path", str(copy), "--control_tokens_per_frame"]
    with pytest.raises(SettingError, match="control_tokens_per_frame: is 8; .* was trained with 1"):
        tiny_stages.settings(2, tmp_path / "again", *words, "8").build_objective().describe()
    tiny_stages.settings(2, tmp_path / "again", *words, "1").build_objective().describe()
