"""The picture: reproducible, and readable. Motion is measured from pixels and compared with the simulator's truth."""

import numpy as np
import pytest

from data.miniworld.looks import BIOMES, WEATHERS, Look, random_look
from data.miniworld.render import CAMERA_HEIGHT, FOCAL_LENGTH, horizon_row, render
from data.miniworld.simulator import State, random_signals, simulate

HEIGHT, WIDTH = 64, 96
EVERY = 3  # pairs of frames measured, to save time


def measured_yaw(video):
    """Radians turned between frames: the shift of the band above the horizon, in bearing, that fits best."""
    rows = horizon_row(HEIGHT)
    band = video[:, rows - 16 : rows].astype(np.float32).mean(axis=(1, 3))  # [N, w]: mean over rows
    band = np.concatenate([band, video[:, rows - 8 : rows].astype(np.float32).mean(axis=(1, 3))], axis=1)
    bearing = np.arctan((np.arange(WIDTH) + 0.5 - WIDTH / 2) / (FOCAL_LENGTH * WIDTH))  # right of the middle
    candidates = np.linspace(-0.05, 0.05, 101)
    inner = bearing[np.abs(bearing) < bearing.max() - 0.06]
    turned = []
    for before, after in list(zip(band[:-1], band[1:], strict=True))[::EVERY]:
        errors = np.zeros(len(candidates))
        for part in (slice(0, WIDTH), slice(WIDTH, 2 * WIDTH)):
            now = np.interp(inner, bearing, after[part])
            # After a turn to the left by a, what was at bearing b is at b + a.
            errors += [np.square(now - np.interp(inner - a, bearing, before[part])).sum() for a in candidates]
        turned.append(candidates[np.argmin(errors)])
    return np.array(turned)


def measured_speed(video):
    """m/s on a straight drive: how far the ground beside the car moved towards the camera."""
    rows = horizon_row(HEIGHT)
    ahead = FOCAL_LENGTH * WIDTH * CAMERA_HEIGHT / (np.arange(HEIGHT - rows) + 0.5)
    ground = video[:, rows:].astype(np.float32).mean(axis=3)
    lateral = np.linspace(1.7, 4.5, 25)  # metres beside the camera's path, both sides
    distance = np.linspace(5.5, 13.0, 60)
    fits = (distance[:, None], np.concatenate([-lateral, lateral])[None])

    def look_down(frame, forward):
        """Ground brightness on a grid of metres, `forward` m further ahead than now."""
        below = FOCAL_LENGTH * WIDTH * CAMERA_HEIGHT / (fits[0] + forward) - 0.5
        column = fits[1] / (fits[0] + forward) * FOCAL_LENGTH * WIDTH + WIDTH / 2 - 0.5
        row = np.clip(below, 0, len(ahead) - 1.001) + 0 * column
        column = np.clip(column, 0, WIDTH - 1.001)
        r, c = row.astype(int), column.astype(int)
        y, x = row - r, column - c
        top, bottom = frame[r, c] * (1 - x) + frame[r, c + 1] * x, frame[r + 1, c] * (1 - x) + frame[r + 1, c + 1] * x
        return top * (1 - y) + bottom * y

    candidates = np.arange(-6, 13.1, 0.5)
    speeds = []
    for before, after in list(zip(ground[:-1], ground[1:], strict=True))[::EVERY]:
        now = look_down(after, 0.0)
        errors = [np.square(now - look_down(before, v / 16)).mean() for v in candidates]
        speeds.append(candidates[np.argmin(errors)])
    return np.array(speeds)


def test_same_seed_same_pixels_other_seed_other_pixels():
    look, caption = random_look(5)
    assert (look, caption) == random_look(5) and look != random_look(6)[0]
    car = simulate(["D"] * 6, seed=1)
    video = render(car, look)
    assert video.shape == (6, 64, 96, 3) and video.dtype == np.uint8
    np.testing.assert_array_equal(video, render(car, look))
    other = Look(look.biome, look.weather, look.color, look.seed + 1)
    assert (video != render(car, other)).any()
    assert (video[0] != render(simulate(["D"], seed=2), look)[0]).any()


