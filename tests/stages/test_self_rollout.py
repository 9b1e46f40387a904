"""Self-rollout: its streams against the pipeline's, its loss against two Gaussians, its runs against unbroken ones."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.cogvideox import streaming
from common.cogvideox.noise_schedule import broadcast_to_sample
from common.cogvideox.pipeline_cogvideox import CogVideoXStreamingPipeline
from common.config.errors import UserError
from common.config.loader import load_settings
from common.tools.precompute import precompute
from common.training.encoding import EncodedBatch
from common.training.random import SampleRandom
from common.training.step_graph import EAGER_STEPS
from common.training.trainer import Trainer
from stage4.training.rollout import StreamsByLength
from stage4.training.self_rollout import MATCHED_TIMESTEPS, Made
from tests.stages.conftest import ROOT, TINY, random_batch, read_metrics

CONFIG = ROOT / "stage4" / "training" / "miniworld_self_rollout_config.py"
B, F, C, H, W = 3, 9, 16, 4, 8
FOREVER = ["--rollouts_per_stream", "1e9"]


@pytest.fixture
def batch() -> EncodedBatch:
    return random_batch(B, F, C, H, W)


def load(tiny_models: Path, *overrides: str):
    paths = ["--pretrained_model_name_or_path", str(tiny_models / "stage3")]
    paths += ["--student_model_name_or_path", str(tiny_models / "stage4")]
    objective = load_settings(CONFIG, [*TINY.split(), *paths, *overrides]).build_objective()
    objective.describe()
    objective.load(torch.device("cpu"), torch.float32)
    return objective


class Recorded(SampleRandom):
    """Keeps the normal numbers drawn."""

    def normal(self, shape, dtype=torch.float32):
        self.drawn = [*getattr(self, "drawn", []), super().normal(shape, dtype)]
        return self.drawn[-1]


@pytest.mark.parametrize("is_live", [False, True], ids=["known ahead", "live"])
@pytest.mark.parametrize("phases", [1, 2])
def test_the_streams_in_training_are_those_of_the_pipeline(tiny_models, batch, monkeypatch, is_live, phases):
    """Given the same noise: a start from text and the window of frames that follows it, and the signals told."""
    objective = load(tiny_models, *FOREVER, "--live_share", str(int(is_live)), "--held_share", "0")
    objective.settings.phases_per_group = phases
    objective.student_scheduler = objective._make_scheduler()
    with torch.no_grad():
        start = Recorded(0, 0, range(B))
        begun = objective.roll_out(batch, start)
        signals = objective.streams[F].signals.clone()  # [B,2·F−1,R]
        following = Recorded(0, 1, range(B))
        made = objective.roll_out(batch, following)
    assert begun.is_new.all() and not made.is_new[:, 0].any() and made.is_new[:, 1:].all()

    # The window's noise, that of its levels, and what enters after each shift but the last.
    (_, again, first), (fresh, *_) = start.drawn, following.drawn
    noise = iter([first, again, *fresh.unbind(1)])
    monkeypatch.setattr(streaming, "randn_tensor", lambda shape, **_: next(noise)[row : row + 1].reshape(shape))
    parts = objective.components(objective.target) | {"scheduler": objective.student_scheduler}
    for row in range(B):
        noise = iter([first, again, *fresh.unbind(1)])
        known = signals[row, :, -1].tolist()
        asked = iter([known[1], *known[1::2]])
        stream = CogVideoXStreamingPipeline(**parts).stream(
            prompt_embeds=batch.prompt_embeds[row : row + 1],
            negative_prompt_embeds=batch.prompt_embeds[row : row + 1],
            control=(lambda asked=asked: next(asked)) if is_live else known,
            height=8 * H,
            width=8 * W,
        )
        streamed = torch.cat([stream.advance() for _ in range(4)], dim=1)[0]
        torch.testing.assert_close(made.latents[row], streamed, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(begun.latents[row, 0], streamed[0], rtol=1e-4, atol=1e-5)
        told = [known[1], *itertools.chain(*([signal] * 2 for signal in known[1:9:2]))] if is_live else known[:F]
        assert torch.equal(made.rows[row], objective.vocabulary.embed(torch.tensor(told)))


def test_streams_keep_their_prompt_and_signals_and_end_now_and_then(tiny_models, batch):
    objective = load(tiny_models, "--rollouts_per_stream", "3", "--held_share", "0.5", "--live_share", "0.5")
    began, held, ages = 0, 0, torch.zeros(B)
    last = None
    for step in range(12):
        batch.prompt_embeds = torch.full_like(batch.prompt_embeds, step)
        batch.control_indices = torch.randint(0, 9, (B, F, 1), generator=torch.Generator().manual_seed(step)).repeat(
            1, 1, 4
        )
        with torch.no_grad():
            made = objective.roll_out(batch, SampleRandom(0, step, range(B)))
        starts, streams = made.is_new[:, 0], objective.streams[F]
        assert starts.all() == (step == 0) or step
        ages = torch.where(starts, 0, ages + 1)
        assert (streams.prompt[:, 0, 0] == step - ages).all()  # that of the step in which it began
        assert (streams.signals[streams.is_held] == streams.signals[streams.is_held][:, :1, :1]).all()
        if last is not None:
            goes_on = ~starts
            assert torch.equal(streams.signals[goes_on, :F], last.signals[goes_on, F - 1 :])
            assert torch.equal(streams.is_live[goes_on], last.is_live[goes_on])
        last = type(streams)(*(value.clone() for value in vars(streams).values()))
        began, held = began + int(starts.sum()), held + int(streams.is_held.sum())
    assert B < began < 12 * B and 0 < held < 12 * B


def test_a_streams_gradient_reaches_all_shifts_of_a_step_and_no_more(tiny_models, batch):
    objective = load(tiny_models, *FOREVER)
    for step in range(2):
        made = objective.roll_out(batch, SampleRandom(0, step, range(B)))
        gradients = torch.autograd.grad(made.latents[:, 1:].square().sum(), objective.module.student.parameters())
        assert sum(g.abs().sum() for g in gradients) > 0
    assert not objective.streams[F].latents.requires_grad and not made.latents[:, 0].requires_grad * 0
    assert all(p.grad is None for p in objective.module.critic.parameters())


def test_the_losss_gradient_is_the_difference_of_two_gaussians_scores(tiny_models, monkeypatch):
    """The teacher knows N(0,1) and the critic N(μ,1), whose x̂0 are α·x and α·x + (1 − α²)·μ."""
    objective = load(tiny_models)
    generator, mean = torch.Generator().manual_seed(0), 0.7
    latents = torch.randn(B, F, C, H, W, generator=generator) + mean
    is_new = torch.ones(B, F, dtype=torch.bool)
    is_new[1, 0] = False
    prompt, rows = torch.randn(B, 16, 24, generator=generator), torch.randn(B, F, 12, generator=generator)

    def predict(module, noisy, timesteps, *_, **__):
        alpha = broadcast_to_sample(objective.alphas[timesteps], noisy).sqrt()
        of_critic = module is not objective.teacher
        x0 = alpha * noisy + of_critic * (1 - alpha**2) * mean
        return (alpha * noisy - x0) / (1 - alpha**2).sqrt()

    monkeypatch.setattr(objective, "predict", predict)
    leaf = latents.clone().requires_grad_()
    rng = Recorded(0, 0, range(B))
    loss, squared = objective._matching_loss(Made(leaf, is_new, prompt, rows), rng)
    loss.backward()

    timesteps = SampleRandom(0, 0, range(B)).randint(*MATCHED_TIMESTEPS)
    assert (timesteps >= 20).all() and (timesteps < 980).all()
    alpha = objective.alphas[timesteps].sqrt().reshape(B, 1, 1, 1, 1)
    noisy = alpha * latents.double() + (1 - alpha**2).sqrt() * rng.drawn[0].double()
    gap = (1 - alpha**2) * mean / (latents.double() - alpha * noisy).abs().mean(dim=(2, 3, 4), keepdim=True)
    weight = is_new / is_new.sum(dim=1, keepdim=True) / (B * C * H * W)
    expected = gap * weight[:, :, None, None, None]
    torch.testing.assert_close(leaf.grad.double(), expected.expand_as(leaf), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(squared.double(), gap.square().mean(), rtol=1e-4, atol=1e-9)
    assert (leaf.grad[0] > 0).all()  # down the gradient they come nearer to N(0,1)


def test_the_critic_has_no_loss_when_it_knows_what_was_made(tiny_models, monkeypatch):
    objective = load(tiny_models)
    latents = torch.randn(B, F, C, H, W, generator=torch.Generator().manual_seed(0))

    def predict(module, noisy, timesteps, *_, **__):
        alpha = broadcast_to_sample(objective.alphas[timesteps], noisy)
        return (alpha.sqrt() * noisy - latents) / (1 - alpha).sqrt()

    monkeypatch.setattr(objective, "predict", predict)
    made = Made(latents, torch.ones(B, F, dtype=torch.bool), torch.zeros(B, 16, 24), torch.zeros(B, F, 12))
    assert objective._critic_loss(made, SampleRandom(0, 0, range(B))) < 1e-6


def test_each_of_the_two_is_trained_by_its_own_loss(tiny_models, batch):
    objective = load(tiny_models, *FOREVER)
    made = objective.roll_out(batch, SampleRandom(0, 0, range(B)))
    by_role = {}
    for name, loss in (
        ("student", objective._matching_loss(made, SampleRandom(0, 1, range(B)))[0]),
        ("critic", objective._critic_loss(made, SampleRandom(0, 1, range(B)))),
    ):
        objective.module.zero_grad()
        loss.backward(retain_graph=True)
        by_role[name] = {n.split(".")[0] for n, p in objective.module.named_parameters() if p.grad is not None}
    assert by_role == {"student": {"student"}, "critic": {"critic"}}
    assert objective.learning_rate("critic.a") != objective.learning_rate("student.a")


def test_exported_weights_lie_between_the_student_before_and_its_average(tiny_models):
    objective = load(tiny_models, "--learnt_share", "0.25")
    before = {name: p.detach().clone().double() for name, p in objective.target.named_parameters()}
    with torch.no_grad():
        for parameter in objective.target.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    trained = {name: p.detach().clone().double() for name, p in objective.target.named_parameters()}
    for name, weight in objective.exported().named_parameters():
        torch.testing.assert_close(weight.double(), 0.75 * before[name] + 0.25 * trained[name], rtol=0, atol=1e-6)
        assert torch.equal(objective.target.get_parameter(name).double(), trained[name])


def test_streams_survive_a_checkpoint(tiny_models, batch):
    objective = load(tiny_models, "--live_share", "0.5")
    with torch.no_grad():
        objective.roll_out(batch, SampleRandom(0, 0, range(B)))
    again = StreamsByLength()
    again.load_state_dict(objective.streams.state_dict())
    assert again.keys() == {F}
    for name, value in vars(objective.streams[F]).items():
        assert torch.equal(getattr(again[F], name), value) and getattr(again[F], name).dtype == value.dtype


@pytest.fixture(scope="module")
def stage4(tiny_stages) -> Path:
    return tiny_stages.run(4)


def train(tiny_stages, stage4: Path, output_dir: Path, *overrides: str) -> Path:
    paths = {
        "pretrained_model_name_or_path": stage4.with_name("stage3"), "student_model_name_or_path": stage4,
        "output_dir": output_dir, "data_root": tiny_stages.world, "index_file": tiny_stages.world / "index.json",
        "validation_index_file": tiny_stages.world / "heldout.json",
    }  # fmt: skip
    words = [word for name, value in paths.items() for word in (f"--{name}", str(value))]
    more = ["--frame_buckets", "33", "--window_frames", "17", "33", "--rollouts_per_stream", "2"]
    settings = load_settings(CONFIG, [*words, *TINY.split(), "--validation_prompts", *more, *overrides])
    settings.check_files()
    Trainer(settings, settings.build_objective()).train()
    return output_dir


def test_a_resumed_run_equals_an_unbroken_one_and_leaves_a_stage_4(tiny_stages, stage4, tmp_path):
    unbroken = train(tiny_stages, stage4, tmp_path / "unbroken")
    resumed = train(tiny_stages, stage4, tmp_path / "resumed", "--max_train_steps", "3", "--lr_scheduler", "constant")
    constant = train(tiny_stages, stage4, tmp_path / "constant", "--lr_scheduler", "constant")
    train(tiny_stages, stage4, resumed, "--lr_scheduler", "constant")
    for name in ("weights", "optimizer", "target", "streams"):
        expected, got = (load_file(run / "checkpoint-6" / f"{name}.safetensors") for run in (constant, resumed))
        assert expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected), name
    assert {key.split(".")[0] for key in expected} == {"5", "9"}

    lines = read_metrics(unbroken)
    assert {"critic_loss", "score_gap", "loss"} <= lines[1].keys() and "validation/loss" in lines[-1]
    chunk = next(CogVideoXStreamingPipeline.from_pretrained(unbroken).stream("a car", control="D", height=32, width=64))
    assert chunk.shape == (9, 32, 64, 3)


def test_a_recorded_step_finds_its_streams_where_they_were(tiny_stages, stage4, tmp_path):
    """On the CPU nothing is replayed, but the step works in the same fixed memory as on a GPU."""
    cached = ["--max_train_steps", str(2 * EAGER_STEPS + 3), "--validation_steps", "0", "--windows_per_clip", "1"]
    cached += ["--latent_cache_dir", str(tmp_path / "latents"), "--frame_buckets", "33"]
    precompute(tiny_stages.settings(4, tmp_path / "any", *cached))
    runs = [
        train(tiny_stages, stage4, tmp_path / name, *cached, *option)
        for name, option in (("plain", []), ("recorded", ["--cuda_graph"]))
    ]
    for name in ("weights", "streams"):
        plain, recorded = (load_file(next(run.glob(f"checkpoint-*/{name}.safetensors"))) for run in runs)
        assert plain.keys() == recorded.keys() and all(torch.equal(plain[key], recorded[key]) for key in plain), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rank 4", "rank.*whole students"),
        ("--guidance_range 2 6 --cond_proj_dim 16", "cond_proj_dim"),
        ("--optimizer muon", "optimizer.*'adamw'"),
        ("--gradient_accumulation_steps 2", "gradient_accumulation_steps"),
        ("--critic_learning_rate 0", "critic_learning_rate"),
        ("--rollouts_per_stream 0.5", "rollouts_per_stream"),
        ("--learnt_share 1.5", "learnt_share"),
        ("--held_share -1", "held_share"),
    ],
)
def test_settings_that_cannot_work_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        load_settings(CONFIG, words.split())


def test_a_student_that_does_not_fit_is_refused(tiny_models):
    with pytest.raises(UserError, match="not distilled.*DPMScheduler.*here belongs stage 4"):
        load(tiny_models, "--student_model_name_or_path", str(tiny_models / "stage3"))
    with pytest.raises(UserError, match="phases_per_group.*is 2.*was made with 1"):
        load(tiny_models, "--phases_per_group", "2")
    settings = load_settings(CONFIG, ["--student_model_name_or_path", ""])
    settings.pretrained_model_name_or_path, settings.output_dir = str(tiny_models / "stage3"), str(tiny_models / "new")
    settings.data_root = settings.index_file = settings.validation_index_file = str(tiny_models)
    with pytest.raises(UserError, match="student_model_name_or_path.*is not set"):
        settings.check_files()
