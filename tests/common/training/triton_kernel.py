"""The GPU's AdamW kernel against `update`: on a GPU, or with TRITON_INTERPRET=1 by Triton's interpreter on the CPU.

Shapes: O rows, I columns.
"""

import os

import torch

from common.training.low_precision_adamw import FORMATS, MOMENTS, LowPrecisionAdamW, Numbers, read_moment, update
from common.training.low_precision_kernel import update_on_gpu

NUMBERS = Numbers.of_step(1, 1e-2, 0.1, (0.9, 0.95), 1e-8)


def new_state(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    weight = torch.nn.Parameter(parameter)
    state = LowPrecisionAdamW([weight], lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0).make_state(weight)
    return {name: value for name, value in state.items() if name != "step"}


def steps_of_float32_weights_are_those_of_update() -> None:
    """Rounding of the moments comes after they were used: a first step has none."""
    for shape in ((6, 40), (300,), (4, 4, 3, 3), (1, 1920)):
        for bounded in (False, True):
            weight, gradient = (
                torch.randn(shape),
                torch.randn(shape) * torch.logspace(-3, 1, shape[0]).view(-1, *[1] * (len(shape) - 1)),
            )
            found, expected, states = weight.clone(), weight.clone(), (new_state(weight), new_state(weight))
            update_on_gpu(found, gradient, states[0], NUMBERS, bounded, 1)
            update(expected, gradient, states[1], NUMBERS, bounded, 1)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
            for name, dtype in MOMENTS.items():
                a, b = (read_moment(state, name) for state in states)
                if f"{name}_scale" not in states[0]:
                    torch.testing.assert_close(a, b)
                    continue
                scale = states[1][f"{name}_scale"]
                torch.testing.assert_close(states[0][f"{name}_scale"], scale)
                # Both are neighbours of the same number: no more than a digit apart.
                digit = 2.0 ** -FORMATS[dtype].mantissa * torch.maximum(a.abs(), b.abs()) + FORMATS[dtype].digit * scale
                assert ((a - b).abs() <= 1.01 * digit).all()


def every_code_is_read_and_written_as_pytorch_does() -> None:
    """Moments that a step leaves alone stay what they are, bit for bit, as long as the row has its largest number."""
    for name, dtype in MOMENTS.items():
        codes = torch.arange(256, dtype=torch.uint8).view(dtype)
        codes = codes[codes.float().isfinite()]
        if name == "exp_avg_sq":
            codes = codes[codes.float() >= 0]  # it is a square
        weight = torch.zeros(1, len(codes))
        state = new_state(weight)
        state[name].copy_(codes[None])
        state[f"{name}_scale"].fill_(2.0**-7)
        still = NUMBERS._replace(beta1=1.0, beta2=1.0)
        update_on_gpu(weight, torch.zeros_like(weight), state, still, False, 3)
        assert torch.equal(state[name].float(), codes[None].float()), name
        assert state[f"{name}_scale"].item() == 2.0**-7


def no_step_is_larger_than_adamws_largest() -> None:
    """Here the first moment is there and the second is rounded away."""
    numbers = Numbers.of_step(50, 1.0, 0.0, (0.9, 0.95), 1e-8)
    for bounded, largest in ((False, numbers.largest), (True, 1.0)):
        weight = torch.zeros(1, 30)
        state = new_state(weight)
        state["exp_avg"].fill_(1.0)
        state["exp_avg_scale"].fill_(1.0)
        update_on_gpu(weight, torch.zeros_like(weight), state, numbers, bounded, 3)
        torch.testing.assert_close(weight, torch.full_like(weight, -largest))


def bfloat16_weights_move_as_float64_on_average() -> None:
    weight, gradient = torch.randn(1, 128).bfloat16(), torch.randn(1, 128).bfloat16()
    numbers, runs = NUMBERS._replace(rate=1e-3), 100
    found = []
    for seed in range(runs):
        found.append(weight.clone())
        update_on_gpu(found[-1], gradient, new_state(weight), numbers, False, 7919 * seed)
    found = torch.stack(found).double()
    exact = weight.double() * (1 - 1e-4) - 1e-3 * gradient.double().sign()
    below, above = found.amin(dim=0), found.amax(dim=0)
    gap = 2.0**-7 * torch.exp2(torch.floor(torch.log2(exact.abs())))
    assert ((above - below) <= 1.001 * gap).all() and ((found - exact).abs() <= 1.001 * gap).all()
    assert ((found.mean(dim=0) - exact).abs() <= 5 * 0.5 * gap / runs**0.5).all()
    assert len({tuple(run.flatten().tolist()) for run in found}) == runs  # every seed draws otherwise


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "1":
        torch.set_default_device("cuda")
    torch.manual_seed(0)
    no_step_is_larger_than_adamws_largest()
    steps_of_float32_weights_are_those_of_update()
    every_code_is_read_and_written_as_pytorch_does()
    bfloat16_weights_move_as_float64_on_average()
