"""AdamW with float8 moments: its rounding against PyTorch's types, its steps against PyTorch's AdamW in float64."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from common.training import optimizers
from common.training.low_precision_adamw import (
    FORMATS,
    MOMENTS,
    LowPrecisionAdamW,
    largest_step,
    quantize,
    round_stochastically,
)
from tests.conftest import ROOT

OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def neighbours(dtype: torch.dtype) -> torch.Tensor:
    """All numbers of a type of 8 or 16 bits that are finite, in order."""
    bits = torch.uint8 if dtype.itemsize == 1 else torch.int16
    codes = torch.arange(256) if bits == torch.uint8 else torch.arange(-(2**15), 2**15)
    numbers = codes.to(bits).view(dtype).float()
    return numbers[numbers.isfinite()].unique()


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_number_becomes_one_of_its_two_neighbours_and_itself_on_average(dtype):
    torch.manual_seed(0)
    largest = min(FORMATS[dtype].largest, 1e30)  # of which the gap to the next is a number too
    magnitudes = torch.logspace(-6, 2, 400) if dtype == torch.float8_e4m3fn else torch.logspace(-4, 4, 400)
    values = torch.cat([magnitudes, -magnitudes, torch.tensor([0.0, largest, -largest])])
    rounded = torch.stack([round_stochastically(values, dtype).double() for _ in range(4000)])
    grid = neighbours(dtype).double()
    below = grid[(torch.searchsorted(grid, values.double(), right=True) - 1).clamp(min=0)]
    above = grid[torch.searchsorted(grid, values.double()).clamp(max=len(grid) - 1)]
    assert ((rounded == below) | (rounded == above)).all()
    gap = (above - below).clamp(min=1e-300)
    # The mean of 4000 draws between two neighbours lies within 5 standard errors, at most half a gap each.
    assert ((rounded.mean(dim=0) - values).abs() <= 5 * 0.5 * gap / 4000**0.5 + 1e-12 * values.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_what_the_type_holds_stays_as_it_is(dtype):
    numbers = neighbours(dtype)
    numbers = numbers[numbers.abs() >= 2.0 ** -(100 if dtype == torch.bfloat16 else 20)]
    assert torch.equal(round_stochastically(numbers, dtype).float(), numbers)


def test_a_row_is_scaled_by_its_largest_number():
    torch.manual_seed(0)
    moment = torch.randn(8, 64) * torch.logspace(-12, 4, 8)[:, None]
    codes, scale = quantize(moment, torch.float8_e4m3fn)
    restored = codes.float() * scale
    assert ((restored - moment).abs() <= 0.126 * moment.abs() + scale * 2.0**-9).all()  # 3 bits, and the last octave
    torch.testing.assert_close(restored.abs().amax(dim=1), moment.abs().amax(dim=1))  # which is the largest code
    zero, scale = quantize(torch.zeros(2, 4), torch.float8_e5m2)
    assert not zero.float().any() and scale.isfinite().all()


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.05), (torch.bfloat16, 0.1)])
def test_on_average_it_takes_the_steps_of_pytorchs_adamw(dtype, tolerance):
    """Over 40 runs that round differently, against one in float64."""
    torch.manual_seed(0)
    start = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Linear(6, 10)).to(dtype)
    exact = copy.deepcopy(start).double()
    reference = torch.optim.AdamW(exact.parameters(), **OPTIONS)
    for step in range(6):
        gradients(exact, step)
        for parameter in exact.parameters():
            parameter.grad = parameter.grad.to(dtype).double()
        reference.step()
    runs = []
    for seed in range(40):
        model = copy.deepcopy(start)
        optimizer = LowPrecisionAdamW(model.parameters(), **OPTIONS)
        for step in range(6):
            gradients(model, step)
            torch.manual_seed(1000 * seed + step)
            optimizer.step()
        runs.append([parameter.detach().double() for parameter in model.parameters()])
    for before, true, *found in zip(start.parameters(), exact.parameters(), *runs, strict=True):
        moved, expected = torch.stack(found).mean(dim=0) - before.double(), true.detach() - before.double()
        assert (moved - expected).norm() < tolerance * expected.norm()


def test_small_steps_are_not_lost_in_bfloat16():
    """A rate of 1e-5 moves weights of 1 by 1/400 of a digit: rounding to the nearest would keep them where they are."""
    model = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    options = OPTIONS | {"lr": 1e-5, "weight_decay": 0.0}
    for kind, least, most in ((torch.optim.AdamW, 0.0, 0.0), (LowPrecisionAdamW, 0.8e-3, 1.2e-3)):
        trained = copy.deepcopy(model)
        optimizer = kind(trained.parameters(), **options)
        torch.manual_seed(0)
        for _ in range(100):
            trained.weight.grad = torch.ones_like(trained.weight)
            optimizer.step()
        assert least <= 1 - trained.weight.double().mean() <= most


def test_moments_take_two_bytes_a_weight_and_vectors_stay_exact():
    model = nn.Linear(256, 128)
    optimizer = LowPrecisionAdamW(model.parameters(), **OPTIONS)
    gradients(model, 0)
    optimizer.step()
    state = optimizer.state[model.weight]
    assert {name: state[name].dtype for name in MOMENTS} == MOMENTS
    taken = sum(value.numel() * value.itemsize for value in state.values())
    assert taken <= 2 * model.weight.numel() + 2 * 128 * 4 + 4
    assert all(optimizer.state[model.bias][name].dtype == torch.float32 for name in MOMENTS)


def test_steps_in_the_backward_pass_leave_no_gradients_and_follow_the_rate_of_the_moment():
    """Bounded steps: without outliers they are those of `step`, as float32 weights show."""
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 4))
    start, early = copy.deepcopy(whole), copy.deepcopy(whole)
    late = LowPrecisionAdamW(whole.parameters(), **OPTIONS)
    eager = LowPrecisionAdamW(early.parameters(), **OPTIONS)
    eager.step_in_backward()
    eager.load_state_dict(eager.state_dict())  # as accelerate does: it puts other groups in place
    for step in range(5):
        for optimizer in (late, eager):
            optimizer.param_groups[0]["lr"] = 1e-3 * step  # a warm-up: nothing moves at first
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
        for model in (whole, early):
            model(x).square().mean().backward()
        norm = torch.cat([p.grad.flatten() for p in whole.parameters()]).norm()
        # Not bit for bit: the weights differ by then, since the moments were rounded by other draws.
        torch.testing.assert_close(eager.gradient_norm(), norm, rtol=3e-2, atol=0)
        assert all(parameter.grad is None for parameter in early.parameters())
        late.step()
        late.zero_grad()
        if step == 0:
            assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), early.parameters(), strict=True))
    for before, a, b in zip(start.parameters(), whole.parameters(), early.parameters(), strict=True):
        assert (a - b).norm() < 0.2 * (a - before).norm()


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.5, 0.9)])
def test_the_largest_step_is_reached_by_the_worst_gradients_and_by_no_others(betas):
    """In float64, by PyTorch's AdamW. The worst are in proportion to their shares of one moment over the other."""
    steps = 30
    ages = torch.arange(steps, dtype=torch.float64).flip(0)
    shares = [(1 - beta) * (beta**ages) / (1 - beta**steps) for beta in betas]
    worst = shares[0] / shares[1]
    drawn = torch.randn(steps, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 3
    for gradients, check in ((worst[:, None], True), (drawn, False)):
        weight = nn.Parameter(torch.zeros(gradients.shape[1], dtype=torch.float64))
        optimizer = torch.optim.AdamW([weight], lr=1.0, betas=betas, eps=0.0, weight_decay=0.0)
        for gradient in gradients:
            before, weight.grad = weight.detach().clone(), gradient.clone()
            optimizer.step()
        moved, most = (weight.detach() - before).abs(), largest_step(*betas, steps)
        assert (moved <= most * (1 + 1e-9)).all()
        if check:
            assert moved.item() == pytest.approx(most, rel=1e-6)
    assert largest_step(*betas, 1) == pytest.approx(1)
    assert largest_step(0.9, 0.5, 100_000) == largest_step(0.0, 0.0, 1) == float("inf")


def test_small_gradients_beside_large_ones_take_no_wild_steps():
    """A hundred thousandth of their row's largest: the second moment has no digits for their squares."""
    torch.manual_seed(0)
    model = nn.Linear(64, 8, bias=False)
    optimizer = LowPrecisionAdamW(model.parameters(), **OPTIONS | {"lr": 1.0, "weight_decay": 0.0})
    for step in range(40):
        before = model.weight.detach().clone()
        model.weight.grad = torch.randn(8, 64) * torch.where(torch.arange(64) == 0, 1.0, 1e-5)
        optimizer.step()
        assert (model.weight - before).abs().max() <= 1.001 * largest_step(0.9, 0.95, step + 1)


def test_an_outlier_moves_a_weight_no_further_than_the_rate():
    model = nn.Linear(32, 32, bias=False)
    optimizer = LowPrecisionAdamW(model.parameters(), **OPTIONS | {"weight_decay": 0.0})
    optimizer.step_in_backward()
    for step in range(30):
        before = model.weight.detach().clone()
        scale = 1.0 if step < 29 else 1e4
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(step))
        (scale * model(x).square().mean()).backward()
        moved = (model.weight.detach() - before).square().mean().sqrt()
    assert moved < 1.05 * OPTIONS["lr"]


