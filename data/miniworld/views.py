"""How a scene is seen and built: the camera, the roads, the vehicle and the grading of the colours.

The game world has one view, `GAME`, whose values are the defaults below. The broad world, from which a base model
learns before it is fine-tuned to the game, draws one for every clip, from wide ranges. In most of its clips the camera
is about where the game has it, behind the vehicle: how a road and its kerbs come nearer is more than stage 1's few
parameters, or stage 2's, could learn beside the game's look.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.miniworld.simulator import ROAD_HALF_WIDTH, ROAD_SPACING

WORLDS = ("game", "broad")
NEAR_SHARE = 0.8  # of broad's views: those with the camera about where the game has it
VEHICLES = ("car", "coupe", "van", "truck", "buggy")  # what broad draws from; car.py has their shapes

Gain = tuple[float, float, float]  # factors of red, green and blue


@dataclass(frozen=True)
class View:
    """What is the same in every clip of the game and differs from clip to clip in the broad world."""

    height: float = 2.7  # m of the camera above the ground
    distance: float = 6.0  # m of the camera behind the car, which is the pivot of its turns
    horizon: float = 0.41  # share of the picture above the horizon
    focal: float = 0.68  # in picture widths: 73 degrees from edge to edge
    road_half_width: float = ROAD_HALF_WIDTH  # m; 0 is open country without roads
    dirt: float = 0.0  # 0…1, from asphalt to a track in the colour of the ground
    kerb_width: float = 1.0  # m; 0 is a road without kerbs
    kerb_period: float = 2.75  # m; the periods divide ROAD_SPACING, and exceed twice what a frame moves
    kerb_hue: int = 0  # by how many places red, green and blue of the kerbs are exchanged
    line_half_width: float = 0.2  # m; 0 is a road without a line
    line_period: float = 5.5  # m
    patch_scale: float = 1.0  # size of the patches of the open ground
    patch_contrast: float = 0.9
    landmark_scale: float = 1.0  # size of everything on the horizon and in the sky
    landmarks: int = 15  # on the full turn
    vehicle: str = "car"
    vehicle_width: float = 2.1  # m
    vehicle_height: float = 1.0  # factor
    saturation: float = 1.0
    gamma: float = 1.0  # above 1 is darker
    sky_gain: Gain = (1.0, 1.0, 1.0)
    ground_gain: Gain = (1.0, 1.0, 1.0)  # of landmarks, too

    def grade(self, color: np.ndarray, gain: Gain = (1.0, 1.0, 1.0)) -> np.ndarray:
        """A colour, float32 RGB in 0…255, as this view shows it."""
        if (self.saturation, self.gamma, gain) == (1.0, 1.0, (1.0, 1.0, 1.0)):
            return color
        vivid = (color.mean() + self.saturation * (color - color.mean())) * np.array(gain, dtype=np.float32)
        return 255 * (np.clip(vivid, 0, 255) / 255) ** np.float32(self.gamma)


GAME = View()


def random_view(rng: np.random.Generator) -> View:
    """A view of the broad world. The colours that a caption names stay recognisable under it."""

    def spread(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    def gain(strength: float) -> Gain:
        red, green, blue = (spread(1 - strength, 1 / (1 - strength)) for _ in range(3))
        return red, green, blue

    # The camera follows from what it shows, so that the vehicle is always in the picture: where the horizon is, where
    # the wheels stand below it (in picture heights; a picture is 3:2) and how wide the vehicle is (in picture widths).
    if rng.uniform() < NEAR_SHARE:
        horizon, focal, width = rng.uniform(0.36, 0.46), spread(0.62, 0.75), spread(1.8, 2.4)
        drop = rng.uniform(0.42, 0.46)
        distance = focal * width / spread(0.21, 0.27)
    else:
        horizon, focal, width = rng.uniform(0.12, 0.6), spread(0.42, 1.3), spread(1.3, 3.2)
        drop = rng.uniform(horizon + 0.2, 0.93) - horizon
        distance = focal * width / spread(0.09, min(0.3, 0.6 * (horizon + drop)))  # its roof stays in the picture
    height = drop * distance / (1.5 * focal)
    roads, kerbs = rng.uniform() < 0.9, rng.uniform() < 0.6
    return View(
        height=height,
        distance=distance,
        horizon=horizon,
        focal=focal,
        road_half_width=spread(1.8, 9.0) if roads else 0.0,
        dirt=0.0 if kerbs else rng.uniform(),
        kerb_width=spread(0.4, 2.0) if kerbs else 0.0,
        kerb_period=ROAD_SPACING / int(rng.integers(6, 19)),
        kerb_hue=int(rng.integers(3)),
        line_half_width=spread(0.1, 0.35) if kerbs or rng.uniform() < 0.5 else 0.0,
        line_period=ROAD_SPACING / int(rng.integers(3, 13)),
        patch_scale=spread(0.7, 3.5),
        patch_contrast=spread(0.3, 4.0),
        landmark_scale=spread(0.6, 1.8),
        landmarks=int(rng.integers(5, 26)),
        vehicle=str(rng.choice(VEHICLES)),
        vehicle_width=width,
        vehicle_height=rng.uniform(0.85, 1.15),
        saturation=spread(0.65, 1.45),
        gamma=spread(0.7, 1.35),
        sky_gain=gain(0.12),
        ground_gain=gain(0.14),
    )
