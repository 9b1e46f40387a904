"""`low_precision_adamw.update` on a GPU: a row a program, all in registers, one pass over memory.

The same formulas compiled by PyTorch cost the host .4 ms a call, of which CogVideoX-2B would take a thousand a step, or
minutes of compiling with many weights in a call. Here a step of all of them takes 53 ms on an H200.

float8 is packed from and to bits here: GPUs before Hopper and Ada have no instruction for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.training.low_precision_adamw import BF16, E4M3, E5M2, Numbers, rows


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _round(values, draws, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr):
    """As `round_stochastically`; draws are uint32."""
    exponent = ((values.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    exponent = tl.maximum(exponent, SMALLEST) - MANTISSA  # of a digit
    digits = values * _power_of_two(-exponent)
    below = tl.floor(digits)
    up = (draws >> 8).to(tl.float32) * 5.9604644775390625e-08 < digits - below  # 24 bits, over 2^24
    return tl.where(up, below + 1, below) * _power_of_two(exponent)


@triton.jit
def _encode(values, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr, DIGITS: tl.constexpr):
    """The uint8 of numbers that the format holds."""
    bits = values.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) & 255) - 127
    normal = ((exponent - SMALLEST + 1) << MANTISSA) | ((bits >> (23 - MANTISSA)) & ((1 << MANTISSA) - 1))
    small = (tl.abs(values) * DIGITS).to(tl.int32)
    return (tl.where(exponent < SMALLEST, small, normal) | ((bits >> 24) & 128)).to(tl.uint8)


@triton.jit
def _decode(codes, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr, DIGIT: tl.constexpr):
    bits = codes.to(tl.int32)
    exponent, mantissa = (bits & 127) >> MANTISSA, bits & ((1 << MANTISSA) - 1)
    normal = (((exponent + SMALLEST + 126) << 23) | (mantissa << (23 - MANTISSA))).to(tl.float32, bitcast=True)
    values = tl.where(exponent == 0, mantissa.to(tl.float32) * DIGIT, normal)
    return tl.where(bits >= 128, -values, values)


@triton.jit
def _write_moment(
    codes, scales, row, at, inside, moment, draws,
    MANTISSA: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr, DIGITS: tl.constexpr,
):  # fmt: skip
    scale = tl.maximum(tl.max(tl.abs(moment), axis=0), 1e-30) / LARGEST
    scaled = tl.minimum(tl.maximum(moment / scale, -LARGEST), LARGEST)
    rounded = _round(scaled, draws, MANTISSA, SMALLEST)
    tl.store(codes + at, _encode(rounded, MANTISSA, SMALLEST, DIGITS), mask=inside)
    tl.store(scales + row, scale)


@triton.jit(do_not_specialize=["seed"])
def _update_row(
    weights, gradients, first, first_scales, second, second_scales, width, seed,
    rate, decay, beta1, beta2, eps, correction1, correction2, largest,
    BOUNDED: tl.constexpr, ROUNDED: tl.constexpr, QUANTIZED: tl.constexpr, BLOCK: tl.constexpr,
    M1: tl.constexpr, S1: tl.constexpr, L1: tl.constexpr, D1: tl.constexpr,
    M2: tl.constexpr, S2: tl.constexpr, L2: tl.constexpr, D2: tl.constexpr, MW: tl.constexpr, SW: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside, at = columns < width, row * width + columns
    gradient = tl.load(gradients + at, mask=inside, other=0.0).to(tl.float32)
    if QUANTIZED:
        mean = _decode(tl.load(first + at, mask=inside, other=0), M1, S1, D1) * tl.load(first_scales + row)
        square = _decode(tl.load(second + at, mask=inside, other=0), M2, S2, D2) * tl.load(second_scales + row)
    else:
        mean = tl.load(first + at, mask=inside, other=0.0)
        square = tl.load(second + at, mask=inside, other=0.0)
    mean += (1 - beta1) * (gradient - mean)
    square += (1 - beta2) * (gradient * gradient - square)
    draw, draw1, draw2, _ = tl.randint4x(seed, at.to(tl.int32))  # of 32 bits each, as long as the place is
    if QUANTIZED:
        _write_moment(first, first_scales, row, at, inside, mean, draw1, M1, S1, L1, 1 / D1)
        _write_moment(second, second_scales, row, at, inside, square, draw2, M2, S2, L2, 1 / D2)
    else:
        tl.store(first + at, mean, mask=inside)
        tl.store(second + at, square, mask=inside)
    variance = square / correction2
    step = (mean / correction1) / (tl.sqrt(variance) + eps)
    step = tl.minimum(tl.maximum(step, -largest), largest)
    if BOUNDED:
        ratio = gradient * gradient / tl.maximum(variance, eps * eps)
        most = tl.maximum(tl.sum(ratio, axis=0), tl.sum(step * step, axis=0))
        rate /= tl.maximum(tl.sqrt(most / width), 1.0)
    weight = tl.load(weights + at, mask=inside, other=0.0).to(tl.float32)
    weight = weight * (1 - rate * decay) - rate * step
    if ROUNDED:
        weight = _round(weight, draw, MW, SW)
    tl.store(weights + at, weight.to(weights.dtype.element_ty), mask=inside)


def update_on_gpu(
    parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], numbers: Numbers, bounded: bool, seed: int
) -> None:
    """`update`, with draws that are a function of the seed."""
    assert parameter.is_contiguous() and gradient.is_contiguous()
    weights = rows(parameter)
    width = weights.shape[1]
    block = triton.next_power_of_2(width)
    quantized = "exp_avg_scale" in state
    first, second = state["exp_avg"], state["exp_avg_sq"]
    if quantized:
        first, second = first.view(torch.uint8), second.view(torch.uint8)
    _update_row[(weights.shape[0],)](
        weights, gradient, first, state.get("exp_avg_scale", first), second, state.get("exp_avg_sq_scale", second),
        width, seed, *numbers,
        BOUNDED=bounded, ROUNDED=parameter.dtype == torch.bfloat16, QUANTIZED=quantized, BLOCK=block,
        M1=E4M3.mantissa, S1=E4M3.smallest, L1=E4M3.largest, D1=E4M3.digit,
        M2=E5M2.mantissa, S2=E5M2.smallest, L2=E5M2.largest, D2=E5M2.digit,
        MW=BF16.mantissa, SW=BF16.smallest, num_warps=min(max(block // 256, 1), 32),
    )  # fmt: skip
