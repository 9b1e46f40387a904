"""Exponential moving average of a module's weights."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def update_ema(average: nn.Module, module: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 − decay) · module, for every parameter of `module` that is trained.

    The two name their parameters alike, `average` in float32. Both are whole, or sharded alike (FSDP2): then every
    process averages the shards that it holds.
    """
    averages = dict(average.named_parameters())
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            mine, theirs = _local_part(averages[name]), _local_part(parameter)
            assert mine.shape == theirs.shape, f"{name} is sharded in one of the two alone"
            mine.lerp_(theirs.to(mine.dtype), 1.0 - decay)


def _local_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