@pytest.mark.parametrize(
    ("beta2", "gradients"),
    [(0.95, [*(1.055**step for step in range(60)), 18.0, 13.0, 9.0]), (0.999, [*[1.0] * 300, 1e4, 1.0, 0.0])],
)
def test_a_step_after_large_gradients_is_no_larger_than_the_rate_either(beta2, gradients):
    """By then the gradient is small again, and the first moment still large."""
    weight = nn.Parameter(torch.zeros(4, 32))
    options = OPTIONS | {"betas": (0.9, beta2), "weight_decay": 0.0}
    LowPrecisionAdamW([weight], **options).step_in_backward()
    for gradient in gradients:
        before = weight.detach().clone()
        (weight * gradient).sum().backward()
        assert (weight.detach() - before).square().mean(dim=1).sqrt().max() <= 1.001 * OPTIONS["lr"]


def test_saved_moments_are_restored_bit_for_bit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 20), nn.Linear(20, 8)).to(torch.bfloat16)
    twin = copy.deepcopy(model)
    first, second = (LowPrecisionAdamW(m.parameters(), **OPTIONS) for m in (model, twin))
    for step in range(3):
        gradients(model, step)
        first.step()
    saved = optimizers.gather_tensors(optimizers.optimizer_state(first, dict(model.named_parameters())), keep=True)
    twin.load_state_dict(model.state_dict())
    copied = {name: value.clone() for name, value in saved.items()}
    optimizers.load_optimizer_state(second, dict(twin.named_parameters()), copied)
    for optimizer, trained in ((first, model), (second, twin)):
        gradients(trained, 3)
        torch.manual_seed(5)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_the_gpus_kernel_takes_the_same_steps():
    """By Triton's interpreter, which has to be asked for before Triton is imported: hence the program."""
    pytest.importorskip("triton", reason="Triton is for Linux")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, str(ROOT / "tests" / "common" / "training" / "triton_kernel.py")]
    run = subprocess.run(program, env=environment, text=True, capture_output=True, timeout=300)
    assert run.returncode == 0, run.stderr
