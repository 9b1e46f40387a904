"""The sliding window without a network: a stand-in transformer that knows the truth tells what each frame obeyed."""

import pytest
import torch

from common.cogvideox.control_adapter import ControlVocabulary
from common.cogvideox.guidance import GuidedDenoiser, guidance_branches
from common.cogvideox.noise_schedule import CLEAN
from common.cogvideox.scheduler import (
    CogVideoXSwinDDIMScheduler,
    CogVideoXSwinDPMScheduler,
    CogVideoXSwinLCMScheduler,
    expand_group_timesteps,
)
from common.cogvideox.signal_sources import make_signal_source
from common.cogvideox.streaming import VideoStream
from common.cogvideox.window import make_window_plan, num_chunks_for
from common.config.errors import UserError

NAMES = ["D", "DL", "DR", "B", "BL", "BR", "N", "NL", "NR"]
VOCABULARY = ControlVocabulary(NAMES, torch.arange(9.0)[:, None] + 1, torch.tensor([-7.0]))
SCHEDULERS = {
    "dpm": lambda **kw: CogVideoXSwinDPMScheduler(**kw),
    "ddim": lambda **kw: CogVideoXSwinDDIMScheduler(**kw),
    "lcm": lambda **kw: CogVideoXSwinLCMScheduler(**kw),
    "lcm2": lambda **kw: CogVideoXSwinLCMScheduler(phases_per_group=2, **kw),
}


class Oracle(torch.nn.Module):
    """Predicts the v whose x̂0 is the frame's control row (+ `leak` of the noisy frame) at the timestep it is told."""

    dtype = torch.float32

    def __init__(self, leak=0.0):
        super().__init__()
        self.leak, self.told, self.seen = leak, [], []
        self.alphas = CogVideoXSwinDDIMScheduler().alpha_table().float()

    def forward(self, hidden_states, encoder_hidden_states, timestep, control_embeds, **rest):
        self.told.append(timestep)
        self.seen.append(hidden_states)
        alpha = self.alphas[timestep].reshape(*timestep.shape, *(1,) * (5 - timestep.ndim))
        x0 = control_embeds[..., None, None] + self.leak * hidden_states.sin()
        return ((alpha.sqrt() * hidden_states - x0) / (1 - alpha).sqrt(),)


def make_stream(controls, scheduler="ddim", width=2, steps=8, seed=0, oracle=None, init=None, chunks=None, **config):
    scheduler = SCHEDULERS[scheduler](frames_per_group=width, **config)
    steps = None if scheduler.is_distilled else steps
    batch = len(controls)
    oracle = oracle or Oracle()
    denoiser = GuidedDenoiser(oracle, guidance_branches(1, 1), torch.zeros(batch, 2, 3), None, VOCABULARY)
    plan = make_window_plan(scheduler, steps, torch.device("cpu"))
    seeds = seed if isinstance(seed, list) else [seed]
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    sources = [make_signal_source(control, VOCABULARY) for control in controls]
    shape = (batch, plan.num_frames, 1, 2, 2)
    generator = generators if isinstance(seed, list) else generators[0]
    return VideoStream(denoiser, scheduler, plan, None, sources, shape, generator, init, chunks), oracle


def values(latents):
    """[1,W,1,2,2] → one number a frame; all pixels agree."""
    assert (latents - latents[..., :1, :1]).abs().max() < 1e-4
    return [round(v, 3) for v in latents[0, :, 0, 0, 0].tolist()]


# Control reaches the right frames


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("from_text", [True, False])
def test_a_schedule_reaches_exactly_its_frames(scheduler, width, from_text):
    schedule = [j % 9 for j in range(60)]
    init = None if from_text else torch.zeros(1, 1 + 4 * width, 1, 2, 2)
    stream, _ = make_stream([schedule], scheduler, width, init=init)
    made = sum((values(stream.advance()) for _ in range(8)), [])
    expected = [j % 9 + 1.0 for j in range(1 + 8 * width)]
    if not from_text:
        expected[0] = 0.0  # the init video's own frame, handed on untouched
    assert made == expected


