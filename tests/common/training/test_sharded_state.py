"""Gathering and placing sharded state (FSDP2), with one process and no GPU, against an unsharded twin."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from common.training import optimizers
from common.training.checkpoints import module_state
from common.training.ema import update_ema
from common.training.export import make_skeleton


@pytest.fixture
def one_process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def step(module, optimizer):
    torch.manual_seed(1)
    module(torch.randn(5, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_sharded_module_is_saved_and_restored_like_its_twin(one_process_group):
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 3))
    sharded, fresh, average = (copy.deepcopy(whole) for _ in range(3))
    skeleton = make_skeleton(sharded)
    assert all(p.is_meta for p in skeleton.parameters())
    for module in (sharded, fresh):
        fully_shard(module)
    adam = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (whole, sharded, fresh)]
    for _ in range(2):
        step(whole, adam[0])
        step(sharded, adam[1])
    assert isinstance(next(sharded.parameters()), DTensor)

    weights = optimizers.gather_tensors(module_state(sharded), keep=True)
    moments = optimizers.gather_tensors(
        optimizers.optimizer_state(adam[1], optimizers.trained_parameters(sharded)), keep=True
    )
    expected = optimizers.optimizer_state(adam[0], optimizers.trained_parameters(whole))
    assert moments.keys() == expected.keys() and len(moments) == 3 * 4
    for got, wanted in ((weights, whole.state_dict()), (moments, expected)):
        for key, value in got.items():
            torch.testing.assert_close(value, wanted[key])
    assert optimizers.gather_tensors(module_state(sharded), keep=False) == {}

    # A new sharded module takes them over and goes on as the twin does.
    for name, parameter in fresh.named_parameters():
        parameter.data.copy_(optimizers.like_parameter(weights[name], parameter))
    optimizers.load_optimizer_state(adam[2], optimizers.trained_parameters(fresh), moments)
    step(whole, adam[0])
    step(fresh, adam[2])
    after = optimizers.gather_tensors(module_state(fresh), keep=True)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(after[key], value)

    skeleton.load_state_dict(after, assign=True)
    torch.testing.assert_close(skeleton(torch.ones(1, 4)), whole(torch.ones(1, 4)))
    before = copy.deepcopy(average.state_dict())
    update_ema(average, fresh, 0.75)
    for key, value in average.state_dict().items():
        torch.testing.assert_close(value, 0.75 * before[key] + 0.25 * after[key])
