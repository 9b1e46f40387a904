"""AdamW in a quarter of the memory: moments in float8, weights perhaps in bfloat16, all rounded stochastically.

A moment or a weight changes by less than half a digit of such a format in most steps, so that rounding to the nearest
would leave it where it is. Rounded up or down at random, in proportion, it goes where float32 would on average
(bfloat16 weights: arXiv 2010.06192; 8-bit moments with a scale for every block, here a row: arXiv 2110.02861).

The arithmetic of a step is float32. Vectors (biases, norms) keep float32 moments: they are few. `update` says what a
step is; on a GPU low_precision_kernel.py does it in one pass over memory.

Shapes: O rows of a weight, I all its other entries; a vector is one row.
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.training.sharding import local_part


class Format(NamedTuple):
    """A floating-point type: bits of its mantissa, the exponent from which on its digits shrink no further, its largest
    number."""

    mantissa: int
    smallest: int
    largest: float

    @property
    def digit(self) -> float:
        """The smallest one."""
        return 2.0 ** (self.smallest - self.mantissa)


E4M3 = Format(3, -6, 448.0)  # of the first moment: 18 octaves
E5M2 = Format(2, -14, 57344.0)  # of the second: 32 octaves, for it is squared
# bfloat16's own smallest exponent is lower, where a digit would be no normal float32.
BF16 = Format(7, -100, torch.finfo(torch.bfloat16).max)
FORMATS = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2, torch.bfloat16: BF16}
MOMENTS = {"exp_avg": torch.float8_e4m3fn, "exp_avg_sq": torch.float8_e5m2}


class Numbers(NamedTuple):
    """What a step is made with: the rate of the moment, AdamW's constants, the moments' corrections 1 − βᵗ, and
    `largest_step`."""

    rate: float
    decay: float
    beta1: float
    beta2: float
    eps: float
    correction1: float
    correction2: float
    largest: float

    @classmethod
    @lru_cache(maxsize=8)  # a step's are the same for a thousand parameters
    def of_step(cls, step: int, rate: float, decay: float, betas: tuple[float, float], eps: float) -> "Numbers":
        """`step` counts from 1."""
        corrections = (1 - beta**step for beta in betas)
        return cls(rate, decay, *betas, eps, *corrections, largest_step(*betas, step))


def largest_step(beta1: float, beta2: float, step: int) -> float:
    """The most, in learning rates, that AdamW can move a weight by whatever the gradients: no |m̂|/√v̂ is larger.

    By Cauchy and Schwarz √(Σ wᵢ²/uᵢ), where wᵢ and uᵢ are the shares that the i-th last gradient has in m̂ and v̂: 1 in
    the first step, 1.17 in the end for β = (.9, .95).
    """
    if beta1**2 >= beta2:
        return math.inf  # it grows with every step
    ratio = beta1**2 / beta2
    terms = (1 - ratio**step) / (1 - ratio)
    return (1 - beta1) / (1 - beta1**step) * ((1 - beta2**step) / (1 - beta2) * terms) ** 0.5


def round_stochastically(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 → one of the two neighbours in `dtype`, the nearer the likelier, so that the mean is the number itself.

    What is larger than the largest of `dtype` becomes that.
    """
    mantissa, smallest, largest = FORMATS[dtype]
    values = values.clamp(-largest, largest)
    octave = (values.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^e ≤ |value|; 0 below float32's own range
    digit = octave.clamp(min=2.0**smallest) * 2.0**-mantissa
    digits = values / digit
    below = digits.floor()
    return ((below + (torch.rand_like(values) < digits - below)) * digit).to(dtype)


def quantize(moment: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Float32 [O,I] → float8 [O,I] and float32 [O,1], whose product it is on average."""
    scale = moment.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / FORMATS[dtype].largest
    return round_stochastically(moment / scale, dtype), scale


def update(
    parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], numbers: Numbers, bounded: bool, seed: int
) -> None:
    """One step of AdamW (arXiv 1711.05101) in place.

    Args:
        state: of each moment in MOMENTS the codes and "NAME_scale"; of a vector's the moment itself.
        bounded: no row's step is larger, as a root mean square, than the rate. After StableAdamW (arXiv 2304.13013),
            which bounds whole tensors, and by the newest gradient alone: the step after an outlier has a small one.
        seed: the kernel's; here PyTorch's global generator draws.
    """
    weights, gradient = (rows(tensor).float() for tensor in (parameter, gradient))
    first = read_moment(state, "exp_avg").lerp(gradient, 1 - numbers.beta1)
    second = read_moment(state, "exp_avg_sq").lerp(gradient.square(), 1 - numbers.beta2)
    write_moment(state, "exp_avg", first)
    write_moment(state, "exp_avg_sq", second)
    variance = second / numbers.correction2
    step = first / numbers.correction1 / (variance.sqrt() + numbers.eps)
    # Where gradients are some 1e-5 of their row's largest, the second moment is often rounded to nothing.
    step = step.clamp(-numbers.largest, numbers.largest)
    rate = torch.full_like(weights[:, :1], numbers.rate)
    if bounded:
        ratio = (gradient.square() / variance.clamp(min=numbers.eps**2)).mean(dim=1, keepdim=True)
        rate /= ratio.maximum(step.square().mean(dim=1, keepdim=True)).sqrt().clamp(min=1)
    weights = weights * (1 - rate * numbers.decay) - rate * step
    if parameter.dtype != torch.float32:
        weights = round_stochastically(weights, parameter.dtype)
    rows(parameter).copy_(weights)


def rows(tensor: Tensor) -> Tensor:
    """[O,…] → [O,I], and a vector [I] → [1,I]; of the same memory."""
    return tensor.view(tensor.shape[0], -1) if tensor.ndim > 1 else tensor.view(1, -1)


def read_moment(state: dict[str, Tensor], name: str) -> Tensor:
    """Float32 [O,I]."""
    moment = rows(state[name]).float()
    return moment * state[f"{name}_scale"] if f"{name}_scale" in state else moment


def write_moment(state: dict[str, Tensor], name: str, moment: Tensor) -> None:
    if f"{name}_scale" in state:
        moment, scale = quantize(moment, MOMENTS[name])
        state[f"{name}_scale"].copy_(scale)
    rows(state[name]).copy_(moment)


class LowPrecisionAdamW(torch.optim.Optimizer):
    """AdamW over float32 or bfloat16 parameters, with two bytes of moments for each.

    What it rounds draws from the global generator: processes that hold the same parameters have to be seeded alike
    before each step.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        device = self.param_groups[0]["params"][0].device
        self._update = update
        if device.type == "cuda":
            from common.training.low_precision_kernel import update_on_gpu  # needs Triton, which PyTorch has with CUDA

            self._update = update_on_gpu
        self._square_sum = torch.zeros((), device=device)

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
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)

    def _step(self, parameter: nn.Parameter, group: dict[str, Any], bounded: bool = False) -> None:
        if not self.state[parameter]:
            self.state[parameter] = self.make_state(parameter)
        state = self.state[parameter]
        state["step"] += 1
        numbers = Numbers.of_step(
            int(state["step"]), float(group["lr"]), float(group["weight_decay"]), group["betas"], group["eps"]
        )
        # Of a sharded weight (FSDP2) whole rows are here: all that a step needs.
        weight, gradient = local_part(parameter.detach()), local_part(parameter.grad).contiguous()
        if not weight.numel():  # a weight of fewer rows than there are processes
            return
        moments = {name: local_part(value) for name, value in state.items() if name != "step"}
        self._update(weight, gradient, moments, numbers, bounded, int(torch.randint(2**31, ())))

    def step_in_backward(self) -> None:
        """From here on every parameter takes its step as soon as its gradient is there, which is then let go.

        So gradients take no memory to speak of. Their common norm is known only at the end, too late to clip by;
        instead the step of each of its rows is bounded (see `update`).
        """
        places = {p: index for index, group in enumerate(self.param_groups) for p in group["params"]}

        @torch.no_grad()
        def take_step(parameter: nn.Parameter) -> None:
            self._square_sum += torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()
            # By its place: loading a state puts other dicts there.
            self._step(parameter, self.param_groups[places[parameter]], bounded=True)
            parameter.grad = None

        for parameter in places:
            parameter.register_post_accumulate_grad_hook(take_step)

    def gradient_norm(self) -> Tensor:
        """Of all gradients since the last call, when steps are taken in the backward pass."""
        norm = self._square_sum.sqrt()
        self._square_sum = torch.zeros_like(self._square_sum)
        return norm
