"""Noise levels, solver steps and phases: closed forms in float64, and the grids of a window."""

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from common.cogvideox import noise_schedule
from common.cogvideox.scheduler import (
    CogVideoXSwinDDIMScheduler,
    CogVideoXSwinDPMScheduler,
    CogVideoXSwinLCMScheduler,
    expand_group_timesteps,
    sample_group_timesteps,
)

SWIN = (CogVideoXSwinDPMScheduler, CogVideoXSwinDDIMScheduler, CogVideoXSwinLCMScheduler)
ALPHA_0 = (1 - 0.00085) / (3 - 2 * (1 - 0.00085))  # ᾱ at timestep 0 after the shift by 3; the rescaling keeps it
SIGMA_0 = (1 - ALPHA_0) ** 0.5  # .0505


def noise_like(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Closed forms, float64


@pytest.mark.parametrize("shape", [(2,), (2, 5), (2, 5, 1, 1, 1), (5, 1, 1, 1), ()])
def test_noise_and_velocity_give_x0_and_noise_back(shape):
    """x̂0 = √ᾱ·x_t − √(1−ᾱ)·v and ε̂ = √ᾱ·v + √(1−ᾱ)·x_t return what went in, at every level."""
    scheduler = CogVideoXSwinDPMScheduler()
    x0, noise = (noise_like((2, 5, 3, 2, 2), seed, torch.float64) for seed in (0, 1))
    t = torch.randint(0, 1000, shape, generator=torch.Generator().manual_seed(2))
    x_t, v = scheduler.add_noise(x0, noise, t), scheduler.get_velocity(x0, noise, t)
    torch.testing.assert_close(noise_schedule.predict_x0(x_t, v, t, scheduler.alpha_table()), x0, rtol=0, atol=1e-12)
    alpha = scheduler.alphas_cumprod[t]
    alpha = alpha.reshape(shape + (1,) * (5 - len(shape))) if len(shape) < 4 else alpha
    torch.testing.assert_close(alpha.sqrt() * v + (1 - alpha).sqrt() * x_t, noise, rtol=0, atol=1e-12)


def test_each_frame_gets_its_own_level():
    scheduler = CogVideoXSwinDPMScheduler()
    x0, noise = (noise_like((1, 3, 2, 2, 2), seed) for seed in (0, 1))
    noisy = scheduler.add_noise(x0, noise, torch.tensor([[-1, 0, 999]]))
    assert torch.equal(noisy[:, 0], x0[:, 0])  # −1: untouched
    assert torch.equal(noisy[:, 2], noise[:, 2])  # zero terminal SNR: nothing of the picture is left
    torch.testing.assert_close(noisy[:, 1], ALPHA_0**0.5 * x0[:, 1] + (1 - ALPHA_0) ** 0.5 * noise[:, 1])


def test_bfloat16_samples_are_noised_in_float32():
    scheduler, diffusers_own = CogVideoXSwinDDIMScheduler(), CogVideoXDDIMScheduler(rescale_betas_zero_snr=True)
    x0, noise = torch.zeros(1, 1, 1, 1, 1, dtype=torch.bfloat16), torch.ones(1, 1, 1, 1, 1, dtype=torch.bfloat16)
    sigma = scheduler.add_noise(x0, noise, torch.tensor([[0]]))
    assert sigma.dtype == torch.float32 and abs(sigma.item() - SIGMA_0) < 1e-6
    assert abs(diffusers_own.add_noise(x0, noise, torch.tensor([0])).item() - SIGMA_0) > 0.01  # why we override it


@pytest.mark.parametrize("cls", SWIN)
@pytest.mark.parametrize("steps", [4, 12, 20])
def test_the_truth_predicted_leads_to_the_truth(cls, steps):
    """With v of the true x0 and no noise added, every solver ends exactly at x0 for any number of steps."""
    scheduler = cls()
    steps = scheduler.num_phases if cls is CogVideoXSwinLCMScheduler else steps
    scheduler.set_timesteps(steps)
    x0, noise = (noise_like((1, 2, 2, 2, 2), seed, torch.float64) for seed in (0, 1))
    x, old = noise, None
    for i, t in enumerate(scheduler.timesteps):
        t = t.expand(1, 2)
        alpha = scheduler.alpha_table()[t][..., None, None, None]
        sigma = (1 - alpha).sqrt()
        v = (alpha.sqrt() * x - x0) / sigma
        if cls is CogVideoXSwinDPMScheduler:
            back = scheduler.timesteps[i - 1].expand(1, 2) if i else torch.full_like(t, -1)
            x, old = scheduler.step(v, old, t, back, x, variance_noise=torch.zeros_like(x))
        else:
            x = scheduler.step(v, t, x).prev_sample
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-11)


