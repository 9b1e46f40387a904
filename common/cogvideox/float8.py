"""Linear layers in float8 for inference: half the bytes and up to twice the rate of bfloat16, at a stated error.

Shapes: M rows of an input, I inputs, O outputs.
"""

from collections.abc import Callable

import torch
from diffusers.models.activations import GELU
from torch import Tensor, nn

from common.cogvideox.transformer import all_blocks

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # 448


def quantize_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """[M,I] → float8 [M,I] and float32 [M,1], whose product is the matrix but for rounding (3 bits of mantissa)."""
    scale = matrix.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return to_float8(matrix.float() / scale), scale


def to_float8(numbers: Tensor) -> Tensor:
    return numbers.clamp(-LARGEST, LARGEST).to(FLOAT8)


def gelu(numbers: Tensor) -> Tensor:
    """GELU in its tanh form, written with a sigmoid: the same function, quicker than a kernel's tanh."""
    return numbers * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (numbers + 0.044715 * numbers**3))


def quantize_gelu_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of a matrix's GELU, which is computed once for every number and not again for the scale: it rises
    with what is positive, and its negative values end at -0.1701."""
    numbers = matrix.float()
    largest = gelu(numbers.amax(dim=1, keepdim=True)).clamp(min=0.1701)
    scale = largest / LARGEST
    return to_float8(gelu(numbers) / scale), scale


class Float8Linear(nn.Module):
    """`nn.Linear` for inference with weights and inputs in float8, one scale for each row of both.

    Weights are quantised once, inputs at every call (dynamic, row-wise scaling: arXiv 2209.05433 has the format).
    Casting the model around it leaves both as they are.

    Attributes:
        quantize: of the input's rows; with `quantize_gelu_rows` the layer takes what stands before a GELU.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.quantize = quantize_rows
        weight, scale = quantize_rows(linear.weight.detach())
        self.register_buffer("weight", weight)  # [O,I]
        self.register_buffer("scale", scale.t().contiguous())  # [1,O]
        self.bias = linear.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float8Linear":
        quantised = {"weight": self.weight, "scale": self.scale}
        super()._apply(fn, recurse)
        for name, before in quantised.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def forward(self, input: Tensor) -> Tensor:
        """[…,I] → […,O] in the input's type."""
        rows, scale = self.quantize(input.flatten(0, -2))
        # The public name of it, torch.nn.functional.scaled_mm, cannot be compiled in torch 2.11.
        output = torch._scaled_mm(
            rows, self.weight.t(), scale, self.scale, bias=self.bias, out_dtype=input.dtype, use_fast_accum=True
        )
        return output.unflatten(0, input.shape[:-1])


def use_float8(transformer: nn.Module) -> int:
    """Replaces the large linear layers of a transformer's blocks, in place; → how many.

    Modulations stay as they are: their inputs are a few rows, which is no work, and all tokens depend on them. So do
    the layers before and after the blocks.
    """
    parts = [part for block in all_blocks(transformer) for part in (block.attn1, getattr(block, "ff", None)) if part]
    layers = [
        (module, name, child)
        for part in parts
        for module in part.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.Linear) and child.in_features % 16 == child.out_features % 16 == 0
    ]
    for module, name, child in layers:
        setattr(module, name, Float8Linear(child))
    for block in transformer.transformer_blocks:
        activation, linear = block.ff.net[0], block.ff.net[2]
        if isinstance(linear, Float8Linear) and isinstance(activation, GELU) and activation.approximate == "tanh":
            block.ff.net[0], linear.quantize = activation.proj, quantize_gelu_rows
    return len(layers)
