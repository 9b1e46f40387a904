"""Stage 4 with a LoRA as student: three roles over one base, each computes what a model of its own would."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard

from common.cogvideox.pipeline_io import load_component
from common.cogvideox.recomputation import recompute_blocks
from common.cogvideox.transformer import all_blocks
from common.config.errors import UserError
from common.training.checkpoints import base_digest
from common.training.encoding import EncodedBatch
from common.training.export import export_pipeline
from common.training.lora import lora_layers
from common.training.optimizers import whole_tensor
from common.training.random import SampleRandom
from tests.stages.conftest import load_objective, make_objective, random_batch, read_metrics

B, F, C, H, W = 2, 9, 16, 4, 8
RANK, DECAY = 4, 0.75
LORA = ["--rank", str(RANK), "--lora_alpha", "2", "--ema_decay", str(DECAY)]


@pytest.fixture
def base(tiny_models):
    return tiny_models / "stage3"


@pytest.fixture
def batch() -> EncodedBatch:
    return random_batch(B, F, C, H, W)


def load(base, *overrides: str, dtype: torch.dtype = torch.float32):
    return load_objective(4, base, *LORA, *overrides, dtype=dtype)


def factors(objective, adapter: str) -> dict[str, torch.Tensor]:
    found = {n: p.detach().clone() for n, p in objective.module.named_parameters() if f".{adapter}." in n}
    assert found
    return {name.replace(f".{adapter}.", "."): factor for name, factor in found.items()}


def draw_factors(objective, adapter: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in objective.module.named_parameters():
            if f".{adapter}." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@torch.no_grad()
def output_of(objective, role, batch: EncodedBatch) -> torch.Tensor:
    timesteps = torch.tensor([900, 100])
    rows = objective.vocabulary.frame_rows(batch.control_indices)
    return objective.predict(role, batch.latents, timesteps, batch.prompt_embeds, rows)


def train(objective, batch: EncodedBatch, steps: int) -> list[dict[str, torch.Tensor]]:
    """SGD as the trainer does it; → the student's factors after each step."""
    trained = [p for p in objective.module.parameters() if p.requires_grad]
    optimizer, course = torch.optim.SGD(trained, lr=1.0), []
    for step in range(steps):
        objective.loss(batch, SampleRandom(0, step, range(B)))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_optimizer_step(step + 1)
        course.append(factors(objective, "student"))
    return course


def test_all_three_begin_as_the_base(base, batch):
    objective = load(base)
    expected = output_of(objective, load_component(base, "transformer"), batch)
    for role in (objective.module, objective.target, objective.teacher):
        assert torch.equal(output_of(objective, role, batch), expected)


def test_the_student_learns_the_target_follows_and_the_teacher_stays(base, batch):
    objective = load(base)
    expected = output_of(objective, objective.teacher, batch)
    average = {name: factor.double() for name, factor in factors(objective, "student").items()}
    for student in train(objective, batch, 3):
        average = {name: DECAY * average[name] + (1 - DECAY) * student[name].double() for name in average}
    for name, factor in factors(objective, "target").items():
        torch.testing.assert_close(factor.double(), average[name], rtol=1e-6, atol=1e-8)
    assert torch.equal(output_of(objective, objective.teacher, batch), expected)
    student, target = (output_of(objective, role, batch) for role in (objective.module, objective.target))
    assert 0 < (target - expected).norm() < (student - expected).norm()
    assert [name for name, p in objective.module.named_parameters() if p.requires_grad] == [
        name for name, _ in objective.module.named_parameters() if ".student." in name
    ]


def test_each_role_has_its_own_factors(base, batch):
    """Against the weights with alpha/rank · B·A added, in a model without adapters."""
    objective = load(base)
    for seed, (adapter, role) in enumerate((("student", objective.module), ("target", objective.target))):
        draw_factors(objective, adapter, seed)
        whole, drawn = load_component(base, "transformer"), factors(objective, adapter)
        with torch.no_grad():
            for name in lora_layers(objective.module):
                a, b = (drawn[f"{name}.lora_{factor}.weight"] for factor in "AB")
                whole.get_submodule(name).weight += 2 / RANK * b @ a
        torch.testing.assert_close(output_of(objective, role, batch), output_of(objective, whole, batch))
    assert torch.equal(
        output_of(objective, objective.teacher, batch),
        output_of(objective, load_component(base, "transformer"), batch),
    )


def gradients(base, batch: EncodedBatch, recomputed: int | bool, compiled: bool = False):
    """→ the objective and the student's gradients, by name. The target runs between forward and backward."""
    objective = load(base)
    draw_factors(objective, "student", 0)
    recompute_blocks(objective.module, recomputed)
    if compiled:
        objective.compile()
    loss, _ = objective.loss(batch, SampleRandom(0, 0, range(B)))
    output_of(objective, objective.target, batch)
    loss.backward()
    return objective, {n: p.grad for n, p in objective.module.named_parameters() if p.grad is not None}


def test_the_backward_recomputes_the_student_whatever_role_was_last(base, batch):
    (_, plain), (_, recomputed) = (gradients(base, batch, wanted) for wanted in (False, True))
    assert plain.keys() == recomputed.keys() and all(".student." in name for name in plain)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # returns a view: true, and nothing changes it in place
