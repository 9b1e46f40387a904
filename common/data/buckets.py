"""Which clips make up the batch of a micro-step: a pure function of (seed, step).

Nothing is drawn from a generator and nothing is remembered, so a run that resumes at step k gets what an
unbroken run got, and the *global* batch depends on its size alone, not on how many processes share it: slot =
rank · batch + place. Two processes with batch 1 see, slot by slot, what one process with batch 2 sees.

Every bucket has its own endless stream of clips, one permutation of all clips after the other. Steps go round
the buckets in an order that is permuted anew each round. So each clip comes once per epoch of its bucket,
every bucket has the same share of the steps, and a batch never mixes shapes.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch.utils.data import Sampler

from common.config.errors import SettingError
from common.config.settings import VAE_TIME_FACTOR


def stable_hash(*key: int | str) -> int:
    """A 64-bit number from `key`, the same on every machine and in every process, which Python's `hash` is
    not."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def permuted(index: int, length: int, *key: int | str) -> int:
    """The image of `index` under a permutation of 0 … length−1 that `key` chooses, in constant time and
    memory.

    A Feistel network over the least even number of bits that hold `length`; what falls outside goes round
    again ("cycle walking"; Black & Rogaway 2002, Ciphers with Arbitrary Finite Domains). An array would cost
    8 MB per bucket and epoch for a million clips.
    """
    half = max((length - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_number in range(4):
            left, right = right, left ^ (stable_hash(*key, round_number, right) & mask)
        index = left << half | right
        if index < length:
            return index


@dataclass(frozen=True)
class Bucket:
    """The shape of a batch's clips, in raw frames and pixels."""

    num_frames: int
    height: int
    width: int

    @property
    def num_latent_frames(self) -> int:
        return (self.num_frames - 1) // VAE_TIME_FACTOR + 1

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"


def make_buckets(frames: Sequence[int], heights: Sequence[int], widths: Sequence[int]) -> list[Bucket]:
    """Every combination, in the order of the settings."""
    return [Bucket(n, h, w) for n in frames for h in heights for w in widths]


class SampleKey(NamedTuple):
    """What a data set needs to make one sample."""

    record: int  # place in the list of clips
    bucket: int  # place in the list of buckets
    draw: int  # how often this bucket has come to this clip before; chooses the window
    slot: int = 0  # place in the global batch


class BucketBatchSampler(Sampler[list[SampleKey]]):
    """This process's part of every micro-step's global batch, without end.

    Args:
        num_records, num_buckets: how many clips and buckets there are.
        batch_size: samples per process.
        world_size, rank: number of processes, and which one this is.
        seed: the run's seed.
        start_step: the MICRO-step to begin with (optimizer step × gradient_accumulation_steps).
        num_held_out: clips that the index has beside num_records, to be named when those are too few.
    """

    def __init__(
        self,
        num_records: int,
        num_buckets: int,
        batch_size: int,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        start_step: int = 0,
        num_held_out: int = 0,
    ):
        self.num_records, self.num_buckets = num_records, num_buckets
        self.batch_size, self.world_size, self.rank = batch_size, world_size, rank
        self.seed, self.start_step = seed, start_step
        if self.global_batch_size > num_records:
            held_out = f" beside {num_held_out} held out (num_validation_clips)" if num_held_out else ""
            raise SettingError(
                "train_batch_size",
                f"{batch_size} on {world_size} processes needs {self.global_batch_size} clips at a time, "
                f"the index has {num_records} for training{held_out}; lower it, use fewer processes, or add clips",
            )

    @property
    def global_batch_size(self) -> int:
        return self.world_size * self.batch_size

    def global_batch(self, step: int) -> list[SampleKey]:
        """All samples of micro-step `step`, in slot order."""
        round_number, place = divmod(step, self.num_buckets)
        bucket = permuted(place, self.num_buckets, self.seed, "bucket order", round_number)
        batch = []
        for slot in range(self.global_batch_size):
            epoch, position = divmod(round_number * self.global_batch_size + slot, self.num_records)
            record = permuted(position, self.num_records, self.seed, "clip order", bucket, epoch)
            batch.append(SampleKey(record, bucket, epoch, slot))
        return batch

    def local_batch(self, step: int) -> list[SampleKey]:
        """This process's samples of micro-step `step`."""
        return self.global_batch(step)[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]

    def __iter__(self) -> Iterator[list[SampleKey]]:
        step = self.start_step
        while True:
            yield self.local_batch(step)
            step += 1
