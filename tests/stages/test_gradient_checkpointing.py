"""Recomputing blocks changes no loss and no gradient, in any stage, and costs as many forwards as there are blocks."""

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from common.cogvideox.compilation import compile_blocks
from common.cogvideox.recomputation import recompute_blocks, recomputed_layers
from common.cogvideox.transformer import CogVideoXControlTransformer3DModel
from common.config.errors import UserError
from common.config.loader import load_settings
from common.training.random import SampleRandom
from tests.stages.conftest import ROOT, TINY, random_batch

B, F, C, H, W, LAYERS = 2, 9, 16, 4, 6, 4
# (setting, layers): pairs, since to a dict 1 and True are the same
FORMS = [(False, []), (0, []), (1, [2]), (2, [0, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (True, [0, 1, 2, 3])]
MODEL = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": LAYERS, "time_embed_dim": 16,
    "text_embed_dim": 24, "max_text_seq_length": 16, "sample_height": H, "sample_width": W, "sample_frames": 33,
}  # fmt: skip
CONTROL = {"control_dim": 12, "control_start_layer": 1, "control_end_layer": 4, "control_zero_init": False}


def count_forwards(transformer, counts: list[str]) -> None:
    """Has each block note its name at every forward."""
    for kind in ("transformer_blocks", "control_blocks"):
        for number, block in enumerate(getattr(transformer, kind, None) or ()):
            block.register_forward_pre_hook(lambda *_, name=f"{kind}.{number}": counts.append(name))


def loss_and_gradients(transformer) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    more = {}
    if isinstance(transformer, CogVideoXControlTransformer3DModel):
        more = {"control_embeds": torch.randn(B, F, 12, generator=generator)}
    output = transformer(
        hidden_states=torch.randn(B, F, C, H, W, generator=generator),
        encoder_hidden_states=torch.randn(B, 16, 24, generator=generator),
        timestep=torch.tensor([900, 100]),
        return_dict=False,
        **more,
    )[0]
    loss = output.square().mean()
    loss.backward()
    return loss.detach(), [p.grad for p in transformer.parameters()]


@pytest.mark.parametrize(("wanted", "layers"), FORMS, ids=[str(wanted) for wanted, _ in FORMS])
def test_so_many_blocks_are_recomputed_and_no_more(wanted, layers):
    """And the same numbers come out, to the last bit. A block's control block does as the block does."""
    results = []
    for kind, config in ((CogVideoXTransformer3DModel, {}), (CogVideoXControlTransformer3DModel, CONTROL)):
        for form in (None, wanted):
            torch.manual_seed(0)
            transformer = kind(**MODEL, **config)
            if form is not None:
                recompute_blocks(transformer, form)
            counts = []
            count_forwards(transformer, counts)
            results.append((*loss_and_gradients(transformer), counts))
        (loss, gradients, plain), (other_loss, other_gradients, counts) = results[-2:]
        assert torch.equal(loss, other_loss) and all(map(torch.equal, gradients, other_gradients))
        blocks = [f"transformer_blocks.{layer}" for layer in range(LAYERS)]
        control = [f"control_blocks.{n}" for n in range(3)] if config else []
        assert sorted(plain) == sorted(blocks + control)
        again = [blocks[layer] for layer in layers]
        again += [f"control_blocks.{layer - 1}" for layer in layers if config and layer >= 1]
        assert sorted(counts) == sorted(plain + again)


def test_without_gradient_nothing_is_kept_or_recomputed():
    """So run a teacher, an average, and every sample video."""
    transformer, counts = CogVideoXTransformer3DModel(**MODEL), []
    recompute_blocks(transformer, True)
    transformer._gradient_checkpointing_func = lambda *_: pytest.fail("called without need")
    count_forwards(transformer, counts)
    with torch.no_grad():
        transformer(torch.zeros(1, F, C, H, W), torch.zeros(1, 16, 24), torch.tensor([5]))
    assert len(counts) == LAYERS


def test_compiled_blocks_recompute_too(traced):
    results, counts = [], []
    for wanted in (False, 2):
        torch.manual_seed(0)
        transformer = CogVideoXControlTransformer3DModel(**MODEL, **CONTROL)
        recompute_blocks(transformer, wanted)
        compile_blocks(transformer)
        checkpoint = transformer._gradient_checkpointing_func
        transformer._gradient_checkpointing_func = lambda *a, run=checkpoint: counts.append(a[0]) or run(*a)
        results.append(loss_and_gradients(transformer))
    (loss, gradients), (other_loss, other_gradients) = results
    assert len(counts) == LAYERS + 3  # all pass through it, which decides
    torch.testing.assert_close(loss, other_loss)
    torch.testing.assert_close(gradients, other_gradients)


def test_they_are_spread_evenly_and_leave_the_last_one_alone():
    for count in range(31):
        layers = recomputed_layers(30, count)
        assert len(layers) == count and (29 in layers) == (count == 30)
        gaps = {b - a for a, b in zip(layers, layers[1:], strict=False)}
        assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_every_stage_learns_the_same(stage, tiny_base, tiny_models):
    base = tiny_base if stage < 3 else tiny_models / f"stage{stage - 1}"
    words = [*TINY.split(), "--width_buckets", "48", "--pretrained_model_name_or_path", str(base)]
    words += {
        1: ["--rank", "4"],
        2: ["--control_dim", "12", "--control_start_layer", "1", "--control_end_layer", "4"],
    }.get(stage, [])
    settings = load_settings(ROOT / f"stage{stage}" / "training" / "miniworld_config.py", words)
    batch = random_batch(B, F, C, H, W)
    results = []
    for wanted in (False, 2, True):
        objective = settings.build_objective()
        torch.manual_seed(0)
        objective.load(torch.device("cpu"), torch.float32)
        recompute_blocks(objective.module, wanted)
        counts = []
        count_forwards(objective.module, counts)
        loss, _ = objective.loss(batch, SampleRandom(0, 0, range(B)))
        forwards = len(counts)
        loss.backward()
        gradients = {n: p.grad for n, p in objective.module.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients, len(counts) - forwards))
    (plain, expected, none), *others = results
    assert none == 0 and 0 < others[0][2] < others[1][2]
    for loss, gradients, _ in others:
        assert torch.equal(loss, plain) and gradients.keys() == expected.keys() and gradients
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_more_blocks_than_there_are_is_refused_before_weights_are_read(tiny_base):
    words = [*TINY.split(), "--pretrained_model_name_or_path", tiny_base, "--gradient_checkpointing"]
    config = ROOT / "stage1" / "training" / "miniworld_config.py"
    load_settings(config, [*words, "4"]).build_objective().describe()
    with pytest.raises(UserError, match="gradient_checkpointing: is 5; the model has 4 blocks, True is all"):
        load_settings(config, [*words, "5"]).build_objective().describe()


def test_one_is_a_number_of_blocks_and_a_bare_word_is_all():
    config = ROOT / "stage1" / "training" / "miniworld_config.py"
    for words, value in ((["1"], 1), (["0"], 0), ([], True), (["True"], True), (["false"], False), (["12"], 12)):
        found = load_settings(config, ["--gradient_checkpointing", *words]).gradient_checkpointing
        assert found == value and type(found) is type(value)
