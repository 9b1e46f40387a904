"""The schedulers against diffusers' own and against the reference's numbers."""

from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from safetensors.torch import load_file

from common.cogvideox.noise_schedule import ddim_step
from common.cogvideox.scheduler import (
    CogVideoXSwinDDIMScheduler,
    CogVideoXSwinDPMScheduler,
    CogVideoXSwinLCMScheduler,
    expand_group_timesteps,
)

FIXTURE = Path(__file__).parents[2] / "fixtures" / "reference_2b_layout.safetensors"
COGVIDEOX = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
SWIN = (CogVideoXSwinDPMScheduler, CogVideoXSwinDDIMScheduler, CogVideoXSwinLCMScheduler)


@pytest.fixture(scope="module")
def reference():
    return {key[10:]: value for key, value in load_file(FIXTURE).items() if key.startswith("scheduler.")}


def frames(timesteps):
    """[F] → [1,F−1,1,1,1]: the reference steps the frames after the condition."""
    return timesteps[None, 1:, None, None, None]


def noise_like(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# The reference's numbers


def test_alphas_and_grids_match_the_reference(reference):
    scheduler = CogVideoXSwinDPMScheduler()
    torch.testing.assert_close(scheduler.alpha_table()[:-1], reference["alphas_cumprod"], rtol=0, atol=1e-12)
    scheduler.set_timesteps(20)
    assert torch.equal(expand_group_timesteps(scheduler.timesteps, 9, 4), reference["grid20"])
    lcm = CogVideoXSwinLCMScheduler()
    lcm.set_timesteps()
    assert torch.equal(lcm.timesteps, reference["lcm_timesteps"])
    assert torch.equal(expand_group_timesteps(lcm.timesteps, 9, 4), reference["lcm_grid"])


@pytest.mark.parametrize("row, order", [(0, "first"), (2, "second")])
def test_dpm_step_matches_the_reference(reference, row, order):
    scheduler = CogVideoXSwinDPMScheduler()
    scheduler.set_timesteps(20)
    grid, sample = reference["grid20"], reference["sample"]
    old = reference["old_x0"] if order == "second" else None
    back = frames(grid[row - 1]) if order == "second" else None
    prev, x0 = scheduler.step(
        reference["model_output"], old, frames(grid[row]), back, sample, variance_noise=torch.zeros_like(sample)
    )
    torch.testing.assert_close(prev, reference[f"dpm_{order}_order_zero_noise"], rtol=0, atol=1e-5)
    if row == 0:
        torch.testing.assert_close(x0, reference["dpm_x0"], rtol=0, atol=1e-5)


def test_ddim_step_matches_the_reference(reference):
    scheduler = CogVideoXSwinDDIMScheduler()
    scheduler.set_timesteps(20)
    out = scheduler.step(reference["model_output"], frames(reference["grid20"][1]), reference["sample"])
    torch.testing.assert_close(out.prev_sample, reference["ddim_prev"], rtol=0, atol=1e-5)


def test_lcm_jump_matches_the_reference_above_the_lowest_phase(reference):
    """The reference mixes with a softened boundary term (below 1e-5 here) and returns the same tensor twice.

    In the lowest phase it stops at timestep 0, σ = .05, and calls that clean; ours ends where nothing is left, at x̂0.
    """
    scheduler = CogVideoXSwinLCMScheduler()
    grid, sample, output = frames(reference["lcm_grid"][0]), reference["sample"], reference["model_output"]
    prev, x0 = scheduler.step(output, grid, sample, return_dict=False)
    torch.testing.assert_close(prev[:, 2:], reference["lcm_prev"][:, 2:], rtol=0, atol=1e-5)
    lowest = slice(0, 2)
    assert torch.equal(prev[:, lowest], x0[:, lowest])
    stopped = ddim_step(sample, x0, grid, torch.zeros_like(grid), scheduler.alpha_table())
    torch.testing.assert_close(stopped[:, lowest], reference["lcm_prev"][:, lowest], rtol=0, atol=1e-5)


# diffusers' own schedulers


@pytest.mark.parametrize("clean", [-1, 0])
@pytest.mark.parametrize("kind", [CogVideoXSwinDPMScheduler, CogVideoXSwinDDIMScheduler, CogVideoXSwinLCMScheduler])
def test_a_whole_window_may_be_stepped_and_a_clean_condition_stays(kind, clean):
    scheduler = kind(frames_per_group=1)
    scheduler.set_timesteps(None if scheduler.is_distilled else 8)
    x, v = noise_like((1, 5, 4, 2, 2)), noise_like((1, 5, 4, 2, 2), seed=1)
    told = torch.tensor([[clean, 249, 499, 749, 999]])
    below = torch.tensor([[clean, 124, 374, 624, 874]])
    if kind is CogVideoXSwinDPMScheduler:
        made = scheduler.step(v, None, told, None, x, prev_timestep=below, variance_noise=torch.zeros_like(x))[0]
    else:
        made = scheduler.step(v, told, x, prev_timestep=below).prev_sample
    assert torch.isfinite(made).all() and (made[:, 1:] != x[:, 1:]).all()
    assert torch.equal(made[:, 0], x[:, 0])
    if scheduler.is_distilled:
        assert scheduler.phase_boundary(torch.tensor([-1, 0, 249, 250])).tolist() == [-1, -1, -1, 249]
        assert scheduler.solver_timestep(torch.tensor([-1, 0, 24, 25])).tolist() == [-1, -1, -1, 0]


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("steps", [5, 20, 50])
def test_one_group_equals_diffusers_ddim(steps, per_frame):
    theirs, ours = CogVideoXDDIMScheduler(**COGVIDEOX), CogVideoXSwinDDIMScheduler(num_noise_groups=1)
    theirs.set_timesteps(steps)
    ours.set_timesteps(steps)
    x = y = noise_like((2, 3, 4, 2, 2))
    for i, t in enumerate(theirs.timesteps):
        v = noise_like(x.shape, seed=i + 1)
        x = theirs.step(v, t, x).prev_sample
        y = ours.step(v, t.expand(2, 3)[..., None, None, None] if per_frame else t, y).prev_sample
        assert torch.equal(x, y)
    assert y.abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("steps", [5, 20])
def test_one_group_equals_diffusers_dpm(steps, per_frame, dtype):
    theirs, ours = CogVideoXDPMScheduler(**COGVIDEOX), CogVideoXSwinDPMScheduler(num_noise_groups=1)
    theirs.set_timesteps(steps)
    ours.set_timesteps(steps)
    x = y = noise_like((2, 3, 4, 2, 2), dtype=dtype)
    old_x = old_y = None
    for i, t in enumerate(theirs.timesteps):
        v = noise_like(x.shape, seed=i + 1, dtype=dtype)
        back = theirs.timesteps[i - 1] if i > 0 else None
        generator = torch.Generator().manual_seed(i)
        if per_frame:
            # diffusers draws, and from its second order step on draws again and uses that
            draws = [torch.randn(x.shape, generator=generator, dtype=dtype) for _ in range(2)]
            used = draws[0] if old_x is None or t == theirs.timesteps[-1] else draws[1]
            t_ours, back_ours = (s if s is None else s.expand(2, 3)[..., None, None, None] for s in (t, back))
            y, old_y = ours.step(v, old_y, t_ours, back_ours, y, variance_noise=used)
            generator = generator.manual_seed(i)
        else:
            again = torch.Generator().manual_seed(i)
            y, old_y = ours.step(v, old_y, t, back, y, generator=again)
        x, old_x = theirs.step(v, old_x, t, back, x, generator=generator)
        assert torch.equal(x, y) and torch.equal(old_x, old_y)


def test_a_diffusers_scheduler_becomes_ours_and_survives_saving(tmp_path):
    base = CogVideoXDDIMScheduler(**COGVIDEOX, snr_shift_scale=1.0)
    for cls in SWIN:
        ours = cls.from_config(base.config, num_noise_groups=2, frames_per_group=3)
        assert torch.equal(ours.alpha_table()[:-1], base.alphas_cumprod)
        ours.save_pretrained(tmp_path / cls.__name__)
        again = cls.from_pretrained(tmp_path / cls.__name__)
        fields = {key: value for key, value in ours.config.items() if key != "_use_default_values"}
        assert dict(again.config) == fields and again.num_window_frames == 7


@pytest.mark.parametrize("target", [CogVideoXSwinDPMScheduler, CogVideoXSwinDDIMScheduler, CogVideoXSwinLCMScheduler])
@pytest.mark.parametrize("source", [CogVideoXSwinDPMScheduler, CogVideoXSwinDDIMScheduler, CogVideoXSwinLCMScheduler])
def test_from_config_keeps_what_differs_from_the_2b(source, target, tmp_path):
    """The 5B's schedule is not shifted; stage 4 makes its scheduler from stage 3's, stage 3 from the base's."""
    base = CogVideoXDDIMScheduler(
        snr_shift_scale=1.0, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    source.from_config(base.config, frames_per_group=1).save_pretrained(tmp_path)
    made = target.from_config(source.from_pretrained(tmp_path).config, num_noise_groups=2)
    config = made.config
    assert (config.snr_shift_scale, config.frames_per_group, config.num_noise_groups) == (1.0, 1, 2)
    torch.testing.assert_close(made.alphas_cumprod, base.alphas_cumprod, rtol=0, atol=0)