@pytest.mark.parametrize("scheduler", ["dpm", "lcm"])
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("from_text", [True, False])
def test_live_the_newest_command_rules_everything_still_in_noise(scheduler, width, from_text):
    """The command in force when a chunk is asked for is what that very chunk shows; asked once a shift, not ahead."""
    state = {"command": "D", "asked": 0}

    def ask():
        state["asked"] += 1
        return state["command"]

    init = None if from_text else torch.zeros(1, 1 + 4 * width, 1, 2, 2)
    stream, oracle = make_stream([ask], scheduler, width, init=init)
    assert state["asked"] == 0
    for shift, name in enumerate(["D", "DL", "DL", "B", "N", "NR"]):
        state["command"] = name
        before = len(oracle.told)
        made = stream.advance()
        assert values(made[:, -width:]) == [NAMES.index(name) + 1.0] * width
        assert state["asked"] == shift + 1 + from_text
        assert len(oracle.told) > before


# Another prompt


def prompt_stream(text_scale=1.0, seed=0):
    """A stream of the second signal whose truth is moved by what the text says; and a prompt of a given value."""

    class Reader(Oracle):
        def forward(self, hidden_states, encoder_hidden_states, timestep, control_embeds, **rest):
            said = encoder_hidden_states.mean(dim=(1, 2))[:, None, None]
            return super().forward(hidden_states, encoder_hidden_states, timestep, control_embeds + said)

    def prompt(value):
        return torch.full((1, 2, 3), float(value))

    stream, _ = make_stream([[1] * 60], "dpm", seed=seed, oracle=Reader(leak=0.1))
    branches = guidance_branches(text_scale, 1)
    stream.denoiser = GuidedDenoiser(Reader(leak=0.1), branches, prompt(0), prompt(0), VOCABULARY)
    return stream, prompt


@pytest.mark.parametrize("text_scale", [1.0, 3.0])
def test_a_new_prompt_rules_from_the_next_shift_on_and_changes_nothing_before(text_scale):
    plain, _ = prompt_stream(text_scale)
    changed, prompt = prompt_stream(text_scale)
    expected = [plain.advance() for _ in range(6)]
    made = [changed.advance() for _ in range(3)]
    changed.change_prompt(prompt(20), prompt(0))
    made += [changed.advance() for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(made[:3], expected, strict=False))
    for before, after in zip(expected[3:], made[3:], strict=True):
        torch.testing.assert_close(after - before, torch.full_like(after, 20 * text_scale), atol=0.3, rtol=0)
    again, prompt = prompt_stream(text_scale)  # at the same shift the same change gives the same frames
    [again.advance() for _ in range(3)]
    again.change_prompt(prompt(20), prompt(0))
    assert torch.equal(again.advance(), made[3])


def test_the_same_prompt_again_changes_nothing_and_a_shared_denoiser_is_not_told():
    plain, prompt = prompt_stream()
    changed, _ = prompt_stream()
    shared = changed.denoiser
    for _ in range(3):
        changed.change_prompt(prompt(0), prompt(0))
        assert torch.equal(changed.advance(), plain.advance())
    changed.change_prompt(prompt(5))  # without guidance on text nobody asks for the negative prompt
    assert shared.constants["encoder_hidden_states"].abs().max() == 0
    with pytest.raises(ValueError, match="the new prompt is"):
        changed.change_prompt(torch.zeros(1, 7, 3))


# Noise levels


@pytest.mark.parametrize("scheduler, forwards", [("dpm", 2), ("ddim", 2), ("lcm", 1), ("lcm2", 2)])
def test_a_shift_takes_its_share_of_the_steps_at_the_right_levels(scheduler, forwards):
    stream, oracle = make_stream([None], scheduler, steps=8)
    grid = stream.scheduler.timesteps
    for _ in range(3):
        stream.advance()
    told = oracle.told
    assert [t.tolist() for t in told[: len(grid)]] == [[t] for t in grid.tolist()]  # start: one timestep for all
    rows = expand_group_timesteps(grid, 9, 4).tolist()
    assert [t.tolist() for t in told[len(grid) :]] == [[row] for row in rows] * 3 and len(rows) == forwards


