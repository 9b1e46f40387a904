"""The prepared window against the same stream written out with the scheduler's public `step`, frame by frame."""

import torch

from common.cogvideox.noise_schedule import expand_group_timesteps
from common.cogvideox.window import WindowState
from tests.common.cogvideox.test_streaming import Oracle, make_stream

G, W, STEPS = 4, 2, 12


def by_hand(scheduler, oracle, num_shifts):
    """A stream from text with nothing prepared: every frame's history is looked up in a dict by its number."""
    generator = torch.Generator().manual_seed(0)

    def draw(frames):
        return torch.randn((1, frames, 1, 2, 2), generator=generator)

    def predict(latents, told):
        control = torch.full((1, latents.shape[1], 1), -7.0)  # the null row of the tests' vocabulary
        return oracle(latents, None, told, control)[0]

    scheduler.set_timesteps(STEPS)
    grid = scheduler.timesteps
    latents, old = draw(9), None
    for i, t in enumerate(grid):
        told = t.expand(1, 9)[..., None, None, None]
        back = grid[i - 1].expand_as(told) if i else None
        v = predict(latents, t.expand(1))
        latents, old = scheduler.step(v, old, told, back, latents, variance_noise=draw(9))

    rows = expand_group_timesteps(grid, 9, G)  # [3,9]
    frames = scheduler.add_noise(latents[:, 1:], draw(8), rows[:1, 1:])
    latents, first, made = torch.cat([latents[:, :1], frames], dim=1), 0, []
    for shift in range(num_shifts):
        if shift:
            latents, first = torch.cat([latents[:, W:], draw(W)], dim=1), first + W
        history = {}
        for row in rows:
            v, noise = predict(latents, row[None]), draw(8)
            stepped = []
            for f in range(1, 9):
                x0_old, back = history.get(first + f, (None, None))
                one = slice(f, f + 1)
                t = row[f].reshape(1, 1, 1, 1, 1)
                x, x0 = scheduler.step(v[:, one], x0_old, t, back, latents[:, one], variance_noise=noise[:, f - 1 : f])
                history[first + f] = (x0, t)
                stepped.append(x)
            latents = torch.cat([latents[:, :1], *stepped], dim=1)
        made.append(latents[:, (1 if shift else 0) : 1 + W])
    return made


def test_a_stream_equals_the_same_written_out():
    stream, _ = make_stream([None], "dpm", width=W, steps=STEPS, oracle=Oracle(leak=0.5))
    prepared = [stream.advance() for _ in range(6)]
    expected = by_hand(stream.scheduler, Oracle(leak=0.5), 6)
    for a, b in zip(prepared, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_shift_moves_frames_and_ends_their_history():
    latents = torch.arange(9.0).reshape(1, 9, 1, 1, 1)
    state = WindowState(latents, first_frame=4, old_x0=10 + latents[:, 1:])
    moved = state.shift(torch.full((1, 2, 1, 1, 1), 99.0))
    assert moved.latents.flatten().tolist() == [2, 3, 4, 5, 6, 7, 8, 99, 99]
    assert moved.old_x0 is None and moved.first_frame == 6