def test_a_sharded_base_serves_all_three_too(base, batch, one_process_group):
    """FSDP2 gathers a block's weights for whatever role is in place."""
    courses = []
    for sharded in (False, True):
        objective = load(base)
        for block in all_blocks(objective.module) if sharded else ():
            fully_shard(block)
        if sharded:
            fully_shard(objective.module)
        train(objective, batch, 2)
        courses.append(
            {
                f"{role} {name}": whole_tensor(f)
                for role in ("student", "target")
                for name, f in factors(objective, role).items()
            }
        )
    assert all(torch.equal(courses[0][name], courses[1][name]) for name in courses[0])
    assert any(factor.any() for name, factor in courses[1].items() if "lora_B" in name)


@pytest.mark.slow
def test_each_role_is_compiled_once_and_learns_the_same(base, batch, traced):
    _, plain = gradients(base, batch, False)
    objective, compiled = gradients(base, batch, 2, compiled=True)
    torch.testing.assert_close(compiled, plain)
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(objective, batch, 2)


def test_the_base_is_there_once(base):
    objective = load(base)
    whole = sum(p.numel() for p in load_component(base, "transformer").parameters())
    size = sum(factor.numel() for factor in factors(objective, "student").values())
    found = [objective.module, *(part for part in vars(objective).values() if isinstance(part, torch.nn.Module))]
    held = {p.data_ptr(): p.numel() for module in found for p in module.parameters()}
    assert sum(held.values()) - sum(p.numel() for p in objective.vae.parameters()) == whole + 2 * size
    sizes = objective.describe()
    assert sizes["trained parameters"] == size and sizes["parameters"] == whole + size
    assert objective.step_flops(EncodedBatch(torch.zeros(B, F, C, H, W), torch.zeros(B, 16, 24), None, [])) > 0


def test_factors_are_float32_over_a_bf16_base_and_what_is_exported_is_not_rounded(base, batch, tmp_path):
    objective = load(base, dtype=torch.bfloat16)
    assert {p.dtype for n, p in objective.module.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    assert {p.dtype for n, p in objective.module.named_parameters() if "lora_" in n} == {torch.float32}
    batch.prompt_embeds = batch.prompt_embeds.bfloat16()
    with objective.autocast():  # as accelerate has the student run
        objective.loss(batch, SampleRandom(0, 0, range(B)))[0].backward()
    gradients = {name: p.grad for name, p in objective.module.named_parameters() if p.grad is not None}
    assert gradients and all(".student." in name and grad.isfinite().all() for name, grad in gradients.items())
    draw_factors(objective, "target", 0)
    objective.export(tmp_path)
    got, before = (load_file(d / "transformer" / "diffusion_pytorch_model.safetensors") for d in (tmp_path, base))
    assert got.keys() == before.keys() and {tensor.dtype for tensor in got.values()} == {torch.float32}
    changed = {name for name in got if not torch.equal(got[name], before[name])}
    assert changed == {f"{name}.weight" for name in lora_layers(objective.module)}


def test_the_exported_model_is_the_target(base, batch, tmp_path):
    objective = load(base, "--lora_target_modules", "to_q", "ff.net.2", "norm1.linear")
    draw_factors(objective, "student", 0)
    draw_factors(objective, "target", 1)
    expected = output_of(objective, objective.target, batch)
    objective.export(tmp_path)
    torch.testing.assert_close(output_of(objective, load_component(tmp_path, "transformer"), batch), expected)
    assert torch.equal(output_of(objective, objective.target, batch), expected)  # which stays as it was


def test_factors_are_not_added_to_a_base_that_was_trained_anew_meanwhile(base, tmp_path):
    replaced = tmp_path / "stage3"
    shutil.copytree(base, replaced)
    objective = load(replaced)
    settings, digest = objective.settings, base_digest(objective.settings)
    weights = replaced / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(UserError, match="stage3, whose transformer has changed since"):
        export_pipeline(objective, tmp_path / "stage4", 1, settings, digest)
    assert not (tmp_path / "stage4").exists()


def test_a_sample_video_is_of_the_target(base):
    objective = load(base)
    frames = [objective.sample("A red car.", ["D"] * 9, 0)]
    for adapter in ("student", "target"):
        draw_factors(objective, adapter, 0)
        frames.append(objective.sample("A red car.", ["D"] * 9, 0))
    assert (frames[0] == frames[1]).all() and (frames[1] != frames[2]).any()


def test_a_failed_forward_leaves_the_student_in_place(base, batch):
    objective = load(base)
    draw_factors(objective, "student", 0)
    expected = output_of(objective, objective.module, batch)
    with pytest.raises(TypeError):
        objective.teacher(hidden_states=batch.latents)
    assert torch.equal(output_of(objective, objective.module, batch), expected)


def test_resumed_run_equals_an_unbroken_one_bit_for_bit(tiny_stages, base, tmp_path):
    options = ["--pretrained_model_name_or_path", str(base), "--rank", str(RANK)]
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    tiny_stages.train(4, unbroken, *options)
    tiny_stages.train(4, resumed, *options, "--max_train_steps", "3", "--validation_steps", "0")
    tiny_stages.train(4, resumed, *options)
    for name in ("weights", "optimizer", "target"):
        expected, got = (load_file(d / "checkpoint-6" / f"{name}.safetensors") for d in (unbroken, resumed))
        assert expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected)
        assert not any("base_layer.weight" in key for key in got)
    held_out = {m["step"]: m["validation/loss"] for m in read_metrics(unbroken) if "validation/loss" in m}
    assert held_out[6] < held_out[0]


def test_a_layer_that_is_not_there_is_refused_before_weights_are_read(base):
    with pytest.raises(UserError, match=r"lora_target_modules.*'to_z'"):
        make_objective(4, base, *LORA, "--lora_target_modules", "to_z").describe()
