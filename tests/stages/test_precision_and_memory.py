"""Settings that save memory, in the stages themselves: what is held in fewer bytes, kept for less time, or not kept."""

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file

from common.cogvideox.pipeline_io import load_component
from common.config.errors import UserError
from tests.stages.conftest import read_metrics
from tests.stages.test_gradient_checkpointing import MODEL, loss_and_gradients

pytestmark = pytest.mark.slow

LEAN = [
    "--optimizer",
    "adamw_8bit",
    "--trained_weights",
    "bfloat16",
    "--mixed_precision",
    "bf16",
    "--cuda_graph",
    "False",
]
BRIEF = ["--validation_steps", "0", "--num_validation_clips", "0", "--learning_rate", "1e-3"]


@pytest.fixture(autouse=True)
def any_precision(tiny_stages, monkeypatch):
    """accelerate would hold a process to the precision of its first run."""
    train = tiny_stages.train

    def train_anew(*arguments):
        AcceleratorState._reset_state()
        return train(*arguments)

    monkeypatch.setattr(tiny_stages, "train", train_anew)
    yield
    AcceleratorState._reset_state()


@pytest.mark.parametrize("in_backward", ["False", "True"])
def test_a_resumed_run_of_bfloat16_weights_equals_an_unbroken_one(tiny_stages, tmp_path, in_backward):
    """Its rounding too is a function of the step."""
    tiny_stages.run(2)
    words = [*LEAN, *BRIEF, "--step_in_backward", in_backward]
    whole = tiny_stages.train(3, tmp_path / "whole", *words)
    broken = tiny_stages.train(3, tmp_path / "broken", *words, "--max_train_steps", "3")
    tiny_stages.train(3, broken, *words)
    for name in ("weights", "optimizer"):
        expected, found = (load_file(d / "checkpoint-6" / f"{name}.safetensors") for d in (whole, broken))
        assert expected.keys() == found.keys()
        assert all(torch.equal(value.float(), found[key].float()) for key, value in expected.items())
    assert {value.dtype for value in load_file(whole / "checkpoint-6" / "weights.safetensors").values()} == {
        torch.bfloat16
    }
    logged = read_metrics(whole)
    assert all(0 < line["grad_norm"] < 1e3 for line in logged if "grad_norm" in line)
    # What is left behind is a model like any other, and not the one that it began with.
    transformer = load_component(whole, "transformer")
    before = load_component(tiny_stages.root / "stage2", "transformer").state_dict()
    assert any(not torch.equal(value, before[name].to(value.dtype)) for name, value in transformer.state_dict().items())


@pytest.mark.parametrize("stage", [1, 2, 4])
def test_every_stage_trains_with_bfloat16_weights_near_float32(tiny_stages, tmp_path, stage):
    if stage > 1:
        tiny_stages.run(stage - 1)
    few = [*BRIEF, "--max_train_steps", "3", "--cuda_graph", "False"]
    losses = [
        [
            line["loss"]
            for line in read_metrics(tiny_stages.train(stage, tmp_path / name, *words, *few))
            if "loss" in line
        ]
        for name, words in (("plain", []), ("lean", LEAN))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    if stage == 4:  # the average moves by less than a digit of bfloat16
        target = load_file(tmp_path / "lean" / "checkpoint-3" / "target.safetensors")
        assert {value.dtype for value in target.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--trained_weights", "bfloat16"], "trained_weights"),
        (["--trained_weights", "bfloat16", "--optimizer", "muon"], "trained_weights"),
        (["--trained_weights", "bfloat16", "--optimizer", "adamw_8bit", "--mixed_precision", "no"], "trained_weights"),
        (["--step_in_backward", "True"], "step_in_backward"),
        (["--step_in_backward", "True", "--optimizer", "adamw_8bit", "--gradient_accumulation_steps", "2"],
         "step_in_backward"),
        (["--optimizer", "adam8"], "optimizer"),
        (["--activation_budget", "1.5"], "activation_budget"),
        (["--activation_budget", "0.5"], "activation_budget"),
    ],
)  # fmt: skip
def test_what_cannot_go_together_is_refused(tiny_stages, tmp_path, words, name):
    with pytest.raises(UserError, match=name):
        tiny_stages.settings(3, tmp_path, "--cuda_graph", "False", *words)


def test_a_compiled_block_keeps_no_more_than_its_budget():
    """By the partitioner that every backend has its graphs from; here they run as they are."""
    kept, results = [], []
    for budget in (1.0, 0.5, 0.0):
        torch.compiler.reset()
        torch.manual_seed(0)
        transformer = CogVideoXTransformer3DModel(**MODEL)
        for block in transformer.transformer_blocks:
            block.compile(fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")
        parameters = {parameter.data_ptr() for parameter in transformer.parameters()}
        sizes: dict[int, int] = {}

        def note(tensor, parameters=parameters, sizes=sizes):
            if tensor.data_ptr() not in parameters:
                sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with (
            torch._functorch.config.patch(activation_memory_budget=budget),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            results.append(loss_and_gradients(transformer))
        kept.append(sum(sizes.values()))
    torch.compiler.reset()
    assert kept[2] < kept[1] < 0.8 * kept[0]
    for loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        for found, expected in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
