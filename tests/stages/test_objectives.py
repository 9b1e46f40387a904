"""The losses of stages 2 to 4 in closed form: a transformer that knows the answer has none, whatever is drawn."""

import json
import shutil

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.cogvideox import noise_schedule
from common.cogvideox.control_adapter import ControlVocabulary
from common.cogvideox.noise_schedule import CLEAN
from common.cogvideox.signal_sources import clip_signals
from common.config.errors import UserError
from common.config.loader import load_settings
from common.data.control_signals import CONTROL_TOKENS
from common.data.index import read_index
from common.data.loader import build_dataset
from common.training.encoding import EncodedBatch
from common.training.random import SampleRandom
from tests.stages.conftest import ROOT, TINY, random_batch
from tests.stages.conftest import load_objective as load

B, F, C, H, W = 6, 9, 16, 4, 8


@pytest.fixture
def batch() -> EncodedBatch:
    return random_batch(B, F, C, H, W)


def knows(objective, latents):
    """A `predict` that returns the v which leads to `latents`; at level 0 what is clean tells nothing, nor need it."""

    def predict(module, noisy, timesteps, prompt_embeds, control_embeds, **more):
        alpha = noise_schedule.broadcast_to_sample(objective.alphas[timesteps], noisy)
        return (alpha.sqrt() * noisy - latents) / (1 - alpha).sqrt()

    return predict


def test_stage3_has_no_loss_when_the_answer_is_known_and_forgives_the_condition_frame(tiny_models, batch, monkeypatch):
    objective = load(3, tiny_models / "stage2", "--uniform_timestep_share", "0.5")
    rng = SampleRandom(0, 0, range(B))
    monkeypatch.setattr(objective, "predict", knows(objective, batch.latents))
    assert objective.loss(batch, rng)[0] < 1e-8

    def wrong_at_frame_0(*arguments):
        v = knows(objective, batch.latents)(*arguments)
        v[:, 0] += 1
        return v

    monkeypatch.setattr(objective, "predict", wrong_at_frame_0)
    for share, loss in (("0", 0), ("1", 1 / F)):  # where all frames share a timestep, frame 0 is learnt like any
        objective.settings.uniform_timestep_share = float(share)
        assert objective.loss(batch, SampleRandom(0, 0, range(B)))[0].item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("stage", [2, 3, 4])
def test_a_latent_frame_is_told_the_mean_of_its_raw_frames_signals_or_the_last_one(
    stage, tiny_base, tiny_models, batch, monkeypatch
):
    base = tiny_base if stage == 2 else tiny_models / f"stage{stage - 1}"
    footage_alone = ["--key_press_share", "0"] if stage == 4 else []
    objective = load(stage, base, "--control_dropout", "0", *footage_alone)
    told = []

    def predict(module, noisy, timesteps, prompt_embeds, control_embeds, **more):
        told.append(control_embeds)
        return torch.zeros_like(noisy)

    monkeypatch.setattr(objective, "predict", predict)
    batch.control_indices[0, 5] = torch.tensor([3, 3, 3, 7])  # the signal changes under the fourth raw frame
    rows = objective.vocabulary.embed(torch.arange(9))
    for label, wanted in (("mean", (3 * rows[3] + rows[7]) / 4), ("last", rows[7])):
        objective.vocabulary.label = label
        objective.loss(batch, SampleRandom(0, 0, range(B)))
        torch.testing.assert_close(told[-1][0, 5], wanted)
        torch.testing.assert_close(told[-1][0, 4], rows[batch.control_indices[0, 4, 0]])


