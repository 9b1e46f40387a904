"""AdamW in a quarter of the memory: moments in float8, weights perhaps in bfloat16, all rounded stochastically.

A moment or a weight changes by less than half a digit of such a format in most steps, so that rounding to the nearest
would leave it where it is. Rounded up or down at random, in proportion, it goes where float32 would on average
(bfloat16 weights: arXiv 2010.06192; 8-bit moments with a scale for every block, here a row: arXiv 2110.02861).

The arithmetic of a step is float32. Vectors (biases, norms) keep float32 moments: they are few.

Shapes: O rows of a weight, I all its other entries.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from common.cogvideox.compilation import allow_many_kinds
from common.training.sharding import local_part

# Type → bits of its mantissa, its smallest normal exponent, its largest number.
FORMATS = {
    torch.float8_e4m3fn: (3, -6, 448.0),  # of the first moment: 18 octaves
    torch.float8_e5m2: (2, -14, 57344.0),  # of the second: 32 octaves, for it is squared
    torch.bfloat16: (7, -100, None),  # its own smallest is lower, where a digit would be no normal float32
}
MOMENTS = {"exp_avg": torch.float8_e4m3fn, "exp_avg_sq": torch.float8_e5m2}
MOST_TOGETHER = 16  # parameters of one shape in one compiled call: a call each would keep the GPU waiting


def round_stochastically(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 → one of the two neighbours in `dtype`, the nearer the likelier, so that the mean is the number itself.

    For numbers no larger than the largest of `dtype`.
    """
    mantissa, smallest, _ = FORMATS[dtype]
    octave = (values.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^e ≤ |value|; 0 below float32's own range
    digit = octave.clamp(min=2.0**smallest) * 2.0**-mantissa
    digits = values / digit
    below = digits.floor()
    return ((below + (torch.rand_like(values) < digits - below)) * digit).to(dtype)


def quantize(moment: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Float32 [O,I] → float8 [O,I] and float32 [O,1], whose product it is on average."""
    scale = moment.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / FORMATS[dtype][2]
    return round_stochastically(moment / scale, dtype), scale


def update(
    parameters: list[Tensor],
    gradients: list[Tensor],
    states: list[dict[str, Tensor]],
    numbers: Tensor,
    betas: tuple[float, float],
    eps: float,
    bounded: bool,
) -> None:
    """One step of AdamW (arXiv 1711.05101) in place.

    Args:
        numbers: rate, decay of the weights, and the two moments' bias corrections 1 − βᵗ.
        bounded: no parameter's step is larger, as a root mean square, than the rate (StableAdamW, arXiv 2304.13013).
    """
    rate, decay, correction1, correction2 = numbers.unbind()
    for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
        gradient = gradient.float()
        first = read_moment(state, "exp_avg").lerp(gradient, 1 - betas[0])
        second = read_moment(state, "exp_avg_sq").lerp(gradient.square(), 1 - betas[1])
        write_moment(state, "exp_avg", first)
        write_moment(state, "exp_avg_sq", second)
        variance = second / correction2
        step = rate
        if bounded:
            rms = (gradient.square() / variance.clamp(min=eps**2)).mean().sqrt()
            step = rate / rms.clamp(min=1)
        weights = parameter.float() * (1 - step * decay) - step * (first / correction1) / (variance.sqrt() + eps)
        rounded = weights if parameter.dtype == torch.float32 else round_stochastically(weights, parameter.dtype)
        parameter.copy_(rounded)


def read_moment(state: dict[str, Tensor], name: str) -> Tensor:
    """A moment in float32 and the parameter's shape."""
    if f"{name}_scale" not in state:
        return state[name]
    codes = state[name]
    return (codes.flatten(1).float() * state[f"{name}_scale"]).view(codes.shape)


def write_moment(state: dict[str, Tensor], name: str, moment: Tensor) -> None:
    if f"{name}_scale" not in state:
        state[name].copy_(moment)
        return
    codes, scale = quantize(moment.flatten(1), MOMENTS[name])
    state[name].copy_(codes.view(moment.shape))
    state[f"{name}_scale"].copy_(scale)


class LowPrecisionAdamW(torch.optim.Optimizer):
    """AdamW over float32 or bfloat16 parameters, with two bytes of moments for each.

    On a GPU its arithmetic is compiled. What it rounds draws from the global generator: processes that hold the same
    parameters have to be seeded alike before each step.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.device = self.param_groups[0]["params"][0].device
        self._update = update
        if self.device.type == "cuda":
            allow_many_kinds()  # two for a shape
            self._update = torch.compile(update, fullgraph=True, dynamic=False)
        self._numbers: tuple[tuple, Tensor] | None = None
        self._square_sum = torch.zeros((), device=self.device)

    def make_state(self, parameter: nn.Parameter) -> dict[str, Any]:
        """A parameter's state before its first step."""
        state: dict[str, Any] = {"step": torch.tensor(0.0)}
        for name, dtype in MOMENTS.items():
            quantized = parameter.ndim > 1
            state[name] = torch.zeros_like(parameter.detach(), dtype=dtype if quantized else torch.float32)
            if quantized:
                state[f"{name}_scale"] = torch.zeros_like(parameter.detach().flatten(1)[:, :1], dtype=torch.float32)
        return state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Parameters of one shape are taken together, up to MOST_TOGETHER of them in a call."""
        for group in self.param_groups:
            alike: dict[tuple, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault((parameter.shape, parameter.dtype), []).append(parameter)
            for parameters in alike.values():
                for part in split_evenly(parameters):
                    self._step(part, group)

    def _step(self, parameters: list[nn.Parameter], group: dict[str, Any], bounded: bool = False) -> None:
        states = []
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = self.make_state(parameter)
            self.state[parameter]["step"] += 1
            # Of a sharded weight (FSDP2) these are whole rows: all that a step needs.
            states.append({k: local_part(v) for k, v in self.state[parameter].items() if k != "step"})
        step, (beta1, beta2) = self.state[parameters[0]]["step"].item(), group["betas"]
        numbers = float(group["lr"]), group["weight_decay"], 1 - beta1**step, 1 - beta2**step
        if self._numbers is None or self._numbers[0] != numbers:  # a tensor: numbers would be compiled anew every step
            self._numbers = numbers, torch.tensor(numbers).to(self.device, non_blocking=True)
        weights, gradients = (
            [local_part(tensor) for tensor in tensors]
            for tensors in ([p.detach() for p in parameters], [p.grad for p in parameters])
        )
        self._update(weights, gradients, states, self._numbers[1], group["betas"], group["eps"], bounded)

    def step_in_backward(self) -> None:
        """From here on every parameter takes its step as soon as its gradient is there, which is then let go.

        So gradients take no memory to speak of. Their common norm is known only at the end, too late to clip by;
        instead each parameter's step is bounded (see `update`).
        """
        places = {p: index for index, group in enumerate(self.param_groups) for p in group["params"]}

        @torch.no_grad()
        def take_step(parameter: nn.Parameter) -> None:
            self._square_sum += torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()
            # By its place: loading a state puts other dicts there.
            self._step([parameter], self.param_groups[places[parameter]], bounded=True)
            parameter.grad = None

        for parameter in places:
            parameter.register_post_accumulate_grad_hook(take_step)

    def gradient_norm(self) -> Tensor:
        """Of all gradients since the last call, when steps are taken in the backward pass."""
        norm = self._square_sum.sqrt()
        self._square_sum = torch.zeros_like(self._square_sum)
        return norm


def split_evenly(items: list[Any]) -> list[list[Any]]:
    """Parts of at most MOST_TOGETHER, of two sizes at most: every size is compiled once."""
    count = math.ceil(len(items) / MOST_TOGETHER)
    size, more = divmod(len(items), count)
    ends = [size * part + min(part, more) for part in range(count + 1)]
    return [items[start:end] for start, end in zip(ends, ends[1:], strict=False)]
