"""Batches as a function of (seed, step)."""

import subprocess
import sys
from collections import Counter
from itertools import islice

import pytest

from common.config.errors import UserError
from common.data.buckets import Bucket, BucketBatchSampler, make_buckets, permuted, stable_hash


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 17, 100, 1000])
def test_permuted_is_a_permutation_that_the_key_chooses(length):
    image = [permuted(i, length, 0, "x") for i in range(length)]
    assert sorted(image) == list(range(length))
    if length >= 16:
        assert image != [permuted(i, length, 1, "x") for i in range(length)]


def test_permuted_leaves_no_clip_near_its_place():
    """A shuffle that keeps neighbours together would batch one drive's clips; true shuffles have a mean move of n/3."""
    length = 3000
    image = [permuted(i, length, 5) for i in range(length)]
    moved = sum(abs(a - i) for i, a in enumerate(image)) / length
    steps = sum(abs(a - b) for a, b in zip(image, image[1:], strict=False)) / length
    assert 0.9 < moved / (length / 3) < 1.1 and 0.9 < steps / (length / 3) < 1.1


def test_the_order_is_the_same_in_another_process():
    code = "from common.data.buckets import *\nprint(BucketBatchSampler(50, 2, 4, seed=3).global_batch(9))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other == f"{BucketBatchSampler(50, 2, 4, seed=3).global_batch(9)}\n"


def test_buckets_are_every_combination():
    assert make_buckets([17, 33], [480], [720, 480]) == [
        Bucket(17, 480, 720), Bucket(17, 480, 480), Bucket(33, 480, 720), Bucket(33, 480, 480),
    ]  # fmt: skip
    assert Bucket(33, 480, 720).num_latent_frames == 9 and str(Bucket(33, 480, 720)) == "33x480x720"


@pytest.mark.parametrize("num_records", [7, 24, 25])
def test_each_clip_comes_once_per_epoch_of_its_bucket(num_records):
    sampler = BucketBatchSampler(num_records, 3, 4)
    seen = Counter()
    for step in range(3 * num_records):  # num_records batches of 4 a bucket: 4 epochs
        batch = sampler.global_batch(step)
        assert len({key.bucket for key in batch}) == 1, "a batch mixes shapes"
        assert [key.slot for key in batch] == [0, 1, 2, 3]
        seen.update((key.bucket, key.record, key.draw) for key in batch)
    assert set(seen.values()) == {1}, "a clip came twice in an epoch"
    assert len(seen) == 3 * num_records * 4, "or not at all"


def test_buckets_take_turns():
    sampler = BucketBatchSampler(40, 3, 2)
    buckets = [sampler.global_batch(step)[0].bucket for step in range(300)]
    assert all(sorted(buckets[i : i + 3]) == [0, 1, 2] for i in range(0, 300, 3))
    assert len({tuple(buckets[i : i + 3]) for i in range(0, 300, 3)}) == 6, "always in the same order"


def test_processes_divide_the_global_batch_without_changing_it():
    whole = BucketBatchSampler(30, 2, 4, seed=1)
    for world_size, batch_size in ((2, 2), (4, 1)):
        parts = [BucketBatchSampler(30, 2, batch_size, world_size, rank, seed=1) for rank in range(world_size)]
        for step in range(20):
            joined = [key for part in parts for key in part.local_batch(step)]
            assert joined == whole.global_batch(step)


def test_resuming_anywhere_continues_the_same_sequence():
    run = list(islice(BucketBatchSampler(11, 2, 3, seed=5), 40))
    assert list(islice(BucketBatchSampler(11, 2, 3, seed=5, start_step=17), 23)) == run[17:]
    assert list(islice(BucketBatchSampler(11, 2, 3, seed=6), 40)) != run


def test_more_samples_than_clips_is_refused():
    with pytest.raises(
        UserError, match="train_batch_size: 3 on 4 processes needs 12 clips at a time, the index has 11"
    ):
        BucketBatchSampler(11, 1, 3, 4)
    BucketBatchSampler(12, 1, 3, 4)


def test_stable_hash_has_not_changed():
    """Runs made yesterday must resume tomorrow. The value is that of `printf "<the key's repr>" | b2sum -l 64`."""
    assert stable_hash("fixed window", "a.mp4@0", 33, 0, 4) == 3955645585286117935
