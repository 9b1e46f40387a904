"""Self-rollout: its streams against the pipeline's, its loss against two Gaussians, its runs against unbroken ones."""

import itertools
from pathlib import Path

import pytest
import torch

from common.cogvideox import streaming
from common.cogvideox.noise_schedule import broadcast_to_sample
from common.cogvideox.pipeline_cogvideox import CogVideoXStreamingPipeline
from common.config.loader import load_settings
from common.training.encoding import EncodedBatch
from common.training.random import SampleRandom
from stage4.training.rollout import StreamsByLength
from stage4.training.self_rollout import MATCHED_TIMESTEPS, Made
from tests.stages.conftest import ROOT, TINY, random_batch

CONFIG = ROOT / "stage4" / "training" / "miniworld_self_rollout_config.py"
B, F, C, H, W = 3, 9, 16, 4, 8
FOREVER = ["--rollouts_per_stream", "1e9"]


@pytest.fixture
def batch() -> EncodedBatch:
    return random_batch(B, F, C, H, W)


def load_self_rollout(tiny_models: Path, *overrides: str):
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
    objective = load_self_rollout(tiny_models, *FOREVER, "--live_share", str(int(is_live)), "--held_share", "0")
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
    objective = load_self_rollout(
        tiny_models, "--rollouts_per_stream", "3", "--held_share", "0.5", "--live_share", "0.5"
    )
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
        assert step or starts.all()
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


def test_a_streams_gradient_reaches_all_shifts_of_a_step_and_no_further(tiny_models, batch, monkeypatch):
    objective = load_self_rollout(tiny_models, *FOREVER)
    jumps, jump = [], objective._jump

    def kept(*arguments):
        jumps.append(jump(*arguments))
        return jumps[-1]

    monkeypatch.setattr(objective, "_jump", kept)
    objective.roll_out(batch, SampleRandom(0, 0, range(B)))
    assert objective.streams[F].latents.grad_fn is None
    before = objective.streams[F].latents.clone()
    made = objective.roll_out(batch, SampleRandom(0, 1, range(B)))
    assert not objective.streams[F].latents.equal(before) and objective.streams[F].latents.grad_fn is None
    # The last group's frames were in the window from the first of the four shifts on.
    (gradient,) = torch.autograd.grad(made.latents[:, -2:].square().sum(), jumps[4], retain_graph=True)
    assert (gradient[:, -2:].flatten(1).abs().sum(dim=1) > 0).all()


def test_the_losss_gradient_is_the_difference_of_two_gaussians_scores(tiny_models, monkeypatch):
    """The teacher knows N(0,1) and the critic N(μ,1), whose x̂0 are α·x and α·x + (1 − α²)·μ."""
    objective = load_self_rollout(tiny_models)
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
    objective = load_self_rollout(tiny_models)
    latents = torch.randn(B, F, C, H, W, generator=torch.Generator().manual_seed(0))

    def predict(module, noisy, timesteps, *_, **__):
        alpha = broadcast_to_sample(objective.alphas[timesteps], noisy)
        return (alpha.sqrt() * noisy - latents) / (1 - alpha).sqrt()

    monkeypatch.setattr(objective, "predict", predict)
    made = Made(latents, torch.ones(B, F, dtype=torch.bool), torch.zeros(B, 16, 24), torch.zeros(B, F, 12))
    assert objective._critic_loss(made, SampleRandom(0, 0, range(B))) < 1e-6


def test_each_of_the_two_is_trained_by_its_own_loss(tiny_models, batch):
    objective = load_self_rollout(tiny_models, *FOREVER)
    with torch.no_grad():  # the critic begins as the teacher, and then there is nothing to learn from
        objective.module.critic.proj_out.weight.add_(0.1)
    made = objective.roll_out(batch, SampleRandom(0, 0, range(B)))
    by_role = {}
    for name, loss in (
        ("student", objective._matching_loss(made, SampleRandom(0, 1, range(B)))[0]),
        ("critic", objective._critic_loss(made, SampleRandom(0, 1, range(B)))),
    ):
        objective.module.zero_grad()
        loss.backward(retain_graph=True)
        by_role[name] = {
            n.split(".")[0] for n, p in objective.module.named_parameters() if p.grad is not None and p.grad.any()
        }
    assert by_role == {"student": {"student"}, "critic": {"critic"}}
    assert objective.learning_rate("critic.a") != objective.learning_rate("student.a")


def test_exported_weights_lie_between_the_student_before_and_its_average(tiny_models):
    objective = load_self_rollout(tiny_models, "--learnt_share", "0.25")
    before = {name: p.detach().clone().double() for name, p in objective.target.named_parameters()}
    with torch.no_grad():
        for parameter in objective.target.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    trained = {name: p.detach().clone().double() for name, p in objective.target.named_parameters()}
    for name, weight in objective.exported().named_parameters():
        torch.testing.assert_close(weight.double(), 0.75 * before[name] + 0.25 * trained[name], rtol=0, atol=1e-6)
        assert torch.equal(objective.target.get_parameter(name).double(), trained[name])


def test_streams_survive_a_checkpoint(tiny_models, batch):
    objective = load_self_rollout(tiny_models, "--live_share", "0.5")
    with torch.no_grad():
        objective.roll_out(batch, SampleRandom(0, 0, range(B)))
    again = StreamsByLength()
    again.load_state_dict(objective.streams.state_dict())
    assert again.keys() == {F}
    for name, value in vars(objective.streams[F]).items():
        assert torch.equal(getattr(again[F], name), value) and getattr(again[F], name).dtype == value.dtype
