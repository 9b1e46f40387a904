"""Exponential moving average of a module's weights."""

import torch
from torch import nn

from common.training.optimizers import whole_tensor


@torch.no_grad()
def update_ema(average: nn.Module, module: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 − decay) · module, for every parameter of `module` that is trained.

    The two name their parameters alike. `average` is whole on every process, in float32; a sharded `module` (FSDP2) is
    gathered one parameter at a time, so all processes call this together.
    """
    averages = dict(average.named_parameters())
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            average_weight = averages[name]
            average_weight.lerp_(whole_tensor(parameter).to(average_weight.dtype), 1.0 - decay)