@pytest.mark.parametrize("steps", [12, 24, 48, 28])
def test_steps_that_do_not_divide_the_schedule_still_end_clean(steps):
    """diffusers' step of T//N ends at timestep 0 with 48 steps, with σ = .05 left."""
    for cls in (CogVideoXSwinDPMScheduler, CogVideoXSwinDDIMScheduler):
        scheduler = cls()
        scheduler.set_timesteps(steps)
        t = scheduler.timesteps
        assert torch.equal(scheduler.previous_timesteps(t), torch.cat([t[1:], torch.tensor([-1])]))
        x, v = noise_like((1, 1, 2, 2, 2)), noise_like((1, 1, 2, 2, 2), 1)
        args = (v, None, t[-1], None, x) if cls is CogVideoXSwinDPMScheduler else (v, t[-1], x)
        assert torch.equal(*scheduler.step(*args, return_dict=False))


def test_second_order_is_exact_for_x0_linear_in_log_snr():
    """2M extrapolates x̂0 along λ = log(α/σ): where x̂0 is linear in λ, a step from t to s, history at r, uses x̂0 at
    the middle of [λ_t, λ_s]; a first-order step uses x̂0 at λ_t."""
    scheduler = CogVideoXSwinDPMScheduler()
    back, t, s = (torch.tensor([[[[[value]]]]]) for value in (749, 499, 249))
    log_snr = lambda k: 0.5 * torch.log(scheduler.alpha_table()[k] / (1 - scheduler.alpha_table()[k]))  # noqa: E731
    x0 = lambda lam: 0.3 + 0.2 * lam  # noqa: E731
    x, zero = noise_like((1, 1, 1, 1, 1), dtype=torch.float64), torch.zeros(1, 1, 1, 1, 1, dtype=torch.float64)

    def run(x0_now, x0_old, where):
        alpha = scheduler.alpha_table()[t]
        v = (alpha.sqrt() * x - x0_now) / (1 - alpha).sqrt()
        scheduler.num_inference_steps = 4
        return scheduler.step(v, x0_old, t, where, x, variance_noise=zero, prev_timestep=s)[0]

    second = run(x0(log_snr(t)), x0(log_snr(back)), back)
    middle = run(x0((log_snr(t) + log_snr(s)) / 2), None, None)
    first = run(x0(log_snr(t)), None, None)
    torch.testing.assert_close(second, middle, rtol=0, atol=1e-12)
    assert (second - first).abs() > 1e-3


def test_history_is_used_per_frame():
    """A frame with history gets what it would get alone; one without (−1) gets a first-order step."""
    scheduler = CogVideoXSwinDPMScheduler()
    scheduler.set_timesteps(20)
    shape = (1, 2, 2, 2, 2)
    x, v, old, noise = (noise_like(shape, seed, torch.float64) for seed in range(4))
    t = torch.tensor([[[[[699]]], [[[949]]]]])
    back = torch.tensor([[[[[749]]], [[[-1]]]]])
    mixed = scheduler.step(v, old, t, back, x, variance_noise=noise)[0]
    with_history = scheduler.step(v, old, t, torch.full_like(t, 999).clamp(max=749), x, variance_noise=noise)[0]
    without = scheduler.step(v, None, t, None, x, variance_noise=noise)[0]
    assert torch.equal(mixed[:, 0], with_history[:, 0]) and torch.equal(mixed[:, 1], without[:, 1])
    assert not torch.equal(mixed[:, 0], without[:, 0])


# Window grids


@pytest.mark.parametrize("num_frames, groups", [(9, 4), (5, 4), (3, 1), (7, 2)])
def test_sampled_timesteps_rise_by_groups(num_frames, groups):
    t = sample_group_timesteps(512, num_frames, groups, 1000, torch.Generator().manual_seed(0))
    width, span = (num_frames - 1) // groups, 1000 // groups
    assert t.shape == (512, num_frames) and t.dtype == torch.int64 and (t[:, 0] == 0).all()
    by_group = t[:, 1:].reshape(512, groups, width)
    assert (by_group == by_group[:, :, :1]).all()
    assert (by_group[:, 1:, 0] - by_group[:, :-1, 0] == span).all()
    offset = by_group[:, 0, 0]
    assert offset.min() >= 0 and offset.max() < span and len(offset.unique()) > min(span, 512) // 2