def test_the_label_is_chosen_in_stage_2_and_kept_until_another_is_asked_for(tiny_base, tmp_path):
    def exported(stage, base, *options):
        load(stage, base, *options).export(tmp_path / f"{stage}{''.join(options)}")
        return tmp_path / f"{stage}{''.join(options)}"

    def label(directory):
        return ControlVocabulary.from_pretrained(directory / "control_vocabulary").label

    stage2 = exported(2, tiny_base)
    assert label(stage2) == "mean"
    stage2 = exported(2, tiny_base, "--control_label", "last")
    assert [label(stage2), label(exported(3, stage2))] == ["last", "last"]
    stage3 = exported(3, stage2, "--control_label", "mean")
    assert [label(stage3), label(exported(4, stage3)), label(stage2)] == ["mean", "mean", "last"]
    names = stage3 / "control_vocabulary" / "vocabulary.json"
    names.write_text(json.dumps({"names": list(CONTROL_TOKENS)}))
    assert label(stage3) == "last"  # published models do not say, and were told the last
    names.write_text(json.dumps({"names": list(CONTROL_TOKENS), "label": "first"}))
    with pytest.raises(UserError, match=r"control_vocabulary: label 'first' is not one of mean, last"):
        label(stage3)


def test_sampling_tells_the_signals_of_footage_as_training_does(tiny_world, tiny_models):
    index = tiny_world / "index.json"
    words = [*TINY.split(), "--data_root", str(tiny_world), "--index_file", str(index)]
    settings = load_settings(ROOT / "stage3" / "training" / "miniworld_config.py", words)
    records = read_index(index, tiny_world, needs_control=True)
    vocabulary = ControlVocabulary.from_pretrained(tiny_models / "stage2" / "control_vocabulary")
    changes = 0
    for number, record in enumerate(records):
        trained = build_dataset(settings, records, needs_control=True).try_clip(number, 0, 0)["control_indices"]
        assert clip_signals(record.control[:33], 9, vocabulary) == trained.tolist()
        changes += int((trained != trained[:, -1:]).any(dim=1).sum())
    assert changes  # some latent frame has more than one signal


