"""Draws depend on (seed, step, slot), on nothing else, and differ in each of them."""

import pytest
import torch

from common.training.random import SampleRandom, derive_seed, seed_everything


def test_slot_draws_the_same_in_any_batch():
    together, apart = SampleRandom(0, 3, [4, 5, 6]), [SampleRandom(0, 3, [slot]) for slot in (4, 5, 6)]
    for draw in (
        lambda r: r.normal((2, 3)), lambda r: r.randint(0, 1000), lambda r: r.uniform((2,)), lambda r: r.bernoulli(0.5),
    ):  # fmt: skip
        assert torch.equal(draw(together), torch.cat([draw(one) for one in apart]))


@pytest.mark.parametrize("other", [(1, 3, [4]), (0, 4, [4]), (0, 3, [5])], ids=["seed", "step", "slot"])
def test_another_seed_step_or_slot_draws_otherwise(other):
    assert not torch.equal(SampleRandom(0, 3, [4]).normal((8,)), SampleRandom(*other).normal((8,)))


def test_shared_number_is_the_steps_own():
    draws = [SampleRandom(0, step, [step % 3]).shared_randint(0, 3) for step in range(300)]
    assert draws == [SampleRandom(0, step, [7, 8]).shared_randint(0, 3) for step in range(300)]
    assert min(draws.count(value) for value in range(3)) > 60


def test_seed_is_the_same_on_every_machine():
    # Whoever changes this number changes what every resumed run draws.
    assert derive_seed("sample", 1, 2, 3) == 3_615_570_767_436_277_948


def test_distributions():
    rng = SampleRandom(0, 0, range(2000))
    noise = rng.normal((10,))
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    # Neighbouring slots are independent: the correlation of 2000 pairs has a standard deviation of .022.
    assert abs(torch.corrcoef(torch.stack([noise[:-1, 0], noise[1:, 0]]))[0, 1]) < 0.08
    steps = rng.randint(0, 10)
    assert steps.shape == (2000,) and steps.unique().tolist() == list(range(10))
    assert steps.bincount().min() > 150
    assert abs(rng.bernoulli(0.25).float().mean() - 0.25) < 0.04
    assert not rng.bernoulli(0.0).any() and rng.bernoulli(1.0).all()


def test_probability_moves_no_later_draw():
    rngs = [SampleRandom(0, 0, [0, 1]) for _ in range(2)]
    for rng, probability in zip(rngs, (0.0, 0.7), strict=True):
        rng.bernoulli(probability)
    assert torch.equal(rngs[0].normal((3,)), rngs[1].normal((3,)))


def test_global_generators_are_seeded():
    import random

    import numpy as np

    draws = []
    for _ in range(2):
        seed_everything(7, 1)
        draws.append((torch.rand(3).tolist(), np.random.rand(), random.random()))
    assert draws[0] == draws[1]
