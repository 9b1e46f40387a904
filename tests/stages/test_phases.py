"""Stage 4 with several phases a group."""

import torch

from common.training.random import SampleRandom
from tests.stages.conftest import load_objective as load
from tests.stages.conftest import random_batch
from tests.stages.test_objectives import knows

B, F, C, H, W = 3, 9, 16, 4, 8


def test_held_out_loss_is_the_mean_over_all_phases_of_a_group(tiny_models, monkeypatch):
    """Of a student that errs in the upper one of two phases, in the lower one, or in both."""
    objective = load(4, tiny_models / "stage3", "--phases_per_group", "2")
    batch = random_batch(B, F, C, H, W)
    perfect, losses = knows(objective, batch.latents), {}
    for phases in ((), (0,), (1,), (0, 1)):

        def predict(module, noisy, timesteps, *arguments, phases=phases, **more):
            errs = torch.isin(timesteps % 250 // 125, torch.tensor(phases)) & (module is objective.module)
            return perfect(module, noisy, timesteps, *arguments, **more) + errs[:, :, None, None, None]

        monkeypatch.setattr(objective, "predict", predict)
        losses[phases] = objective.validation_loss(batch, SampleRandom(0, 0, range(B)))
    for name, both in losses[0, 1].items():
        upper, lower = losses[1,][name], losses[0,][name]
        assert losses[()][name] < 1e-6 < 1e-4 < min(upper, lower)
        torch.testing.assert_close(upper + lower, both)