@pytest.mark.parametrize("stage", [3, 4])
def test_offset_noise_is_one_smooth_picture_in_all_frames_and_not_in_the_target(stage, tiny_models, batch, monkeypatch):
    objective = load(stage, tiny_models / f"stage{stage - 1}", "--uniform_timestep_share", "0")
    seen = []

    def predict(module, noisy, timesteps, *arguments, **more):
        seen.append((noisy, timesteps))
        return knows(objective, batch.latents)(module, noisy, timesteps, *arguments, **more)

    monkeypatch.setattr(objective, "predict", predict)
    for strength in (0.0, 0.5):
        objective.settings.offset_noise = strength
        assert objective.loss(batch, SampleRandom(0, 0, range(B)))[0] < 1e-6
    (plain, timesteps), (shifted, _) = seen[0], seen[len(seen) // 2]
    difference = (shifted - plain).double()
    picture = difference[:, :1]  # of the condition frame, which is clean
    sigma = (1 - objective.alphas[timesteps[:, 1:]]).sqrt()
    expected = picture * noise_schedule.broadcast_to_sample(sigma, difference)
    torch.testing.assert_close(difference[:, 1:], expected.double(), atol=1e-6, rtol=1e-4)
    strengths = picture.std(dim=(1, 2, 3, 4))
    assert strengths.max() < 0.6 and strengths.unique().numel() == B
    line = picture[:, 0, :, [0, 1, 2, 3]]  # of four latents a picture's height, under three points
    assert picture.std() > 0.05 and (line[:, :, 1:] - line[:, :, :-1]).std() < 0.7 * 2**0.5 * picture.std()


def test_a_pressed_key_is_told_for_all_frames_in_noise_to_teacher_and_student(tiny_models, batch, monkeypatch):
    objective = load(4, tiny_models / "stage3", "--key_press_share", "0.5", "--uniform_timestep_share", "0.5")
    told, levels = [], []

    def predict(module, noisy, timesteps, prompt_embeds, control_embeds, **more):
        told.append(control_embeds)
        levels.append(timesteps)
        return knows(objective, batch.latents)(module, noisy, timesteps, prompt_embeds, control_embeds)

    monkeypatch.setattr(objective, "predict", predict)
    footage = objective.vocabulary.frame_rows(batch.control_indices)
    signals, pressed = set(), {True: 0, False: 0}
    for step in range(20):
        told.clear(), levels.clear()
        assert objective.loss(batch, SampleRandom(0, step, range(B)))[0] < 1e-6  # the key moves no other draw's answer
        free, guided, target, student = told
        assert torch.equal(guided, target) and torch.equal(guided, student) and not free.any()
        starts = (levels[0] == levels[0][:, :1]).all(dim=1).tolist()  # all frames in noise, none of them a condition
        for sample, own, is_start in zip(student, footage, starts, strict=True):
            if not torch.equal(sample, own):
                assert (sample[1:] == sample[1]).all()
                assert torch.equal(sample[0], sample[1] if is_start else own[0])
                signals.add(tuple(sample[1].tolist()))
                pressed[is_start] += 1
    rows = objective.vocabulary.embed(torch.arange(len(CONTROL_TOKENS)))
    assert signals <= {tuple(row.tolist()) for row in rows} and len(signals) == len(CONTROL_TOKENS)
    assert min(pressed.values()) > 10
    objective.settings.key_press_share = 0.0
    told.clear()
    objective.loss(batch, SampleRandom(0, 0, range(B)))
    assert torch.equal(told[-1], footage)


def test_stage3_tells_the_model_rising_noise_behind_a_clean_frame(tiny_models, batch, monkeypatch):
    objective = load(3, tiny_models / "stage2", "--uniform_timestep_share", "0")
    seen = {}

    def predict(module, noisy, timesteps, prompt_embeds, control_embeds):
        seen.update(noisy=noisy, timesteps=timesteps)
        return torch.zeros_like(noisy)

    monkeypatch.setattr(objective, "predict", predict)
    objective.loss(batch, SampleRandom(0, 0, range(B)))
    assert torch.equal(seen["noisy"][:, 0], batch.latents[:, 0]) and (seen["timesteps"][:, 0] == 0).all()
    levels = seen["timesteps"][:, 1:].unflatten(1, (4, 2))  # [B,G,W]
    assert (levels[..., 0] == levels[..., 1]).all() and (levels[:, 1:] - levels[:, :-1] == 250).all()
    assert len(levels[:, 0].unique()) > 1 and levels.max() < 1000


@pytest.mark.parametrize("phases", ["1", "2"])
def test_stage4_has_no_loss_when_all_three_know_the_answer(tiny_models, batch, monkeypatch, phases):
    objective = load(4, tiny_models / "stage3", "--phases_per_group", phases, "--uniform_timestep_share", "0.5")
    monkeypatch.setattr(objective, "predict", knows(objective, batch.latents))
    for step in range(4):
        assert objective.loss(batch, SampleRandom(0, step, range(B)))[0] < 1e-6
    assert objective.validation_loss(batch, SampleRandom(0, 0, range(B)))["loss"] < 1e-6
    perfect = objective.predict

    def student_errs(module, *arguments, **more):
        return perfect(module, *arguments, **more) + (module is objective.module)

    monkeypatch.setattr(objective, "predict", student_errs)
    assert objective.loss(batch, SampleRandom(0, 0, range(B)))[0] > 1e-3


def test_stage4_target_on_the_boundary_is_the_teachers_own_point(tiny_models, batch, monkeypatch):
    """One solver step per phase: every teacher step reaches the boundary, and what the target says has no effect."""
    objective = load(4, tiny_models / "stage3", "--num_solver_steps", "4", "--uniform_timestep_share", "0")
    honest = objective.predict

    def target_raves(module, *arguments, **more):
        return honest(module, *arguments, **more) + 100 * (module is objective.target)

    expected = objective.loss(batch, SampleRandom(0, 0, range(B)))[0]
    monkeypatch.setattr(objective, "predict", target_raves)
    assert torch.equal(objective.loss(batch, SampleRandom(0, 0, range(B)))[0], expected)


def test_stage4_takes_condition_and_groups_from_stage3(tiny_models, batch, tmp_path):
    base = tmp_path / "stage3"
    shutil.copytree(tiny_models / "stage3", base)
    config = base / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "condition_timestep": 50}))
    objective = load(4, base, "--uniform_timestep_share", "0.5")
    timesteps, is_condition = objective._sample_timesteps(
        torch.zeros(32, dtype=torch.bool), F, SampleRandom(0, 0, range(32))
    )
    assert (timesteps[is_condition] == 50).all() and is_condition[:, 0].any() and not is_condition[:, 1:].any()
    assert objective.student_scheduler.config.condition_timestep == 50
    assert CLEAN not in timesteps
    with pytest.raises(UserError, match=r"num_noise_groups: is 2; stage 3 made .* with 4"):
        objective.settings.num_noise_groups = 2
        objective.describe()


