"""The four stages in a row on a tiny model and real videos: what each trains, leaves behind, and resumes to."""

import sqlite3

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file

from common.cogvideox.pipeline_cogvideox import CogVideoXControlPipeline, CogVideoXStreamingPipeline
from common.cogvideox.pipeline_io import load_component
from common.config.errors import UserError
from common.data.loader import build_validation_batch
from common.tools.fuse_lora_weights import fuse_lora_weights
from common.tools.precompute import precompute
from common.training.random import SampleRandom
from common.training.trainer import Trainer
from tests.stages.conftest import read_metrics

pytestmark = pytest.mark.slow
STAGES = (1, 2, 3, 4)
PROMPT = "A red car drives along a sandy desert road."
SIZE = {"height": 32, "width": 64}


def losses(output_dir, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in read_metrics(output_dir) if name in line}


@pytest.mark.parametrize("stage", STAGES)
def test_held_out_loss_falls(tiny_stages, stage):
    held_out = losses(tiny_stages.run(stage), "validation/loss")
    assert set(held_out) == {0, 6}
    assert held_out[6] < held_out[0]


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_reach_exactly_what_the_stage_trains(tiny_stages, stage, tmp_path):
    if stage > 1:
        tiny_stages.run(stage - 1)
    settings = tiny_stages.settings(stage, tmp_path / "out")
    objective = settings.build_objective()
    torch.manual_seed(0)
    objective.load(torch.device("cpu"), torch.float32)
    module = objective.module
    with torch.no_grad():  # open what starts at zero and would hold gradients back
        for name, parameter in module.named_parameters():
            if "lora_B" in name or ("control_blocks" in name and "norm1.linear" in name):
                parameter.normal_(std=0.1)
    batch = build_validation_batch(settings, objective.needs_control)
    rng = SampleRandom(0, 0, batch["slots"])
    loss, _ = objective.loss(objective.encoder.encode(batch, rng), rng)
    loss.backward()
    reached = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    names = {name for name, _ in module.named_parameters()}
    expected = {
        1: {n for n in names if "lora_" in n},
        2: {n for n in names if n.startswith(("control_blocks", "control_embedding"))},
    }.get(stage, names)
    assert reached == expected
    frozen = [objective.vae, objective.encoder.text_encoder]
    frozen += [getattr(objective, role) for role in ("teacher", "target") if hasattr(objective, role)]
    assert all(p.grad is None for module in frozen for p in module.parameters())


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_run_equals_an_unbroken_one_bit_for_bit(tiny_stages, stage, tmp_path):
    unbroken = tiny_stages.run(stage)
    resumed = tmp_path / "resumed"
    tiny_stages.train(stage, resumed, "--max_train_steps", "3", "--validation_steps", "0")
    tiny_stages.train(stage, resumed)
    files = sorted(p.relative_to(unbroken) for p in (unbroken / "checkpoint-6").glob("*.safetensors"))
    assert files
    for file in files:
        expected, got = load_file(unbroken / file), load_file(resumed / file)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[key], got[key]) for key in expected), file
    assert losses(unbroken, "loss") == losses(resumed, "loss")


def test_training_on_a_cache_equals_training_on_the_videos_and_needs_no_text_encoder(tiny_stages, tmp_path):
    options = ["--windows_per_clip", "2", "--max_train_steps", "2", "--validation_steps", "2"]
    options += ["--validation_prompts", PROMPT, "--validation_num_inference_steps", "2"]
    cache = ["--latent_cache_dir", str(tmp_path / "cache")]
    precompute(tiny_stages.settings(1, tmp_path / "cached", *options, *cache))
    tiny_stages.train(1, tmp_path / "plain", *options)
    settings = tiny_stages.settings(1, tmp_path / "cached", *options, *cache)
    objective = settings.build_objective()
    Trainer(settings, objective).train()
    assert objective.encoder.text_encoder is None
    for file in ("checkpoint-2/weights.safetensors", "pytorch_lora_weights.safetensors"):
        plain, cached = load_file(tmp_path / "plain" / file), load_file(tmp_path / "cached" / file)
        assert all(torch.equal(cached[key], value) for key, value in plain.items())
    assert losses(tmp_path / "plain", "validation/loss") == losses(tmp_path / "cached", "validation/loss")
    with sqlite3.connect(tmp_path / "cache" / "index.sqlite") as index:  # lacks one caption and half of the windows
        index.execute("DELETE FROM prompts WHERE key = (SELECT min(key) FROM prompts)")
        index.execute("DELETE FROM windows WHERE key < '8'")
    settings = tiny_stages.settings(1, tmp_path / "partial", *options, *cache)
    objective = settings.build_objective()
    Trainer(settings, objective).train()
    assert objective.encoder.text_encoder is not None  # it has come back
    assert losses(tmp_path / "partial", "loss") == losses(tmp_path / "plain", "loss")
    videos = [(tmp_path / run / "validation" / "step-2-0.mp4").read_bytes() for run in ("plain", "cached")]
    assert videos[0] == videos[1]
    assert not list((tmp_path / "cached").glob(".*"))  # the LoRA was written beside and renamed


