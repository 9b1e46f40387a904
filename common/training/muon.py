"""Muon for weight matrices, AdamW for the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces a matrix's momentum by the nearest
semi-orthogonal matrix, so that every direction of the weight learns at the same pace. The mini base, trained from
scratch, gets to a given loss in about half as many steps as with AdamW. Fine-tuning for 200 steps of four samples goes
better with AdamW; whether longer fine-tuning does is arm "muon" of `data.miniworld.ablate`.

PyTorch's own `torch.optim.Muon` (2.9) takes plain matrices only, one after the other, and reads its rate on the host: a
step recorded as a CUDA graph could not change it. Here convolutions are matrices too, [out, all else], equal shapes go
through the iteration together, and the rate may be a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
MINIMUM_SIDE = 16  # smaller "matrices" (the RGB input and output of a VAE) are left to AdamW
RATE = 10  # times the learning rate: an orthogonal step of that size changes a weight about as fast as AdamW's does


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Nearly the polar factors U·Vᵀ of matrices [n, rows, columns] by Newton–Schulz steps; singular values end up in
    0.7…1.2."""
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def is_matrix(parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) >= MINIMUM_SIDE


class MuonAdamW(torch.optim.AdamW):
    """Muon on weights that are large matrices, PyTorch's AdamW on all others; one learning rate for both.

    Args:
        parameters: what is trained.
        options: AdamW's; its learning rate and weight decay also hold for the matrices.
    """

    def __init__(self, parameters: list[nn.Parameter], **options: Any):
        matrices = [p for p in parameters if is_matrix(p)]
        others = [p for p in parameters if not is_matrix(p)]
        groups = [{"params": others, "muon": False}, {"params": matrices, "muon": True}]
        super().__init__([group for group in groups if group["params"]], **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # AdamW's own completes the states of old files, and looks for a count of steps that matrices do not have.
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._muon_step(group)

    def _muon_step(self, group: dict[str, Any]) -> None:
        rate, decay = group["lr"], group["weight_decay"]
        alike: dict[tuple[int, int], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                alike.setdefault(tuple(parameter.flatten(1).shape), []).append(parameter)
        for (rows, columns), parameters in alike.items():
            gradients = torch.stack([parameter.grad.flatten(1) for parameter in parameters])
            kept = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in parameters]
            momentum = torch.stack([value.flatten(1) for value in kept]).lerp_(gradients, 1 - MOMENTUM)
            updates = orthogonalize(gradients.lerp(momentum, MOMENTUM))  # Nesterov
            updates = updates * (RATE * max(1.0, rows / columns) ** 0.5 * rate)
            for parameter, value, new, update in zip(parameters, kept, momentum, updates, strict=True):
                value.copy_(new.view_as(value))
                if decay:
                    parameter.mul_(1 - rate * decay)
                parameter.sub_(update.view_as(parameter))
