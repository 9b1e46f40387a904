"""Stage 2 from what an earlier stage 2 wrote: on further footage, or with a LoRA that the first run did without."""

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
    assert any(not torch.equal(value, value.bfloat16().float()) for value in weights.values())
    for name, parameter in objective.module.named_parameters():
        if name.startswith(CONTROL_PREFIXES):
            assert torch.equal(parameter, weights[name]), name


def test_a_second_run_trains_the_adapter_and_leaves_the_base(tiny_stages, first, tmp_path):
    again = tiny_stages.train(2, tmp_path / "again", "--pretrained_model_name_or_path", str(first))
    before, after = load_file(first / WEIGHTS), load_file(again / WEIGHTS)
    assert before.keys() == after.keys()
    for name, value in after.items():
        learnt = name.startswith(CONTROL_PREFIXES) and name.endswith("attn1.to_out.0.weight")
        if learnt or not name.startswith(CONTROL_PREFIXES):
            assert torch.equal(value, before[name]) is not learnt, name


@pytest.mark.parametrize(
    ("setting", "value", "was"),
    [("control_tokens_per_frame", "2", "8"), ("control_label", "last", "'mean'"), ("control_end_layer", "3", "4")],
)
def test_what_the_adapter_is_cannot_change(tiny_stages, first, tmp_path, setting, value, was):
    with pytest.raises(SettingError, match=rf"{setting}: is '?{value}'?; .* was trained with {was}"):
        from_first(tiny_stages, first, tmp_path, f"--{setting}", value)