def test_stage1_lora_loads_in_plain_diffusers_at_the_trained_strength(tiny_stages):
    output = tiny_stages.run(1)
    pipeline = CogVideoXPipeline.from_pretrained(tiny_stages.base)
    pipeline.load_lora_weights(output)
    layer = pipeline.transformer.transformer_blocks[0].attn1.to_q
    assert list(layer.scaling.values()) == [2.0 / 4]  # lora_alpha / rank
    assert CogVideoXPipeline.from_pretrained(tiny_stages.root / "stage1_fused") is not None


def test_stage1_trains_the_layers_that_it_is_told_to(tiny_stages, tmp_path):
    targets = ["--lora_target_modules", "to_v", "proj", "norm1.linear"]  # not the convolution patch_embed.proj
    lora = tiny_stages.train(1, tmp_path / "lora", *targets, "--max_train_steps", "2", "--validation_steps", "0")
    fused = tmp_path / "fused"
    fuse_lora_weights(str(tiny_stages.base), str(lora), str(fused))
    before, after = (load_component(path, "transformer").state_dict() for path in (tiny_stages.base, fused))
    changed = {key.split(".", 2)[2] for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == {"attn1.to_v.weight", "ff.net.0.proj.weight", "norm1.linear.weight"}
    with pytest.raises(UserError, match=r"lora_target_modules.*'ff.proj'.*ff.net.0.proj"):
        tiny_stages.train(1, tmp_path / "none", "--lora_target_modules", "to_v", "ff.proj")


def test_stage2_obeys_and_without_control_is_stage_1(tiny_stages):
    pipeline = CogVideoXControlPipeline.from_pretrained(tiny_stages.run(2))
    pipeline.set_progress_bar_config(disable=True)
    fused = load_component(tiny_stages.root / "stage1_fused", "transformer").state_dict()
    for key, value in fused.items():
        assert torch.equal(pipeline.transformer.state_dict()[key], value), key
    call = {"num_frames": 9, "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np", **SIZE}
    videos = [
        pipeline(PROMPT, control_signal=[s] * 9, generator=torch.Generator().manual_seed(0), **call).frames
        for s in ("D", "DL")
    ]
    assert np.abs(videos[0] - videos[1]).max() > 1e-4


@pytest.mark.parametrize(("stage", "forwards"), [(3, 5), (4, 1)])
def test_streams_with_the_promised_number_of_forwards(tiny_stages, stage, forwards, monkeypatch):
    pipeline = CogVideoXStreamingPipeline.from_pretrained(tiny_stages.run(stage))
    calls = []
    forward = pipeline.transformer.forward
    monkeypatch.setattr(pipeline.transformer, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    stream = pipeline.stream(PROMPT, control=["D"] * 60, seed=0, **SIZE)
    frames = [len(next(stream)) for _ in range(2)]
    before = len(calls)
    frames.append(len(next(stream)))
    assert frames == [9, 8, 8] and len(calls) - before == forwards


def test_stage4_target_follows_the_student(tiny_stages):
    """What is exported are the averaged weights: between the start and the student, nearer to the student."""
    output = tiny_stages.run(4)
    key = "transformer_blocks.0.ff.net.0.proj.weight"
    start = load_component(tiny_stages.run(3), "transformer").state_dict()[key]
    target = load_component(output, "transformer").state_dict()[key]
    student = load_file(next((output / "checkpoint-6").glob("weights*.safetensors")))[key]
    assert 0 < (target - start).norm() < (student - start).norm()


@pytest.mark.parametrize(
    ("stage", "given", "message"),
    [
        (3, "stage1_fused", "here belongs a controlled pipeline"),
        (4, "stage2", "here belongs a streaming pipeline"),
        (2, "stage1", "fuse it first"),
    ],
)
def test_directory_of_another_stage_is_refused(tiny_stages, stage, given, message, tmp_path):
    tiny_stages.run(2)
    with pytest.raises(UserError, match=message):
        tiny_stages.train(stage, tmp_path / "out", "--pretrained_model_name_or_path", str(tiny_stages.root / given))
    assert not (tmp_path / "out" / "model_index.json").exists()
