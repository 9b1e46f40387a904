"""The picture of the mini world: a trajectory and a look in, uint8 frames out.

A pinhole camera follows the car from behind at a fixed height. Rows above the horizon come from a panorama that yaw
shifts; rows below it are the ground, computed per pixel and smoothed by the pixel's own footprint on the ground, so
that far detail fades out instead of flickering. Speed shows in the flow of striped kerbs, dashed lines and the
patches of the open ground.

`N` frames, `R` rows of ground, `w` columns; all in float32 until the end.
"""

from __future__ import annotations

import numpy as np

from data.miniworld.car import draw_car
from data.miniworld.looks import Look, Palette, palette
from data.miniworld.panorama import COLUMNS_PER_PIXEL, draw_panorama
from data.miniworld.simulator import ROAD_SPACING, Trajectory
from data.miniworld.views import GAME, View

# The game's camera, in the units of View, for whoever measures its pictures.
CAMERA_HEIGHT, CAMERA_DISTANCE, HORIZON, FOCAL_LENGTH = GAME.height, GAME.distance, GAME.horizon, GAME.focal
CHUNK = 64  # frames drawn at once: bounds the memory of a long trajectory


def horizon_row(height: int, view: View = GAME) -> int:
    """Number of rows above the horizon."""
    return round(view.horizon * height)


def ground_geometry(height: int, width: int, view: View = GAME) -> tuple[np.ndarray, np.ndarray]:
    """Where the ground pixels are, as seen from the camera: metres ahead [R, 1] and metres to the right [R, w]."""
    focal = view.focal * width
    below = np.arange(height - horizon_row(height, view), dtype=np.float32)[:, None] + 0.5
    ahead = focal * view.height / below
    return ahead, ahead * (np.arange(width, dtype=np.float32) + 0.5 - width / 2) / focal


def camera_position(trajectory: Trajectory, view: View = GAME) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the camera, float64 [N]."""
    heading = trajectory.heading
    return trajectory.x + view.distance * np.sin(heading), trajectory.y - view.distance * np.cos(heading)


def render(trajectory: Trajectory, look: Look, height: int = 64, width: int = 96, first_frame: int = 0) -> np.ndarray:
    """Draws a trajectory: uint8 [N, height, width, 3].

    `first_frame` is the number of frames drawn before, when a long drive is rendered in pieces; only falling rain
    needs it.

    Raises:
        ValueError: unless height and width are multiples of 16.
    """
    if height % 16 or width % 16 or height < 16 or width < 16:
        raise ValueError(f"the picture is {height}x{width} pixels; both have to be multiples of 16")
    colors = palette(look)
    rows = horizon_row(height, look.view)
    columns = round(2 * np.pi * look.view.focal * width) * COLUMNS_PER_PIXEL
    panorama = draw_panorama(look, colors, rows, columns, scale=height / 64)
    video = np.empty((len(trajectory), height, width, 3), dtype=np.uint8)
    for start in range(0, len(trajectory), CHUNK):
        part = trajectory[start : start + CHUNK]
        frames = np.empty((len(part), height, width, 3), dtype=np.float32)
        frames[:, :rows] = _sky(part, panorama, look.view.focal * width, width)
        frames[:, rows:] = _ground(part, look, colors, height, width)
        draw_car(frames, part, look, horizon=rows)
        if look.weather == "rain":
            _rain(frames, look, first_frame + start)
        video[start : start + CHUNK] = np.clip(frames + 0.5, 0, 255).astype(np.uint8)
    return video


def _sky(trajectory: Trajectory, panorama: np.ndarray, focal: float, width: int) -> np.ndarray:
    """[N, rows, w, 3]: the part of the panorama in view, interpolated between its columns; `focal` in pixels."""
    count = panorama.shape[1]
    bearing = np.arctan((width / 2 - np.arange(width) - 0.5) / focal)  # radians left of the middle
    position = (trajectory.heading[:, None] + bearing) * (count / (2 * np.pi))  # [N, w]
    left = np.floor(position).astype(np.int64)
    share = (position - left).astype(np.float32)[..., None, None]
    by_column = panorama.transpose(1, 0, 2)  # [columns, rows, 3]
    view = by_column[left % count] * (1 - share) + by_column[(left + 1) % count] * share  # [N, w, rows, 3]
    return view.transpose(0, 2, 1, 3)


def _square_wave(position: np.ndarray, period: float, footprint: np.ndarray) -> np.ndarray:
    """A −1…1 wave with edges as soft as a pixel is wide; it vanishes where a pixel covers half a period."""
    sharpness = 0.3 * period / np.maximum(footprint, 0.08)
    fade = np.clip(2.0 - 4.0 * footprint / period, 0.0, 1.0)
    return np.clip(np.sin(position * np.float32(2 * np.pi / period)) * sharpness, -1, 1) * fade


def _band(distance: np.ndarray, half_width: float, footprint: np.ndarray) -> np.ndarray:
    """Coverage 0…1 of a band around distance 0 by a pixel of the given footprint."""
    return np.clip((half_width - np.abs(distance)) / footprint + 0.5, 0.0, 1.0)


def _ground(trajectory: Trajectory, look: Look, colors: Palette, height: int, width: int) -> np.ndarray:
    """[N, R, w, 3]: open ground, kerbs, roads and lines, fading into haze."""
    view = look.view
    ahead, right = ground_geometry(height, width, view)
    focal, below = view.focal * width, (np.arange(len(ahead), dtype=np.float32) + 0.5)[:, None]
    heading = trajectory.heading[:, None, None]
    sine, cosine = np.sin(heading).astype(np.float32), np.cos(heading).astype(np.float32)
    east, north = right * cosine - ahead * sine, right * sine + ahead * cosine  # from the camera, [N, R, w]
    camera = [value[:, None, None] for value in camera_position(trajectory, view)]
    footprint_across = ahead / focal
    footprint_x = np.abs(cosine) * footprint_across + np.abs(east) / below
    footprint_y = np.abs(sine) * footprint_across + np.abs(north) / below

    image = _open_ground(east, north, camera, ahead / below, look, colors)
    if view.road_half_width:
        _roads(image, (camera[0], east, footprint_x), (camera[1], north, footprint_y), view, colors)
    haze = 1 - np.exp(-((ahead / colors.haze_distance) ** 1.5))
    return image + haze[..., None] * (colors.horizon - image)


Axis = tuple[np.ndarray, np.ndarray, np.ndarray]


def _roads(image: np.ndarray, east: Axis, north: Axis, view: View, colors: Palette) -> None:
    """Paints kerbs, roads and lines, in place; an axis is the camera's place, that from the camera, and footprint."""
    # One period of the road network around the camera: exact, however far the car has driven.
    (x, footprint_x), (y, footprint_y) = (
        ((camera % ROAD_SPACING).astype(np.float32) + offset, footprint) for camera, offset, footprint in (east, north)
    )
    across_x = (x + ROAD_SPACING / 2) % ROAD_SPACING - ROAD_SPACING / 2  # to the nearest road along y
    across_y = (y + ROAD_SPACING / 2) % ROAD_SPACING - ROAD_SPACING / 2  # to the nearest road along x
    kerb_edge = view.road_half_width + view.kerb_width
    roads = ((across_x, y, footprint_x, footprint_y), (across_y, x, footprint_y, footprint_x))
    surfaces = [_band(across, view.road_half_width, foot) for across, _, foot, _ in roads]
    for across, along, foot, foot_along in roads if view.kerb_width else ():
        wave = _square_wave(along, view.kerb_period, foot_along)[..., None]
        kerb = 0.5 * (colors.kerb[0] + colors.kerb[1]) + 0.5 * wave * (colors.kerb[0] - colors.kerb[1])
        image += _band(across, kerb_edge, foot)[..., None] * (kerb - image)
    image += np.maximum(*surfaces)[..., None] * (colors.asphalt - image)
    for index, (across, along, foot, foot_along) in enumerate(roads if view.line_half_width else ()):
        dashes = 0.5 + 0.5 * _square_wave(along, view.line_period, foot_along)
        alpha = 0.9 * _band(across, view.line_half_width, foot) * dashes * (1 - surfaces[1 - index])
        image += alpha[..., None] * (colors.line - image)


