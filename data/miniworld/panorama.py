"""Everything at infinity: sky, sun, clouds, the ridge on the horizon and its landmarks, as one picture all around.

The panorama has rows from the top of the picture down to the horizon and columns over the full turn; column c lies
2π·c/columns to the left of north. Yaw shows as a shift of it, so every direction has something to hold on to.
"""

from __future__ import annotations

import numpy as np

from data.miniworld.looks import Look, Palette

COLUMNS_PER_PIXEL = 2  # finer than the screen, so that slow turns move smoothly


def _blend(image: np.ndarray, color: np.ndarray, alpha: np.ndarray) -> None:
    """Paints `color` over image [R, C, 3] where alpha [R, C] says, in place."""
    image += np.clip(alpha, 0.0, 1.0)[..., None] * (color - image)


def _shape(kind: str, u: np.ndarray, v: np.ndarray, width: float, height: float) -> np.ndarray:
    """Coverage 0…1 [R, C] of a landmark at u pixels right of its middle [1, C] and v above the horizon [R, 1]."""
    half = width / 2
    if kind in ("hill", "mesa", "fir"):  # bounded above by a profile
        if kind == "hill":
            top = height * (1 - (u / half) ** 2)
        elif kind == "mesa":
            top = np.minimum(height, 2.2 * (half - np.abs(u)))
        else:
            top = height * (1 - np.abs(u) / half)
        return np.clip(top - v + 0.5, 0.0, 1.0)
    if kind == "tower":
        return np.clip(half - np.abs(u) + 0.5, 0.0, 1.0) * np.clip(height - v + 0.5, 0.0, 1.0)
    # A tree or a palm: a crown on a trunk.
    crown_height = 0.42 * height if kind == "palm" else 0.7 * height
    radius = np.hypot(u / half, (v - (height - crown_height / 2)) / (crown_height / 2))
    crown = np.clip((1 - radius) * min(half, crown_height / 2) + 0.5, 0.0, 1.0)
    trunk = np.clip(0.09 * width + 0.9 - np.abs(u), 0.0, 1.0) * np.clip(height * 0.6 - v + 0.5, 0.0, 1.0)
    return np.maximum(crown, 0.8 * trunk)


# biome: ((kind, width range, height range in pixels of a 64-row picture), …)
_LANDMARKS = {
    "desert": (("mesa", (12, 26), (6, 13)), ("hill", (14, 24), (4, 7))),
    "grass": (("tree", (6, 10), (7, 12)), ("hill", (18, 34), (5, 9))),
    "snow": (("fir", (6, 9), (9, 15)), ("fir", (16, 30), (8, 14))),
    "city": (("tower", (6, 10), (9, 19)), ("tower", (10, 14), (6, 12))),
    "forest": (("tree", (8, 12), (9, 15)), ("fir", (7, 10), (9, 14))),
    "coast": (("palm", (9, 12), (11, 16)), ("hill", (14, 26), (4, 8))),
}


def draw_panorama(look: Look, colors: Palette, rows: int, columns: int, scale: float) -> np.ndarray:
    """The panorama of a look: float32 [rows, columns, 3] in 0…255; `scale` is picture height / 64."""
    rng = np.random.default_rng([look.seed, 2])
    scale = scale * look.view.landmark_scale
    above = (rows - np.arange(rows, dtype=np.float32) - 0.5)[:, None] / scale  # [R, 1] pixels above the horizon
    turn = np.arange(columns, dtype=np.float32) * (2 * np.pi / columns)  # [C] radians to the left of north
    pixels_per_turn = columns / COLUMNS_PER_PIXEL / scale

    share = np.clip(above / (rows / scale), 0.0, 1.0)[..., None] ** 0.8
    image = np.broadcast_to(colors.horizon + share * (colors.zenith - colors.horizon), (rows, columns, 3)).copy()

    def offset(angle: float) -> np.ndarray:
        """[C] pixels to the right of the direction `angle`."""
        return -((turn - angle + np.pi) % (2 * np.pi) - np.pi) * pixels_per_turn / (2 * np.pi)

    if look.weather in ("clear", "sunset"):  # the sun, or the moon over the city
        disc = _rgb_sun(look)
        distance = np.hypot(offset(rng.uniform(0, 2 * np.pi))[None], above - (7 if look.weather == "sunset" else 17))
        _blend(image, disc, 0.35 * np.exp(-((distance / 11) ** 2)))
        _blend(image, disc, 3.6 - distance)
    if look.weather != "fog":
        cloud = 0.55 * colors.horizon + 0.45 * (colors.zenith.mean() if look.biome == "city" else 250.0)
        for _ in range(14 if look.weather in ("clouds", "rain") else 6):
            u, height = offset(rng.uniform(0, 2 * np.pi))[None], rng.uniform(13, 24)
            radius = np.hypot(u / rng.uniform(10, 20), (above - height) / rng.uniform(1.8, 3.0))
            _blend(image, cloud, 0.6 * np.clip(1.5 * (1.1 - radius), 0, 1))

    haze = colors.landmark_haze
    waves = rng.integers(3, 12, size=4)
    ridge = 3.2 + sum(np.sin(k * turn + phase) for k, phase in zip(waves, rng.uniform(0, 6.3, 4), strict=True)) * 0.8
    ridge = np.full_like(turn, 1.6) if look.biome == "coast" else ridge  # there it is the sea, and that is flat
    _blend(image, colors.ridge + max(haze, 0.35) * (colors.horizon - colors.ridge), ridge[None] - above + 0.5)

    count = look.view.landmarks
    angles = (np.arange(count) + rng.uniform(-0.3, 0.3, count)) * (2 * np.pi / count)
    for index, angle in enumerate(angles):
        kinds = _LANDMARKS[look.biome]
        # The broad kind first, behind; every other one of the narrow kind stands beside it.
        kind, widths, heights = kinds[(index + 1) % 2]
        width, height = rng.uniform(*widths), rng.uniform(*heights)
        color = colors.landmarks[rng.integers(len(colors.landmarks))] * rng.uniform(0.85, 1.15)
        u = offset(angle)[None]
        alpha = _shape(kind, u, above, width, height)
        _blend(image, color + haze * (colors.horizon - color), alpha)
        if kind == "tower":  # lit windows in a grid of 4 × 4 pixels
            window = ((u + width / 2) % 4 > 1.8) & (above % 4 > 1.8) & (above < height - 1)
            glow = np.array((250, 206, 110) if rng.uniform() < 0.6 else (150, 190, 235), dtype=np.float32)
            _blend(image, glow, 0.75 * (1 - haze) * alpha * window)
    return image.astype(np.float32)


def _rgb_sun(look: Look) -> np.ndarray:
    warm = {"city": (226, 228, 236)}.get(look.biome, (255, 244, 200))
    return np.array((255, 214, 130) if look.weather == "sunset" else warm, dtype=np.float32)
