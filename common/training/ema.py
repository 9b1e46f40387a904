"""Exponential moving average of a module's weights."""

from typing import Any

import torch
from torch import nn

from common.training.sharding import local_part


@torch.no_grad()
def update_ema(average: Any, module: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 − decay) · module, for every parameter of `module` that is trained.

    The two have `named_parameters` of the same names, `average` in float32. Both are whole, or sharded alike (FSDP2):
    then every process averages the shards that it holds.
    """
    averages = dict(average.named_parameters())
    means, weights = [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        mean, weight = local_part(averages[name]), local_part(parameter)
        assert mean.shape == weight.shape, f"{name} is sharded in one of the two alone"
        if mean.dtype == weight.dtype:
            means.append(mean)
            weights.append(weight)
        else:  # by itself: a converted copy of all weights would take as much memory as the average
            mean.lerp_(weight.to(mean.dtype), 1.0 - decay)
    if means:  # together: a few kernels instead of one for each of some thousand parameters
        torch._foreach_lerp_(means, weights, 1.0 - decay)
