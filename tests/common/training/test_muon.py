"""Muon: against the polar factor by SVD, PyTorch's own Muon, and plain AdamW on what is no matrix."""

import copy

import pytest
import torch
from torch import nn

from common.training.muon import RATE, MuonAdamW, orthogonalize


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (32, 48)])
def test_orthogonalize_comes_near_the_polar_factor(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for matrix, found in zip(matrices, orthogonalize(matrices), strict=True):
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.5 and values.max() < 1.3
        assert torch.nn.functional.cosine_similarity((u @ v).flatten(), found.flatten(), dim=0) > 0.97


def test_matrices_take_the_steps_of_pytorchs_muon():
    """Which rounds its iterations to bfloat16: hence the tolerance."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(48, 20, bias=False), nn.Linear(20, 64, bias=False), nn.Linear(64, 20, bias=False))
    theirs = nn.Sequential(nn.Linear(48, 20, bias=False), nn.Linear(20, 64, bias=False), nn.Linear(64, 20, bias=False))
    theirs.load_state_dict(ours.state_dict())
    start = [p.detach().clone() for p in ours.parameters()]
    first = MuonAdamW(list(ours.parameters()), lr=1e-3, weight_decay=0.1)
    second = torch.optim.Muon(theirs.parameters(), lr=RATE * 1e-3, weight_decay=0.1 / RATE, momentum=0.95)
    for step in range(4):
        gradients(ours, step)
        gradients(theirs, step)
        first.step()
        second.step()
    for before, a, b in zip(start, ours.parameters(), theirs.parameters(), strict=True):
        moved, expected = a - before, b - before
        assert (moved - expected).norm() < 0.02 * expected.norm()


def test_what_is_no_matrix_takes_adamws_steps():
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Linear(8, 12))  # no side reaches 16
    theirs = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Linear(8, 12))
    theirs.load_state_dict(ours.state_dict())
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizers = MuonAdamW(list(ours.parameters()), **options), torch.optim.AdamW(theirs.parameters(), **options)
    for step in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            gradients(model, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_convolution_is_a_matrix_and_its_rate_may_be_a_tensor():
    torch.manual_seed(0)
    conv, rate = nn.Conv3d(16, 24, 3), torch.tensor(1e-3)
    optimizer, before = MuonAdamW(list(conv.parameters()), lr=rate, weight_decay=0.0), conv.weight.detach().clone()
    gradients(conv, 0)
    optimizer.step()
    values = torch.linalg.svdvals(((before - conv.weight) / (RATE * 1e-3)).detach().flatten(1))
    assert values.min() > 0.5 and values.max() < 1.3
    before = conv.weight.detach().clone()
    rate.zero_()
    optimizer.step()
    assert torch.equal(conv.weight, before)


def test_goes_on_from_its_state_as_if_unbroken():
    torch.manual_seed(0)
    models = [nn.Linear(32, 20), nn.Linear(32, 20)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [MuonAdamW(list(model.parameters()), lr=1e-2) for model in models]
    for step in range(4):
        if step == 2:
            optimizers[1] = MuonAdamW(list(models[1].parameters()), lr=1e-2)
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        for model, optimizer in zip(models, optimizers, strict=True):
            gradients(model, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))
