"""Random numbers that depend on (seed, step, sample) and on nothing else.

Every sample of a training step has a *slot*: its place among all samples of that optimizer step, over all processes and
accumulated micro-batches. What is drawn for it (timestep, noise, dropout) is a function of (seed, step, slot), so

* two processes with batch 1 draw what one process with batch 2 draws, and never the same noise twice;
* a resumed run draws what the unbroken run would have drawn: there is no generator state to save.

Shapes: B samples of this process's micro-batch; every draw has B first.
"""

import hashlib
import random as python_random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed from `key`, the same on every machine and Python version (`hash()` is neither)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(*key: int | str) -> None:
    """Seeds the global generators of torch (all devices), NumPy and Python from `key`.

    The trainer calls it once before models are built and then at every step: code of others that draws from a global
    generator (a dropout layer, say) is thereby as reproducible and resumable as our own draws.
    """
    seed = derive_seed("global", *key)
    python_random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class SampleRandom:
    """The draws of one micro-batch: one generator per sample.

    Args:
        seed: the run's seed.
        step: optimizer step.
        slots: B global places of the samples within the step.
        device: where the draws go. Small draws are made on the CPU: a GPU would need a launch for each sample. Normal
            numbers differ between device types, not between devices of one type.
    """

    def __init__(self, seed: int, step: int, slots: Sequence[int] | Tensor, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.slots, self.key = [int(slot) for slot in slots], (seed, step)
        seeds = [derive_seed("sample", seed, step, slot) for slot in self.slots]
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]
        self._normal_generators = self.generators
        if self.device.type != "cpu":
            self._normal_generators = [torch.Generator(self.device).manual_seed(s) for s in seeds]

    def __len__(self) -> int:
        return len(self.generators)

    def _per_sample(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([draw(generator) for generator in self.generators]).to(self.device, non_blocking=True)

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers [B, *shape]."""
        numbers = torch.empty((len(self), *shape), device=self.device, dtype=dtype)
        for row, generator in zip(numbers, self._normal_generators, strict=True):
            row.normal_(generator=generator)
        return numbers

    def shared_randint(self, low: int, high: int) -> int:
        """One number of low … high − 1 for the whole step: the same in every process."""
        return low + derive_seed("step", *self.key) % (high - low)

    def uniform(self, shape: Sequence[int] = ()) -> Tensor:
        """Float32 numbers of [0, 1), [B, *shape]."""
        return self._per_sample(lambda g: torch.rand(tuple(shape), generator=g))

    def randint(self, low: int, high: int, shape: Sequence[int] = ()) -> Tensor:
        """Int64 numbers of low … high − 1, [B, *shape]."""
        return self._per_sample(lambda g: torch.randint(low, high, tuple(shape), generator=g))

    def bernoulli(self, probability: float) -> Tensor:
        """Bool [B], True with `probability`. Draws a number even at 0 and 1, so that a setting moves no later draw."""
        return self.uniform() < probability