def test_the_noise_of_every_frame_is_what_its_timestep_says():
    """Where the truth is 0 everywhere, a frame told t has mean square 1−ᾱ_t: at entry and after any step."""

    class Zero(Oracle):
        def forward(self, hidden_states, encoder_hidden_states, timestep, control_embeds, **rest):
            return super().forward(hidden_states, encoder_hidden_states, timestep, 0 * control_embeds)

    oracle = Zero()
    scheduler = SCHEDULERS["dpm"]()
    plan = make_window_plan(scheduler, 8, torch.device("cpu"))
    denoiser = GuidedDenoiser(oracle, guidance_branches(1, 1), torch.zeros(1, 2, 3), None, VOCABULARY)
    source = make_signal_source(None, VOCABULARY)
    generator = torch.Generator().manual_seed(0)
    stream = VideoStream(denoiser, scheduler, plan, None, [source], (1, 9, 1, 64, 64), generator)
    for _ in range(4):
        stream.advance()
    assert len(oracle.seen) == 8 + 4 * 2
    for seen, told in zip(oracle.seen[8:], oracle.told[8:], strict=True):
        expected = 1 - oracle.alphas[told[0, 1:]]
        torch.testing.assert_close(seen[0, 1:].square().mean(dim=(1, 2, 3)), expected, rtol=0.1, atol=1e-5)


@pytest.mark.parametrize("scheduler", ["dpm", "ddim", "lcm"])
def test_condition_frames_are_clean_unless_asked_otherwise(scheduler):
    def condition_noise(condition_timestep):
        stream, oracle = make_stream([[0] * 60], scheduler, condition_timestep=condition_timestep)
        for _ in range(3):
            stream.advance()
        assert oracle.told[-1][0, 0] == max(condition_timestep, 0)
        return (oracle.seen[-1][:, 0] - 1.0).abs().max()  # signal D is 1.0

    assert condition_noise(CLEAN) < 1e-5 and condition_noise(200) > 0.1


# Random numbers, length, state


@pytest.mark.parametrize("scheduler", ["dpm", "lcm"])
def test_one_generator_fixes_a_stream_and_its_length_changes_nothing(scheduler):
    def run(count, seed=0):
        stream, _ = make_stream([None], scheduler, seed=seed, oracle=Oracle(leak=0.5))
        return [stream.advance() for _ in range(count)]

    short, long, other = run(3), run(6), run(3, seed=1)
    for a, b, c in zip(short, long, other, strict=False):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_global_random_numbers_are_neither_used_nor_disturbed():
    def run(global_seed):
        torch.manual_seed(global_seed)
        stream, _ = make_stream([None], "dpm", oracle=Oracle(leak=0.5))
        made = [stream.advance() for _ in range(2)]
        return made, torch.rand(1)

    (first, after_first), (second, _) = run(1), run(2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after_first)


def test_streams_side_by_side_equal_streams_alone():
    controls = [[j % 9 for j in range(40)], "B"]

    def run(some_controls, seeds):
        stream, _ = make_stream(some_controls, "dpm", seed=seeds, oracle=Oracle(leak=0.5))
        return torch.cat([stream.advance() for _ in range(4)], dim=1)

    both = run(controls, [3, 4])
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], run(controls[i : i + 1], [3 + i]), rtol=0, atol=1e-6)


def test_what_a_stream_carries_does_not_grow():
    stream, _ = make_stream([(j % 9 for j in range(10_000))], "dpm")

    def size():
        state = stream._state
        return state.latents.numel(), state.old_x0.numel(), len(stream.sources[0]._ahead)

    stream.advance()
    before = size()
    for _ in range(30):
        stream.advance()
    assert size() == before and stream._state.first_frame == 60


def test_gradients_are_never_recorded_and_the_callers_mode_is_left_alone():
    stream, _ = make_stream([None])
    latents = stream.advance()
    assert not latents.requires_grad and torch.is_grad_enabled()


@pytest.mark.parametrize("seconds, chunks", [(0.1, 1), (9 / 16, 1), (10 / 16, 2), (20, 40), (60, 120)])
def test_seconds_are_reached(seconds, chunks):
    assert num_chunks_for(seconds, 16, 8) == chunks
    assert 1 + 8 * chunks >= round(seconds * 16)


@pytest.mark.parametrize("groups, steps", [(1, 20), (2, 20), (4, 20), (5, 20), (8, 24), (10, 20), (25, 25), (50, 50)])
def test_the_default_steps_are_the_nearest_to_20_that_the_groups_divide(groups, steps):
    plan = make_window_plan(SCHEDULERS["ddim"](num_noise_groups=groups), None, torch.device("cpu"))
    assert len(plan.uniform) == steps and len(plan.steps) == steps // groups


def test_steps_that_do_not_fit_the_groups_are_refused():
    with pytest.raises(UserError, match="4 noise groups"):
        make_window_plan(SCHEDULERS["ddim"](), 10, torch.device("cpu"))
