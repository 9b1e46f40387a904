"""Windows that stages 3 and 4 cut from longer clips (`window_frames`)."""

import pytest
import torch

from common.training.encoding import EncodedBatch
from common.training.random import SampleRandom
from tests.stages.conftest import load_objective as load
from tests.stages.conftest import random_batch

B, F, C, H, W = 6, 9, 16, 4, 8


@pytest.fixture
def batch() -> EncodedBatch:
    return random_batch(B, F, C, H, W)


def test_stage3_window_is_cut_from_latents_and_signals_alike(tiny_models, batch):
    objective = load(3, tiny_models / "stage2", "--window_frames", "17")
    batch.latents[:] = torch.arange(F)[None, :, None, None, None].float()
    batch.control_indices[:] = torch.arange(F)[:, None]
    cut = objective.cut_window(batch, SampleRandom(0, 0, range(B)))
    assert cut.latents.shape[1] == 5
    assert torch.equal(cut.latents[:, :, 0, 0, :4].long(), cut.control_indices)
    assert len(cut.control_indices[:, 0].unique()) > 1 and (cut.control_indices.diff(dim=1) == 1).all()
    assert objective.num_video_tokens(batch.latents) == B * 5 * (H // 2) * (W // 2)
    objective.settings.window_frames = [17, 33]
    lengths = [objective.cut_window(batch, SampleRandom(0, step, range(B))).latents.shape[1] for step in range(20)]
    assert set(lengths) == {5, 9} and objective.cut_window(batch, None).latents.shape[1] == 9


def test_a_window_that_begins_its_clip_does_and_held_out_windows_lie_in_its_middle(tiny_models, batch):
    objective = load(3, tiny_models / "stage2", "--window_frames", "17")
    begins = torch.arange(B) % 2 == 0
    for step in range(5):
        cut = objective.cut_window(batch, SampleRandom(0, step, range(B)), begins)
        assert torch.equal(cut.latents[begins], batch.latents[begins, :5])
        assert torch.equal(cut.control_indices[begins], batch.control_indices[begins, :5])
    assert torch.equal(objective.cut_window(batch, None).latents, batch.latents[:, 2:7])


@pytest.mark.parametrize(("stage", "base", "share"), [(3, "stage2", 0.5), (4, "stage3", 1.0)])
def test_windows_without_condition_begin_their_clip(tiny_models, batch, monkeypatch, stage, base, share):
    """All of them in stage 4, half in stage 3, whose model judges later ones in self-rollout."""
    objective = load(stage, tiny_models / base, "--window_frames", "17", "--uniform_timestep_share", "0.5")
    cut_window, begun, count = objective.cut_window, [], 0

    def watched(batch, rng, begins):
        begun.append(begins)
        return cut_window(batch, rng, begins)

    def predict(module, noisy, timesteps, *arguments, **more):
        levels.append(timesteps)
        return torch.zeros_like(noisy)

    monkeypatch.setattr(objective, "cut_window", watched)
    monkeypatch.setattr(objective, "predict", predict)
    for step in range(40):
        levels: list[torch.Tensor] = []
        objective.loss(batch, SampleRandom(0, step, range(B)))
        is_uniform = (levels[0] == levels[0][:, :1]).all(dim=1)
        assert not (begun[-1] & ~is_uniform).any()
        count += int(is_uniform.sum())
    assert count > 60 and float(sum(b.sum() for b in begun)) / count == pytest.approx(share, abs=0.15)
