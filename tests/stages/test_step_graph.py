"""A recorded step works in fixed memory: on the CPU nothing is replayed, but the same tensors are used, and what comes
out has to equal a run without it, bit for bit."""

import pytest
import torch
from safetensors.torch import load_file

from common.config.errors import UserError
from common.tools.precompute import precompute
from common.training.random import SampleRandom
from common.training.step_graph import EAGER_STEPS, DrawTape
from tests.stages.conftest import read_metrics

STEPS = ["--max_train_steps", str(2 * EAGER_STEPS + 3), "--validation_steps", "0", "--logging_steps", "1"]
WINDOWS = ["--frame_buckets", "33", "--window_frames", "17", "33"]


@pytest.mark.parametrize(
    ("stage", "more"),
    [(1, []), (2, []), (3, WINDOWS), (4, WINDOWS), (4, [*WINDOWS, "--rank", "4"])],
    ids=["1", "2", "3", "4", "4 LoRA"],
)
def test_recorded_steps_train_what_plain_ones_do(tiny_stages, tmp_path, stage, more):
    if stage > 1:
        tiny_stages.run(stage - 1)
    cached = [*STEPS, *more, "--latent_cache_dir", str(tmp_path / "latents"), "--windows_per_clip", "1"]
    precompute(tiny_stages.settings(stage, tmp_path / "any", *cached))
    outputs = [
        tiny_stages.train(stage, tmp_path / name, *cached, *option)
        for name, option in (("plain", []), ("recorded", ["--cuda_graph"]))
    ]
    plain, recorded = ([m["loss"] for m in read_metrics(output) if "loss" in m] for output in outputs)
    assert plain == recorded and len(set(plain)) > EAGER_STEPS
    weights = [load_file(next(output.glob("checkpoint-*/weights.safetensors"))) for output in outputs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_tape_gives_what_the_generator_would():
    def draw(rng):
        return [rng.randint(0, 9), rng.normal((2, 3)), rng.bernoulli(0.5), rng.uniform()]

    tape = DrawTape(SampleRandom(0, 0, [0, 1]))
    first = draw(tape)
    places = [tensor.data_ptr() for tensor in first]
    assert all(map(torch.equal, first, draw(SampleRandom(0, 0, [0, 1]))))
    tape.rewind(SampleRandom(0, 1, [0, 1]))
    second = draw(tape)
    assert all(map(torch.equal, second, draw(SampleRandom(0, 1, [0, 1]))))
    assert [tensor.data_ptr() for tensor in second] == places


def test_a_step_that_draws_otherwise_is_noticed():
    tape = DrawTape(SampleRandom(0, 0, [0]))
    tape.normal((2,))
    tape.rewind(SampleRandom(0, 1, [0]))
    with pytest.raises(AssertionError, match="same in every step"):
        tape.normal((3,))


@pytest.mark.parametrize(
    "other",
    [["--gradient_checkpointing"], ["--gradient_checkpointing", "1"], ["--gradient_accumulation_steps", "2"], []],
)
def test_what_cannot_be_recorded_is_refused(tiny_stages, tmp_path, other):
    with pytest.raises(UserError, match="cuda_graph"):
        tiny_stages.settings(1, tmp_path, "--cuda_graph", *other)
