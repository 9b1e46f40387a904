"""What a clip looks like: biome, weather and car colour, and the colours and landmarks that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.miniworld.captions import BIOME_WORDS, COLORS, WEATHER_WORDS, make_caption
from data.miniworld.views import GAME, View, random_view

BIOMES = tuple(BIOME_WORDS)
WEATHERS = tuple(WEATHER_WORDS)


@dataclass(frozen=True)
class Look:
    """One scene. `seed` places landmarks, clouds and ground patches; equal looks draw equal worlds."""

    biome: str
    weather: str
    color: str
    seed: int = 0
    view: View = GAME

    def __post_init__(self) -> None:
        for value, known, name in (
            (self.biome, BIOMES, "biome"),
            (self.weather, WEATHERS, "weather"),
            (self.color, COLORS, "color"),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; known are {', '.join(known)}")


def random_look(seed: int, world: str = "game") -> tuple[Look, str]:
    """A look and a caption that names it, from one number; `world` is one of WORLDS."""
    rng = np.random.default_rng([seed, 1])
    biome = str(rng.choice(BIOMES))
    # A sunset over the night city would contradict its own caption.
    weather = str(rng.choice([name for name in WEATHERS if (biome, name) != ("city", "sunset")]))
    color = str(rng.choice(COLORS))
    view = GAME if world == "game" else random_view(np.random.default_rng([seed, 6]))
    look = Look(biome, weather, color, int(rng.integers(2**31)), view)
    return look, make_caption(biome, weather, color, rng, kerbs=view.road_half_width * view.kerb_width > 0)


@dataclass(frozen=True)
class Palette:
    """Colours of a scene as float32 RGB arrays in 0…255."""

    zenith: np.ndarray
    horizon: np.ndarray
    ground: tuple[np.ndarray, np.ndarray]
    asphalt: np.ndarray
    kerb: tuple[np.ndarray, np.ndarray]
    line: np.ndarray
    ridge: np.ndarray
    landmarks: tuple[np.ndarray, ...]
    haze_distance: float  # metres at which the ground is two thirds haze
    landmark_haze: float  # 0…1, how far landmarks fade into the horizon's colour


def _rgb(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.float32)


CAR_COLORS = {
    "red": _rgb(205, 35, 35),
    "blue": _rgb(40, 80, 210),
    "yellow": _rgb(235, 205, 40),
    "white": _rgb(238, 238, 235),
    "green": _rgb(30, 140, 60),
    "orange": _rgb(240, 130, 30),
    "purple": _rgb(130, 50, 170),
    "black": _rgb(38, 38, 44),
}

# biome: zenith, horizon, ground ×2, asphalt, kerb ×2, line, ridge, landmark colours
_BIOME_COLORS = {
    "desert": ((96, 150, 215), (232, 214, 180), (222, 184, 122), (198, 156, 96), (112, 104, 98), (206, 60, 40),
               (240, 236, 226), (236, 226, 190), (204, 150, 112), ((172, 84, 54), (146, 66, 48), (196, 112, 66))),
    "grass": ((84, 148, 224), (206, 226, 238), (112, 168, 74), (88, 142, 60), (104, 106, 110), (212, 50, 50),
              (242, 242, 240), (238, 238, 228), (126, 164, 140), ((52, 106, 52), (76, 126, 54), (60, 96, 84))),
    "snow": ((122, 166, 212), (226, 232, 238), (238, 242, 246), (208, 218, 230), (110, 116, 126), (208, 52, 58),
             (96, 104, 120), (240, 226, 150), (172, 188, 210), ((36, 70, 66), (60, 86, 92), (96, 112, 136))),
    "city": ((16, 20, 46), (66, 56, 92), (62, 70, 74), (46, 52, 60), (78, 80, 94), (230, 190, 60),
             (40, 40, 44), (220, 214, 170), (40, 40, 66), ((24, 26, 42), (40, 32, 52), (28, 40, 60))),
    "forest": ((108, 158, 214), (226, 218, 200), (150, 122, 66), (122, 98, 52), (100, 98, 98), (216, 216, 208),
               (188, 48, 40), (236, 232, 214), (162, 120, 84), ((200, 96, 30), (172, 56, 32), (214, 152, 44))),
    "coast": ((70, 152, 226), (204, 232, 240), (228, 212, 160), (206, 188, 134), (112, 110, 110), (50, 110, 190),
              (242, 242, 240), (240, 238, 226), (40, 120, 176), ((44, 120, 66), (96, 130, 86), (230, 226, 220))),
}  # fmt: skip


def car_color(look: Look) -> np.ndarray:
    """The car's colour, float32 RGB: graded by half, so that its name stays true."""
    color = CAR_COLORS[look.color]
    return 0.5 * (color + look.view.grade(color)) * (0.8 if look.biome == "city" else 1.0)


