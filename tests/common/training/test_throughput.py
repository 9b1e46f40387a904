"""The operation count against torch's own counter, and the clock against a fake time."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.cogvideox.transformer import CogVideoXControlTransformer3DModel
from common.training import throughput
from common.training.throughput import StepClock, forward_flops, peak_flops, training_flops

TINY = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 4, "time_embed_dim": 16, "text_embed_dim": 24,
    "max_text_seq_length": 16, "sample_height": 4, "sample_width": 6, "sample_frames": 33,
}  # fmt: skip
CONTROL = {"control_dim": 8, "control_start_layer": 1, "control_end_layer": 3}
SEVERAL_TOKENS = {**CONTROL, "control_tokens_per_frame": 3}


@pytest.mark.parametrize("control", [{}, CONTROL, SEVERAL_TOKENS], ids=["plain", "control", "several control tokens"])
def test_forward_formula_equals_torchs_counter(control):
    torch.manual_seed(0)
    model = CogVideoXControlTransformer3DModel(**TINY, **control)
    latents, text = torch.randn(2, 9, 16, 4, 6), torch.randn(2, 16, 24)
    embeds = torch.randn(2, 9, 8) if control else None
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # the counter knows no CPU flash attention
        model(latents, text, torch.tensor([3, 4]), control_embeds=embeds)
    # The formula has no term for what the modulation of the few control tokens costs.
    assert forward_flops(model.config, latents.shape, 16) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_training_formula_equals_torchs_counter(is_frozen):
    torch.manual_seed(0)
    model = CogVideoXControlTransformer3DModel(**TINY)
    if is_frozen:  # but for the first layer, so that the backward goes through all of it
        model.requires_grad_(False).patch_embed.requires_grad_(True)
    latents, text = torch.randn(1, 9, 16, 4, 6), torch.randn(1, 16, 24)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # the counter knows no CPU flash attention
        model(latents, text, torch.tensor([3])).sample.sum().backward()
    assert training_flops(model, latents.shape, 16) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_published_operation_count_of_the_2b_model():
    """33 TFLOP in linear layers and 35 in attention for 33 frames of 480×720, as measured on the reference."""
    with torch.device("meta"):
        config = CogVideoXControlTransformer3DModel(num_layers=30).config
    assert forward_flops(config, (1, 9, 16, 60, 90), 226) == pytest.approx(68e12, rel=0.02)


def test_model_without_cogvideox_config_has_no_count():
    assert training_flops(torch.nn.Linear(2, 2), (1, 1, 1, 1, 1), 1) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GeForce RTX 4090", 165e12), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_peak_is_looked_up_by_whole_words(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda", 0), "bf16") == peak
    assert peak_flops(torch.device("cuda", 0), "no") is None and peak_flops(torch.device("cpu"), "bf16") is None


def test_clock_counts_steps_only(monkeypatch):
    now = 0.0
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now)
    clock = StepClock(warmup_steps=1)
    now = 50.0  # the first step compiles
    assert clock.step(10, 1.0) and clock.read()["s_per_step"] is None
    for _ in range(2):
        with clock.waiting_for_data():
            now += 0.5
        now += 1.5
        assert not clock.step(10, 8.0)
    clock.pause()
    now += 100.0  # a validation
    clock.resume()
    assert clock.read() == {"s_per_step": 2.0, "data_wait": 0.25, "tokens_per_s": 5.0, "flops_per_s": 4.0}
    now += 1.0
    clock.step(10, None)
    assert clock.read() == {"s_per_step": 1.0, "data_wait": 0.0, "tokens_per_s": 10.0, "flops_per_s": None}
