"""Guidance: which branches run, how they are weighed, and that nothing runs that has no weight."""

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline

from common.cogvideox.control_adapter import ControlVocabulary
from common.cogvideox.guidance import (
    GuidedDenoiser,
    checked_guidance_scale,
    combine_branches,
    dynamic_guidance_scale,
    guidance_branches,
    guidance_scale_embedding,
)
from common.cogvideox.scheduler import CogVideoXSwinDPMScheduler, CogVideoXSwinLCMScheduler
from common.config.errors import UserError


class LinearTransformer(torch.nn.Module):
    """v = text + control, per frame: guidance can be computed by hand. Remembers the batches it was given."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, hidden_states, encoder_hidden_states, timestep, control_embeds=None, return_dict=True, **rest):
        self.calls.append((len(hidden_states), timestep, control_embeds, rest))
        text = encoder_hidden_states.mean(dim=(1, 2))[:, None, None, None, None]
        control = 0 if control_embeds is None else control_embeds.mean(dim=-1)[..., None, None, None]
        return (torch.zeros_like(hidden_states) + text + control,)


TEXT, SIGNAL = 5.0, 3.0  # against 0 for "" and for the null row


def guided(text_scale, control_scale, batch=2):
    vocabulary = ControlVocabulary(["D"], torch.full((1, 4), SIGNAL), torch.zeros(4))
    transformer = LinearTransformer()
    denoiser = GuidedDenoiser(
        transformer,
        guidance_branches(text_scale, control_scale),
        torch.full((batch, 3, 2), TEXT),
        torch.zeros(batch, 3, 2),
        vocabulary,
    )
    control = denoiser.control_embeds([[[0], [0]]] * batch)
    v = denoiser(torch.zeros(batch, 2, 1, 1, 1), torch.tensor([0, 999]), control)
    assert v.shape == (batch, 2, 1, 1, 1) and v.dtype == torch.float32
    assert (v == v.flatten()[0]).all()
    return v.flatten()[0].item(), transformer


@pytest.mark.parametrize(
    "text_scale, control_scale, forwards, expected",
    [
        (1, 1, 1, TEXT + SIGNAL),
        (6, 1, 2, 6 * TEXT + SIGNAL),  # on text alone the signals stay as they are
        (1, 3, 2, TEXT + 3 * SIGNAL),
        (6, 3, 3, 6 * TEXT + 3 * SIGNAL),
        (4, 4, 3, 4 * (TEXT + SIGNAL)),
        (2, 5, 3, 2 * TEXT + 5 * SIGNAL),
        (0, 0, 3, 0),
        (1, 0, 1, TEXT),
    ],
)
def test_text_and_control_are_scaled_each_by_its_own(text_scale, control_scale, forwards, expected):
    value, transformer = guided(text_scale, control_scale)
    assert value == pytest.approx(expected, rel=1e-6)
    assert [call[0] for call in transformer.calls] == [2 * forwards]  # one batch holds all branches
    assert sum(b.weight for b in guidance_branches(text_scale, control_scale)) == pytest.approx(1)


def test_without_guidance_one_forward_of_the_batch_and_every_frame_its_own_signal():
    vocabulary = ControlVocabulary(["D", "N"], torch.tensor([[1.0], [2.0]]), torch.tensor([9.0]))
    transformer = LinearTransformer()
    denoiser = GuidedDenoiser(transformer, guidance_branches(1, 1), torch.zeros(1, 3, 2), None, vocabulary)
    control = denoiser.control_embeds([[[0], [1], [-1]]])
    v = denoiser(torch.zeros(1, 3, 1, 1, 1), torch.tensor(999), control)
    assert v.flatten().tolist() == [1.0, 2.0, 9.0]
    ((batch, timestep, seen, _),) = transformer.calls
    assert batch == 1 and timestep.tolist() == [999] and seen.shape == (1, 3, 1)


def test_per_frame_timesteps_reach_the_transformer_for_every_branch():
    _, transformer = guided(6, 3, batch=1)
    assert transformer.calls[0][1].tolist() == [[0, 999]] * 3


def test_two_branches_combine_as_diffusers_does_to_the_last_bit():
    uncond, text = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).unbind()
    assert torch.equal(combine_branches([uncond, text], guidance_branches(6.0, 1.0)), uncond + 6.0 * (text - uncond))


def test_dynamic_guidance_rises_from_one_and_never_jumps():
    scales = [dynamic_guidance_scale(6.0, i, 50) for i in range(50)]
    steps = [b - a for a, b in zip(scales, scales[1:], strict=False)]
    assert scales[0] == 1 and 6 < scales[-1] < 7 and min(steps) >= 0 and max(steps) < 1


@pytest.mark.parametrize("dim", [16, 256, 33])
def test_guidance_embedding_is_the_one_of_latent_consistency_models(dim):
    scales = torch.tensor([1.0, 2.5, 7.0])
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scales, dim)
    torch.testing.assert_close(guidance_scale_embedding(scales, dim), theirs, rtol=0, atol=1e-3)
    assert guidance_scale_embedding(scales, dim).unique(dim=0).shape[0] == 3


TOLD = CogVideoXSwinLCMScheduler(guidance_range=[2.0, 6.0])


@pytest.mark.parametrize(
    ("scheduler", "asked", "scale"),
    [
        (CogVideoXSwinDPMScheduler(), (None, 3.0), 1.0),
        (CogVideoXSwinDPMScheduler(), (6.0, 3.0), 6.0),
        (CogVideoXSwinDPMScheduler(), (0.0, 3.0), "^guidance_scale 0: 1 is for no guidance"),
        (CogVideoXSwinDPMScheduler(), (6.0, float("nan")), "^control_guidance_scale nan: 1 is for no guidance"),
        (CogVideoXSwinLCMScheduler(), (None, 1.0), 1.0),
        (CogVideoXSwinLCMScheduler(), (1.0, 1.0), 1.0),
        (CogVideoXSwinLCMScheduler(), (3.0, 1.0), "^guidance_scale 3: .* it takes 1$"),
        (CogVideoXSwinLCMScheduler(), (None, 2.0), "^control_guidance_scale 2: .* it takes 1$"),
        (TOLD, (None, 1.0), 4.0),
        (TOLD, (6.0, 1.0), 6.0),
        (TOLD, (1.0, 1.0), "^guidance_scale 1: .* it takes 2 … 6$"),
        (TOLD, (3.0, 2.0), "^control_guidance_scale 2: .* it takes 1$"),
    ],
)
def test_a_distilled_model_takes_the_guidance_it_was_taught_and_no_other(scheduler, asked, scale):
    if isinstance(scale, float):
        assert checked_guidance_scale(scheduler, *asked) == scale
        return
    with pytest.raises(UserError, match=scale):
        checked_guidance_scale(scheduler, *asked)