def test_stage4_draws_its_guidance_and_stores_the_range(tiny_models, batch):
    objective = load(4, tiny_models / "stage3", "--guidance_range", "1", "3", "--cond_proj_dim", "8")
    loss, _ = objective.loss(batch, SampleRandom(0, 0, range(B)))
    loss.backward()
    assert objective.module.time_embedding.cond_proj.weight.grad.any()
    assert objective.student_scheduler.config.guidance_range == [1.0, 3.0]


def test_stage2_measures_the_signals_worth_at_equal_noise(tiny_base, batch):
    """A new adapter does nothing, so its signal is worth exactly nothing."""
    objective = load(2, tiny_base)
    losses = objective.validation_loss(batch, SampleRandom(0, 0, range(B)))
    assert torch.equal(losses["loss"], losses["loss_without_control"])


def test_control_and_caption_are_dropped_independently(tiny_models, batch):
    objective = load(3, tiny_models / "stage2", "--control_dropout", "0.3", "--caption_dropout", "0.3")
    n = 400
    rng = SampleRandom(0, 0, range(n))
    pixels = {"latent_moments": torch.zeros(n, F, 2 * C, 1, 1), "prompt_embeds": torch.ones(n, 16, 24)}
    many = {**pixels, "captions": [""] * n, "sample_ids": [""] * n, "control_indices": torch.zeros(n, F, 4).long()}
    encoded = objective.encoder.encode(many, rng)
    no_text = ~(encoded.prompt_embeds == 1).all(dim=(1, 2))
    rows = objective.control_embeds(encoded, rng)
    no_control = (rows == objective.vocabulary.null).all(dim=(1, 2))
    assert no_text.float().mean().item() == pytest.approx(0.3, abs=0.07)
    assert no_control.float().mean().item() == pytest.approx(0.3, abs=0.07)
    assert (no_text & no_control).float().mean().item() == pytest.approx(0.09, abs=0.05)


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [(1, ["--rank", "2"]), (2, []), (2, ["--rank", "2"]), (3, []), (4, []), (4, ["--rank", "2"])],
)
def test_operations_of_a_step_are_what_torchs_counter_counts(tiny_base, tiny_models, batch, stage, overrides):
    objective = load(stage, tiny_base if stage < 3 else tiny_models / f"stage{stage - 1}", *overrides)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # the counter knows no CPU flash attention
        objective.loss(batch, SampleRandom(0, 0, range(B)))[0].backward()
    assert objective.step_flops(batch) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_a_base_from_the_hub_is_checked_like_one_on_disk(tiny_models, monkeypatch):
    resolve = "common.training.cogvideox_objective.resolve_pipeline_directory"
    monkeypatch.setattr(resolve, lambda name: {"org/world": tiny_models / "stage3"}[name])
    with pytest.raises(UserError, match=r"num_noise_groups: is 2; stage 3 made .* with 4"):
        load(4, "org/world", "--num_noise_groups", "2")