def _open_ground(
    east: np.ndarray,
    north: np.ndarray,
    camera: list[np.ndarray],
    depth_footprint: np.ndarray,
    look: Look,
    colors: Palette,
) -> np.ndarray:
    """[N, R, w, 3]: soft patches of two tones, a sum of plane waves whose fine ones fade first."""
    rng = np.random.default_rng([look.seed, 3])
    pattern = np.zeros_like(east)
    for index, length in enumerate((9.0, 6.5, 4.6, 3.4)):
        length *= look.view.patch_scale
        angle = rng.uniform(0, np.pi / 4) + index * np.pi / 4
        wave_x, wave_y = 2 * np.pi * np.cos(angle) / length, 2 * np.pi * np.sin(angle) / length
        phase = (wave_x * camera[0] + wave_y * camera[1] + rng.uniform(0, 2 * np.pi)) % (2 * np.pi)
        fade = np.exp(-((2.2 * depth_footprint / length) ** 2))
        pattern += fade * np.sin(phase.astype(np.float32) + np.float32(wave_x) * east + np.float32(wave_y) * north)
    share = 0.5 + 0.5 * np.clip(look.view.patch_contrast * pattern, -1, 1)
    return colors.ground[0] + share[..., None] * (colors.ground[1] - colors.ground[0])


def _rain(frames: np.ndarray, look: Look, first_frame: int, drops: int = 14) -> None:
    """A few faint slanting streaks, in place: enough to see, too few to fill the picture with noise."""
    count, height, width, _ = frames.shape
    rng = np.random.default_rng([look.seed, 4])
    column, start = rng.uniform(0, width, drops), rng.uniform(0, 1.4, drops)
    fall = rng.uniform(0.16, 0.22, drops)  # picture heights a frame
    time = first_frame + np.arange(count)[:, None]
    row = ((start + fall * time) % 1.4 - 0.2) * height  # [N, drops]
    rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
    length = height / 14
    along = np.clip(length - np.abs(rows - row[..., None]), 0, 1)  # [N, drops, h]
    across = np.clip(1 - np.abs(columns - column[:, None]), 0, 1)  # [drops, w]
    alpha = 0.22 * np.minimum(np.einsum("nkh,kw->nhw", along, across), 1)
    frames += alpha.astype(np.float32)[..., None] * (210 - frames)
