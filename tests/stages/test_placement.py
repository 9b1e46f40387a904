"""What of the frozen models is on the device: on a latent cache only what a sample video needs, while it is made."""

import numpy as np
import pytest
import torch

from tests.stages.conftest import load_objective

CACHED = ["--latent_cache_dir", "/cache", "--windows_per_clip", "1"]


def objective_of(stage: int, tiny_base, tiny_models, device: str, *overrides: str):
    base = tiny_base if stage < 3 else tiny_models / f"stage{stage - 1}"
    return load_objective(stage, base, *overrides, device=device)


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_a_cache_keeps_vae_and_text_encoder_off_the_device(tiny_base, tiny_models, stage):
    """The meta device stands for a GPU."""
    cached = objective_of(stage, tiny_base, tiny_models, "meta", *CACHED)
    assert cached.vae.device.type == "cpu" and cached.encoder.text_encoder is None
    assert {p.device.type for p in cached.module.parameters()} == {"meta"}
    plain = objective_of(stage, tiny_base, tiny_models, "meta")
    assert plain.vae.device.type == plain.encoder.text_encoder.device.type == "meta"


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_a_sample_video_has_the_vae_on_the_device_and_takes_it_down(tiny_base, tiny_models, stage, monkeypatch):
    steps = [] if stage == 4 else ["--validation_num_inference_steps", "4"]
    overrides = ["--validation_prompts", "a road", *steps, *CACHED]
    objective = objective_of(stage, tiny_base, tiny_models, "cpu", *overrides)
    vae, happened = objective.vae, []
    home, objective.device = torch.device("cpu", 0), torch.device("cpu")  # two names of one place, to tell them apart
    monkeypatch.setattr(type(vae), "device", home)
    monkeypatch.setattr(vae, "to", lambda device: happened.append(str(device)))
    vae.decoder.register_forward_pre_hook(lambda *_: happened.append("decode"))
    frames = objective.sample("a road", ["D"] * 41 if stage > 1 else None, 0)
    assert frames.dtype == np.uint8
    assert list(dict.fromkeys(happened)) == ["cpu", "decode", "cpu:0"] and happened[-1] == "cpu:0"
