"""What is said when memory runs out fits the settings."""

import pytest
import torch
from toy import ToyObjective, toy_settings

from common.config.errors import UserError
from common.config.settings import TrainingSettings
from common.training.memory_advice import training_advice
from common.training.trainer import Trainer

RECORDED = {"cuda_graph": True, "gradient_checkpointing": False, "latent_cache_dir": "/cache", "windows_per_clip": 1}
RECOMPUTE, EIGHT_BIT, SHARD = "gradient_checkpointing = True", "optimizer = 'adamw_8bit'", "fsdp2.yaml"


@pytest.mark.parametrize(
    ("changes", "is_sharded", "said", "unsaid"),
    [
        ({"gradient_checkpointing": 2}, False, [RECOMPUTE, EIGHT_BIT, SHARD, "latent_cache_dir"], ["cuda_graph"]),
        ({}, False, [EIGHT_BIT, SHARD], [RECOMPUTE, "train_batch_size"]),
        ({}, True, [EIGHT_BIT, "among more GPUs"], [SHARD]),
        (RECORDED, False, ["set cuda_graph = False and " + RECOMPUTE], [EIGHT_BIT, SHARD, "encode the videos"]),
        ({"optimizer": "muon"}, False, ["use fewer frames"], [EIGHT_BIT, SHARD]),
        ({"optimizer": "adamw_8bit"}, False, [SHARD], [EIGHT_BIT]),
        ({"optimizer": "adamw_8bit", "trained_weights": "bfloat16"}, False, ["use fewer frames"], [SHARD]),
        ({"optimizer": "adamw_8bit", "step_in_backward": True}, False, ["use fewer frames"], [SHARD]),
    ],
)
def test_advice_for_a_step_is_what_these_settings_can_take(changes, is_sharded, said, unsaid):
    settings = TrainingSettings(**changes)
    settings.validate()
    advice = training_advice(settings, (1, 9, 16, 60, 90), is_sharded)
    assert advice.startswith("out of memory on latents [1, 9, 16, 60, 90] [B,F,C,H,W]: ")
    assert all(words in advice for words in said) and not any(words in advice for words in unsaid), advice


@pytest.mark.parametrize(
    ("failing", "words"),
    [
        (
            "sample",
            r"validation of step 2: set validation_prompts = \[\] \(no sample.*\) or validation_steps = 0$",
        ),
        ("validation_loss", "validation of step 0: set validation_steps = 0$"),
    ],
)
def test_advice_for_a_validation_is_another(toy_data, tmp_path, monkeypatch, failing, words):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(ToyObjective, failing, fail)
    settings = toy_settings(toy_data, tmp_path, validation_steps=2, validation_prompts=["a road"])
    with pytest.raises(UserError, match=f"^out of memory in the {words}"):
        Trainer(settings, settings.build_objective()).train()
