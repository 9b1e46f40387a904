"""What makes streaming faster: float8 layers against float64, and what a pipeline then still does, or refuses to do."""

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import nn

from common.cogvideox.float8 import Float8Linear, quantize_gelu_rows, quantize_rows, use_float8
from common.cogvideox.pipeline_cogvideox import CogVideoXStreamingPipeline
from common.cogvideox.pipeline_io import load_component
from common.cogvideox.speed import SpeedOptions, speed_up
from common.config.errors import UserError


def test_what_float8_holds_exactly_is_multiplied_exactly():
    """Rows of numbers with three bits of mantissa, whose largest is a power of two times 448's mantissa."""
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([0.0, 1.0, 1.25, -1.5, 1.75, -2.0, 3.0, 3.5])
    draw = lambda *shape: values[torch.randint(len(values), shape, generator=generator)]  # noqa: E731
    linear = nn.Linear(32, 16)
    weight, x = draw(16, 32), draw(2, 5, 32)
    weight[:, 0], x[..., 0] = 3.5, 3.5  # 448 = 3.5 · 2⁷: every scale is a power of two
    linear.weight.data, linear.bias.data = weight, draw(16)
    expected = x.double() @ weight.double().T + linear.bias.double()
    assert torch.equal(Float8Linear(linear)(x), expected.float())


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_error_is_that_of_rounding_to_three_bits_whatever_the_scale(scale):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(256, 128)
    linear.weight.data.normal_(generator=generator)
    linear.weight.data *= torch.logspace(-3, 3, 128)[:, None]  # rows of every size
    linear.bias.data.zero_()
    x = torch.randn(3, 64, 256, generator=generator) * scale
    exact = x.double() @ linear.weight.double().T
    error = (Float8Linear(linear)(x).double() - exact).norm(dim=(0, 1)) / exact.norm(dim=(0, 1))
    # Uniform rounding of a mantissa to 2⁻⁴ of its power of two: a relative error of about 2.6 % in each factor.
    assert error.min() > 0.02 and error.max() < 0.05


def test_a_row_of_zeros_stays_zero():
    linear = nn.Linear(16, 16)
    linear.weight.data[3], linear.bias.data[:] = 0, 0
    y = Float8Linear(linear)(torch.cat([torch.zeros(1, 16), torch.ones(1, 16)]))
    assert torch.all(y[0] == 0) and y[1, 3] == 0 and torch.isfinite(y).all()


@torch.no_grad()
def test_rows_after_a_gelu_are_quantised_as_pytorchs_gelu_of_them():
    """Also where all of a row is negative, and GELU nowhere larger than .17."""
    torch.manual_seed(0)
    matrix = torch.cat([4 * torch.randn(16, 64), -torch.rand(2, 64)])
    codes, scale = quantize_gelu_rows(matrix)
    exact = nn.functional.gelu(matrix.double(), approximate="tanh")
    other, other_scale = quantize_rows(exact.float())
    torch.testing.assert_close(scale[:16], other_scale[:16])
    assert (codes.double() * scale - exact).norm() < 1.02 * (other.double() * other_scale - exact).norm()


def test_large_layers_of_all_blocks_are_replaced_and_no_others(tiny_models):
    transformer = load_component(tiny_models / "stage4", "transformer")
    attentions = len(transformer.transformer_blocks) + len(transformer.control_blocks)
    assert use_float8(transformer) == 4 * attentions + 2 * len(transformer.transformer_blocks)
    names = {name for name, module in transformer.named_modules() if isinstance(module, Float8Linear)}
    assert not any("norm" in name or "embed" in name or "proj_out" in name for name in names)
    assert transformer.dtype == torch.float32 and use_float8(transformer) == 0


def test_casting_the_model_leaves_what_is_quantised_as_it_is():
    layer = nn.Sequential(Float8Linear(nn.Linear(16, 16)), nn.Linear(16, 16)).to(torch.bfloat16)
    assert layer[0].weight.dtype == torch.float8_e4m3fn and layer[0].scale.dtype == torch.float32
    assert layer[1].weight.dtype == layer[0].bias.dtype == torch.bfloat16
    assert torch.isfinite(layer(torch.ones(2, 16, dtype=torch.bfloat16))).all()


def test_a_pipeline_made_for_speed_says_what_it_cannot_do_any_more(tiny_models, tmp_path):
    pipeline = CogVideoXStreamingPipeline.from_pretrained(tiny_models / "stage4")
    use_float8(pipeline.transformer)
    with pytest.raises(UserError, match="cannot be saved"):
        pipeline.save_pretrained(tmp_path / "fast")
    pipeline = CogVideoXStreamingPipeline.from_pretrained(tiny_models / "stage4")
    pipeline.text_encoder = None
    with pytest.raises(UserError, match="cannot be saved"):
        pipeline.save_pretrained(tmp_path / "fast")
    with pytest.raises(UserError, match="the text encoder is gone: give prompt_embeds"):
        pipeline.stream("a car")
    assert not (tmp_path / "fast").exists()


@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_what_is_offloaded_does_not_stream(tiny_models, offload):
    pipeline = CogVideoXStreamingPipeline.from_pretrained(tiny_models / "stage4")
    getattr(pipeline, offload)(device="cpu")
    with pytest.raises(UserError, match="cannot be offloaded to the CPU; encode the prompt, set text_encoder to None"):
        pipeline.stream("a car")


def test_one_models_attention_kernel_is_not_anothers(tiny_models):
    fast, plain = (CogVideoXStreamingPipeline.from_pretrained(tiny_models / "stage4") for _ in range(2))
    before = _AttentionBackendRegistry.get_active_backend()[0]
    speed_up(fast, SpeedOptions(attention_backend="_native_math"))
    assert {block.attn1.processor._attention_backend for block in fast.transformer.transformer_blocks} == {
        "_native_math"
    }
    assert {block.attn1.processor._attention_backend for block in plain.transformer.transformer_blocks} == {None}
    assert _AttentionBackendRegistry.get_active_backend()[0] == before
