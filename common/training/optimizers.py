"""The optimizer, the course of its learning rate, and their state in a form that any number of processes can load."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from common.training.low_precision_adamw import LowPrecisionAdamW
from common.training.muon import MuonAdamW

# Courses whose value at a step does not depend on where the run ends, so that a run may be prolonged.
ENDLESS_SCHEDULES = ("constant", "constant_with_warmup")


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter of all that is trained."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert parameters, "no parameter of the objective's module requires a gradient"
    return parameters


def build_optimizer(settings: Any, module: nn.Module, learning_rate: Callable[[str], float]) -> torch.optim.Optimizer:
    """AdamW or Muon over every trained parameter, with the settings' decoupled weight decay on all of them.

    Args:
        learning_rate: name → peak rate of a parameter; Muon has one for all.
    """
    named = trained_parameters(module)
    for name, parameter in named.items():  # AdamW would round most small updates of bfloat16 weights away
        rounds = settings.optimizer == "adamw_8bit" and parameter.dtype == torch.bfloat16
        assert rounds or parameter.dtype == torch.float32, f"{name} is trained in {parameter.dtype}; cast it to float32"
    by_rate: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        by_rate.setdefault(learning_rate(name), []).append(parameter)
    assert len(by_rate) == 1 or settings.optimizer != "muon"
    groups = [{"params": parameters, "lr": rate} for rate, parameters in by_rate.items()]
    if settings.optimizer == "adamw_8bit":
        betas = settings.adam_beta1, settings.adam_beta2
        optimizer = LowPrecisionAdamW(
            groups, settings.learning_rate, betas, settings.adam_epsilon, settings.weight_decay
        )
        if settings.step_in_backward:
            optimizer.step_in_backward()
        return optimizer
    device = groups[0]["params"][0].device
    recorded = settings.cuda_graph and device.type == "cuda"
    if recorded:  # a recorded step reads the rate of the moment from the device
        groups = [{**group, "lr": torch.tensor(group["lr"], device=device)} for group in groups]
    kind, parameters = torch.optim.AdamW, groups
    if settings.optimizer == "muon":
        kind, parameters = MuonAdamW, groups[0]["params"]
    return kind(
        parameters,
        lr=groups[0]["lr"],
        capturable=recorded,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def build_lr_scheduler(settings: Any, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """diffusers' schedule, counted in optimizer steps of the whole run whatever the number of processes."""
    return get_scheduler(
        settings.lr_scheduler,
        optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.max_train_steps,
    )


def restore_lr_scheduler(
    scheduler: torch.optim.lr_scheduler.LambdaLR, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Puts schedule and optimizer where they are after `step` steps. The rate is a function of the step alone."""
    rates = [base * rate(step) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler.load_state_dict(
        {**scheduler.state_dict(), "last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    )
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor in one piece where it is; of a sharded one (FSDP2) all processes have to ask together."""
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.dtype.itemsize > 1:
        return tensor.full_tensor()
    # float8 travels as bytes: gloo knows no such numbers
    return _view(tensor, torch.uint8).full_tensor().view(tensor.dtype)


def _view(tensor: DTensor, dtype: torch.dtype) -> DTensor:
    """The same bytes as numbers of another type of the same size."""
    part, mesh, placements = tensor.to_local().view(dtype), tensor.device_mesh, tensor.placements
    return DTensor.from_local(part, mesh, placements, shape=tensor.shape, stride=tensor.stride())


def gather_tensors(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, gathered one by one. All processes call it; those without `keep` get nothing, so that
    one host holds one copy."""
    gathered = {}
    for name, tensor in tensors.items():
        whole = whole_tensor(tensor.detach())
        if keep:
            gathered[name] = whole.cpu().contiguous()
    return gathered


def like_parameter(value: Tensor, parameter: Tensor) -> Tensor:
    """`value`, whole, placed and sharded as `parameter` is."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return value
    if value.dtype.itemsize > 1:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    placed = distribute_tensor(value.view(torch.uint8), parameter.device_mesh, parameter.placements)
    return _view(placed, value.dtype)


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The moments of every parameter: "exp_avg:NAME", "exp_avg_sq:NAME", "step:NAME", or Muon's "momentum:NAME".

    Rates and decays are not in it: they follow from the settings and the step.
    """
    return {
        f"{key}:{name}": torch.as_tensor(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], state: dict[str, Tensor]
) -> None:
    """The inverse of `optimizer_state`."""
    for full_key, value in state.items():
        key, name = full_key.split(":", 1)
        parameter = parameters[name]
        if value.dim():
            placed = like_parameter(value, parameter)
        else:  # "step", a number that is on the CPU but for PyTorch's fused optimizers; no shard has a part of it
            placed = value.to(parameter.device if optimizer.defaults.get("fused") else "cpu")
        optimizer.state[parameter][key] = placed