def palette(look: Look) -> Palette:
    """The colours of a look: the biome's, changed by the weather and graded by the view."""
    zenith, horizon, ground_a, ground_b, asphalt, kerb_a, kerb_b, line, ridge, marks = _BIOME_COLORS[look.biome]
    night = look.biome == "city"
    distance, fade = 60.0, 0.1
    light, wash, tint = 1.0, 0.0, _rgb(0, 0, 0)  # brightness; how far, and towards which colour, everything is pulled
    zenith, horizon = _rgb(*zenith), _rgb(*horizon)
    if look.weather == "clouds":
        light, wash, tint = 0.9, 0.12, _rgb(120, 124, 130)
        zenith, horizon = 0.45 * zenith + 0.5 * _rgb(130, 136, 146), 0.5 * horizon + 0.45 * _rgb(170, 174, 180)
    elif look.weather == "rain":
        light, wash, tint, distance, fade = 0.76, 0.2, _rgb(84, 94, 110), 40.0, 0.3
        zenith, horizon = 0.25 * zenith + 0.7 * _rgb(96, 104, 118), 0.3 * horizon + 0.6 * _rgb(140, 148, 160)
    elif look.weather == "fog":
        grey = _rgb(70, 72, 86) if night else _rgb(206, 210, 214)
        zenith, horizon, distance, fade = 0.35 * zenith + 0.65 * grey, grey, 22.0, 0.5
    elif look.weather == "sunset":
        light, wash, tint = 0.86, 0.14, _rgb(200, 96, 50)
        zenith, horizon = 0.45 * zenith + 0.55 * _rgb(120, 70, 130), 0.25 * horizon + 0.75 * _rgb(252, 166, 92)
    if night and look.weather != "fog":
        zenith, horizon = 0.5 * zenith + 0.5 * _rgb(18, 20, 44), 0.4 * horizon + 0.6 * _rgb(112, 86, 124)

    view = look.view

    def lit(color: tuple[int, int, int]) -> np.ndarray:
        shown = (light * _rgb(*color)) * (1 - wash) + wash * tint * (0.4 if night else 1.0)
        return view.grade(shown, view.ground_gain)

    darker = 0.8 if look.weather == "rain" else 1.0  # a wet road
    road = darker * lit(asphalt)
    return Palette(
        zenith=view.grade(zenith, view.sky_gain), horizon=view.grade(horizon, view.sky_gain),
        ground=(lit(ground_a), lit(ground_b)), asphalt=road + view.dirt * (0.72 * lit(ground_b) - road),
        kerb=(np.roll(lit(kerb_a), view.kerb_hue), np.roll(lit(kerb_b), view.kerb_hue)),
        line=lit(line), ridge=lit(ridge), landmarks=tuple(lit(mark) for mark in marks),
        haze_distance=distance * max(1.0, view.distance / 10), landmark_haze=fade,  # the vehicle stays out of it
    )  # fmt: skip