def test_one_generator_a_sample_makes_draws_independent_of_the_batch():
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = sample_group_timesteps(2, 9, 4, 1000, generators(1, 2))
    assert torch.equal(both[1:], sample_group_timesteps(1, 9, 4, 1000, generators(2)))
    assert torch.equal(
        sample_group_timesteps(3, 9, 4, 1000, torch.Generator().manual_seed(5)),
        sample_group_timesteps(3, 9, 4, 1000, torch.Generator().manual_seed(5)),
    )


def test_after_its_rows_a_group_stands_where_its_left_neighbour_began():
    for cls, steps in zip(SWIN, (12, 20, 4), strict=True):
        scheduler = cls()
        scheduler.set_timesteps(steps)
        rows = expand_group_timesteps(scheduler.timesteps, 9, 4)
        last = rows[-1, 1:]
        end = scheduler.phase_boundary(last) if steps == 4 else scheduler.previous_timesteps(last)
        assert torch.equal(end[2:], rows[0, 1:-2]) and (end[:2] == -1).all()


# Stage 4's phases


def test_phase_boundaries_and_solver_steps():
    scheduler = CogVideoXSwinLCMScheduler()
    t = torch.tensor([0, 24, 25, 249, 250, 274, 499, 500, 750, 999])
    assert scheduler.phase_boundary(t).tolist() == [-1, -1, -1, -1, 249, 249, 249, 499, 749, 749]
    assert scheduler.solver_timestep(t).tolist() == [-1, -1, 0, 224, 249, 249, 474, 499, 749, 974]
    assert CogVideoXSwinLCMScheduler(phases_per_group=2).phase_boundary(t).tolist()[-2:] == [749, 874]


def test_consistency_function_is_a_ddim_jump_and_the_identity_on_its_boundary():
    scheduler = CogVideoXSwinLCMScheduler()
    t = torch.arange(1000)
    c_skip, c_out = noise_schedule.ddim_coefficients(t, scheduler.phase_boundary(t), scheduler.alpha_table())
    alphas = scheduler.alpha_table()
    alpha, bound = alphas[t], alphas[scheduler.phase_boundary(t)]
    torch.testing.assert_close(c_skip, ((1 - bound) / (1 - alpha)).sqrt(), rtol=0, atol=1e-12)
    torch.testing.assert_close(c_out, bound.sqrt() - alpha.sqrt() * c_skip, rtol=0, atol=1e-12)
    assert (c_skip[:250] == 0).all() and (c_out[:250] == 1).all()  # the lowest phase: f is x̂0, exactly clean
    for boundary in (-1, 249, 499, 749):
        b = torch.tensor([boundary])
        assert [c.item() for c in noise_schedule.ddim_coefficients(b, b, scheduler.alpha_table())] == [1.0, 0.0]


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"original_inference_steps": 50}, "original_inference_steps=50"),
        ({"num_train_timesteps": 1001, "num_noise_groups": 1}, "num_train_timesteps=1001"),
        ({"num_noise_groups": 3}, "num_noise_groups=3"),
        ({"phases_per_group": 3}, "12 phases"),
        ({"frames_per_group": 0}, "frames_per_group=0"),
        ({"prediction_type": "epsilon"}, "epsilon"),
        ({"set_alpha_to_one": False}, "set_alpha_to_one=False"),
    ],
)
def test_impossible_phases_are_refused_at_construction(settings, word):
    with pytest.raises(ValueError, match=word):
        CogVideoXSwinLCMScheduler(**settings)


def test_wrong_step_counts_are_refused():
    with pytest.raises(ValueError, match="distilled for 4"):
        CogVideoXSwinLCMScheduler().set_timesteps(20)
    with pytest.raises(ValueError, match="20 or 24 would"):
        expand_group_timesteps(torch.arange(21).flip(0), 9, 4)
    with pytest.raises(ValueError, match="10 latent frames"):
        expand_group_timesteps(torch.arange(20).flip(0), 10, 4)
