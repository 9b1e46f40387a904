"""A training step as a CUDA graph, for models so small that launching their kernels takes longer than running them.

The first steps of a kind run as they are; then one is recorded, and from there on replayed with new numbers in the same
memory. So all that differs between steps has to lie in tensors: the batch, the draws (`DrawTape`), the learning rate.

Shapes: B samples of a step; every draw has B first.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.training.random import SampleRandom

EAGER_STEPS = 3  # of each kind before it is recorded: compiling, cuDNN's search, the optimizer's first state

Step = Callable[[dict[str, Any], Any], Any]


class DrawTape:
    """Stands in for `SampleRandom`: gives the draws of a step from tensors that stay where they are.

    While it is being made every draw is taken from `rng` and its tensor kept; afterwards `rewind` puts a further step's
    numbers, drawn in the same order, into the same tensors.
    """

    def __init__(self, rng: SampleRandom | None):
        self.rng = rng
        self.tensors: list[Tensor] = []
        self.calls: list[tuple[str, tuple]] = []
        self.shared_calls: list[tuple[int, int]] = []
        self.position: int | None = None  # None while the tape is being made

    def __len__(self) -> int:
        return len(self.rng)

    def rewind(self, rng: SampleRandom | None) -> None:
        """Draws what the tape holds anew, from `rng`."""
        self.rng, self.position = rng, 0
        for tensor, (name, arguments) in zip(self.tensors, self.calls, strict=True):
            tensor.copy_(getattr(rng, name)(*arguments), non_blocking=True)

    def _draw(self, name: str, *arguments: Any) -> Tensor:
        if self.position is None:
            self.calls.append((name, arguments))
            self.tensors.append(getattr(self.rng, name)(*arguments))
            return self.tensors[-1]
        assert self.calls[self.position] == (name, arguments), "a step's draws have to be the same in every step"
        self.position += 1
        return self.tensors[self.position - 1]

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return self._draw("normal", tuple(shape), dtype)

    def uniform(self, shape: Sequence[int] = ()) -> Tensor:
        return self._draw("uniform", tuple(shape))

    def randint(self, low: int, high: int, shape: Sequence[int] = ()) -> Tensor:
        return self._draw("randint", low, high, tuple(shape))

    def bernoulli(self, probability: float) -> Tensor:
        return self._draw("bernoulli", probability)

    def shared_randint(self, low: int, high: int) -> int:
        """A number and not a tensor: another one makes another kind of step."""
        if self.position is None:
            self.shared_calls.append((low, high))
        return self.rng.shared_randint(low, high)


class Recording(NamedTuple):
    inputs: dict[str, Any]
    tape: DrawTape
    graph: torch.cuda.CUDAGraph | None  # None on a CPU, where the step is called instead
    outputs: Any


class StepGraph:
    """`step(batch, rng)`, recorded for every kind of step: tensors' shapes, and what is drawn for all samples alike.

    Args:
        step: the whole step, up to the changed weights. What it does besides working on tensors happens only while its
            kind is new; what it returns is overwritten by the next step of its kind. A step that draws nothing may be
            called without `rng`.
        device: a GPU; on a CPU nothing is recorded, but the step works on the same fixed tensors (so tests can tell).
    """

    def __init__(self, step: Step, device: torch.device):
        self.step, self.device = step, device
        self.shared_calls: list[tuple[int, int]] = []  # arguments of `shared_randint`, as the first step made them
        self.eager: dict[tuple, tuple[int, DrawTape | None]] = {}  # steps so far and the last one's draws
        self.recordings: dict[tuple, Recording] = {}

    def __call__(self, batch: dict[str, Any], rng: SampleRandom | None = None) -> Any:
        shapes = tuple((name, value.shape) for name, value in batch.items() if isinstance(value, Tensor))
        kind = (*shapes, *(rng.shared_randint(*call) for call in self.shared_calls))
        steps, tape = self.eager.get(kind, (0, None))
        if steps < EAGER_STEPS:
            tape = DrawTape(rng)
            outputs = self._eager(batch, tape)
            self.eager[kind], self.shared_calls = (steps + 1, tape), tape.shared_calls
            return outputs
        if kind not in self.recordings:
            self.recordings[kind] = self._record(batch, tape)
        recording = self.recordings[kind]
        for name, value in recording.inputs.items():
            if isinstance(value, Tensor):
                value.copy_(batch[name], non_blocking=True)
        recording.tape.rewind(rng)
        if recording.graph is None:
            return self.step(recording.inputs, recording.tape)
        recording.graph.replay()
        return recording.outputs

    def _eager(self, batch: dict[str, Any], tape: DrawTape) -> Any:
        """The step as it is, in a stream of its own: what it sets up is then fit for recording."""
        if self.device.type != "cuda":
            return self.step(batch, tape)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = self.step(batch, tape)
        torch.cuda.current_stream().wait_stream(stream)
        return outputs

    def _record(self, batch: dict[str, Any], tape: DrawTape) -> Recording:
        inputs = {n: v.to(self.device, copy=True) if isinstance(v, Tensor) else v for n, v in batch.items()}
        tape.position = 0
        if self.device.type != "cuda":
            return Recording(inputs, tape, None, None)
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: the loader's thread, which pins memory, goes on meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = self.step(inputs, tape)
        return Recording(inputs, tape, graph, outputs)
