"""The two worlds: the game's pixels never change, and the broad world is another, wide, reproducible distribution."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from common.data.video import Video
from data.miniworld.captions import COLORS
from data.miniworld.car import SHAPES
from data.miniworld.looks import CAR_COLORS, Look, car_color, random_look
from data.miniworld.make_videos import ClipJob, make_videos, parse_arguments
from data.miniworld.render import horizon_row, render
from data.miniworld.simulator import State, random_signals, simulate
from data.miniworld.views import GAME, VEHICLES, random_view

VIEWS = [random_view(np.random.default_rng(seed)) for seed in range(300)]


def frame(seed, world):
    """The fourth frame of a drive, [64, 96, 3]."""
    look, _ = random_look(seed, world)
    return render(simulate(random_signals(4, np.random.default_rng(seed)), seed)[3:], look)[0]


def test_the_game_is_what_it_was_before_there_was_another_world():
    """Raise DRAWING_VERSION when this hash has to change: every clip, latent and model of the game depends on it."""
    digest = hashlib.sha256()
    for seed in range(12):
        look, caption = random_look(seed)
        car = simulate(random_signals(4, np.random.default_rng(seed)), seed)
        digest.update(render(car, look).tobytes() + caption.encode())
        digest.update(np.round([car.speed, car.yaw_rate], 4).tobytes())
    assert digest.hexdigest() == "9ddb12ed5b017b0b8758ae58767ebf491d02b99b1c1e6f98b18cb3f7939ce1a2"


def test_kept_clips_of_the_game_stay_and_worlds_are_not_mistaken_for_each_other(tmp_path):
    job = ClipJob(3, 7, 97, 64, 96, tmp_path / "a.mp4", tmp_path / "a.npz")
    np.testing.assert_array_equal(job.stamp(), [1, 7, 3, 97, 64, 96])
    assert not np.array_equal(replace(job, world="broad").stamp(), job.stamp())
    arguments = ["--output_dir", str(tmp_path), "--num_workers", "0", "--num_clips", "1", "--num_frames", "3"]
    make_videos(parse_arguments([*arguments, "--world", "broad"]))
    broad = Video(tmp_path / "videos" / "00000.mp4").read(np.arange(3), 64, 96)
    make_videos(parse_arguments(arguments))
    assert (Video(tmp_path / "videos" / "00000.mp4").read(np.arange(3), 64, 96) != broad).any()


def test_broad_is_reproducible_and_shares_the_drive_and_the_look_with_the_game():
    for seed in range(5):
        np.testing.assert_array_equal(frame(seed, "broad"), frame(seed, "broad"))
        broad, game = random_look(seed, "broad")[0], random_look(seed)[0]
        assert broad.view != GAME and replace(broad, view=GAME) == game


def test_broad_is_far_from_the_game_and_the_game_near_itself():
    """Fréchet distance of coarse pictures of the same biomes and weathers, their 8×8 blocks taken as independent."""

    def features(world, drive, places=0):
        """Means and spreads of the blocks; other drives, and landmarks elsewhere, are another sample of a world."""
        looks = [random_look(seed, world)[0] for seed in range(32)]
        looks = [replace(look, seed=look.seed + places) for look in looks]
        frames = np.stack([render(simulate(["D"], seed=drive + i), look)[0] for i, look in enumerate(looks)])
        blocks = frames.astype(np.float64).reshape(len(frames), 8, 8, 12, 8, 3)
        return np.concatenate([blocks.mean((2, 4)), blocks.std((2, 4))], axis=-1).reshape(len(frames), -1)

    def distance(a, b):
        return np.square(a.mean(0) - b.mean(0)).mean() + np.square(a.std(0) - b.std(0)).mean()

    game = features("game", 0)
    assert distance(game, features("broad", 300)) > 3 * distance(game, features("game", 100, places=1))


@pytest.mark.parametrize("size", [(64, 96), (32, 48)])
def test_the_vehicle_is_in_every_picture(size):
    height, width = size
    for view in VIEWS:
        wheels = horizon_row(height, view) + view.focal * width * view.height / view.distance
        half = view.focal * width / view.distance * view.vehicle_width / 2
        assert horizon_row(height, view) + 5 <= wheels <= 0.95 * height and 0.04 * width < half < 0.16 * width
        assert wheels - 2 * half > 0 and view.vehicle in SHAPES
    assert {view.vehicle for view in VIEWS} == set(VEHICLES) == set(SHAPES)


def test_most_cameras_are_where_the_game_has_its_own():
    def near(view):
        pairs = ((view.height, 2.7, 0.4), (view.distance, 6.0, 0.4), (view.focal, 0.68, 0.3))
        return abs(view.horizon - 0.41) < 0.1 and all(abs(np.log(a / b)) < tolerance for a, b, tolerance in pairs)

    assert near(GAME) and 0.65 < sum(near(view) for view in VIEWS) / len(VIEWS) < 0.9
    assert GAME not in VIEWS and sum(view.road_half_width * view.kerb_width > 0 for view in VIEWS) > 0.4 * len(VIEWS)


@pytest.mark.parametrize("color", COLORS)
def test_the_named_color_stays_true(color):
    for view in VIEWS:
        shown = car_color(Look("grass", "clear", color, view=view))
        assert min(COLORS, key=lambda name: np.abs(shown - CAR_COLORS[name]).max()) == color


def test_captions_speak_of_kerbs_where_there_are_some():
    seen = set()
    for seed in range(200):
        look, caption = random_look(seed, "broad")
        kerbs = look.view.road_half_width * look.view.kerb_width > 0
        seen.add((kerbs, "kerb" in caption))
        assert 20 <= len(caption.split()) <= 60 and look.color in caption
    assert (True, True) in seen and (False, True) not in seen


@pytest.mark.parametrize("vehicle", VEHICLES)
def test_every_vehicle_shows_its_brake_lights(vehicle):
    look = Look("grass", "clear", "blue", 0, replace(GAME, vehicle=vehicle))
    braking = simulate(["B"], start=State(0.0, 0.0, 0.0, speed=8.0))
    coasting = replace(braking, braking=np.zeros(1))
    assert (render(braking, look).astype(int) - render(coasting, look))[..., 0].max() > 60