def test_drawn_in_pieces_equals_drawn_at_once():
    car = simulate(["DL"] * 70, seed=0)  # longer than one chunk of the renderer
    look = Look("grass", "rain", "red", 3)
    pieces = np.concatenate([render(car[:31], look), render(car[31:], look, first_frame=31)])
    np.testing.assert_array_equal(pieces, render(car, look))


def test_horizon_shift_tells_the_yaw_rate():
    true, measured = [], []
    for index, biome in enumerate(BIOMES):
        car = simulate(random_signals(40, np.random.default_rng(index)), seed=index)
        video = render(car, Look(biome, WEATHERS[index % len(WEATHERS)], "red", index))
        true.append(car.yaw_rate[1::EVERY] / 16)
        measured.append(measured_yaw(video))
    assert np.corrcoef(np.concatenate(true), np.concatenate(measured))[0, 1] > 0.97


def test_ground_flow_tells_the_speed():
    true, measured = [], []
    for index, biome in enumerate(BIOMES):
        signals = [signal for signal in ("D", "N", "B", "D") for _ in range(10)]
        # On the road, between line and kerb, along it.
        car = simulate(signals, start=State(x=2.0 + 0.2 * index, y=5.0 * index, heading=0.0, speed=2.0))
        video = render(car, Look(biome, WEATHERS[index % len(WEATHERS)], "blue", index))
        true.append(car.speed[1::EVERY])
        measured.append(measured_speed(video))
    assert np.corrcoef(np.concatenate(true), np.concatenate(measured))[0, 1] > 0.95


def test_lights_show():
    """Braking reddens and reversing whitens the back of the car; the rest of the picture stays."""
    look = Look("grass", "clear", "blue", 0)
    braking = simulate(["B"], start=State(0.0, 0.0, 0.0, speed=8.0))
    coasting = type(braking)(**{**vars(braking), "braking": np.zeros(1)})
    on, off = render(braking, look)[0].astype(int), render(coasting, look)[0].astype(int)
    changed = np.argwhere((on != off).any(axis=-1))
    assert len(changed) and (on - off)[..., 0].max() > 60 and changed[:, 0].min() > HEIGHT // 2
    reversing = simulate(["B"], start=State(0.0, 0.0, 0.0, speed=-4.0))
    dark = type(reversing)(**{**vars(reversing), "reversing": np.zeros(1)})
    assert (render(reversing, look)[0].astype(int) - render(dark, look)[0]).min(axis=-1).max() > 60


def test_car_leans_into_the_turn_mirror_wise():
    look = Look("snow", "fog", "black", 0)
    left, right = (simulate(["N" + wheel] * 8, start=State(0.0, 0.0, 0.0)) for wheel in "LR")
    patch = np.s_[36:60, 28:68]
    a, b = render(left, look)[-1][patch].astype(int), render(right, look)[-1][patch].astype(int)
    dark = (np.abs(a - 40).max(-1) < 12, np.abs(b - 40).max(-1) < 12)
    assert abs(np.argwhere(dark[0])[:, 1].mean() - np.argwhere(dark[1])[:, 1].mean()) > 2


def test_biomes_and_weathers_look_different():
    car = simulate(["D"], start=State(0.0, 0.0, 0.0))
    means = {
        (biome, weather): render(car, Look(biome, weather, "red", 0))[0].reshape(-1, 3).mean(0)
        for biome in BIOMES
        for weather in WEATHERS
    }
    values = np.array(list(means.values()))
    gaps = np.abs(values[:, None] - values[None]).max(-1) + 255 * np.eye(len(values))
    assert gaps.min() > 1.5


@pytest.mark.parametrize("size", [(32, 48), (96, 144)])
def test_other_sizes(size):
    assert render(simulate(["D"]), random_look(0)[0], *size).shape == (1, *size, 3)


def test_wrong_size_and_look_are_refused():
    with pytest.raises(ValueError, match="multiples of 16"):
        render(simulate(["D"]), random_look(0)[0], 60, 96)
    with pytest.raises(ValueError, match="biome is 'moon'; known are desert"):
        Look("moon", "clear", "red")
