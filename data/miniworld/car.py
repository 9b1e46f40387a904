"""The player's car, seen from behind: leans out of its turns, dips when it brakes, lights for braking and reversing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data.miniworld.looks import Look, car_color
from data.miniworld.simulator import Trajectory

LEAN = 0.16  # rad of roll at 0.6 rad/s
SWING = 0.8  # m that the car moves sideways in the picture at 0.6 rad/s
BRAKE_OFF, BRAKE_ON = (120, 16, 20), (255, 70, 50)
REVERSE_OFF, REVERSE_ON = (150, 150, 155), (255, 255, 245)

Point = tuple[float, float]
Box = tuple[float, Point, float]  # height of its middle, half its width and height, radius of its corners


class Shape(NamedTuple):
    """A vehicle from behind, in units of half its width; `wheel` is the middle of the right one."""

    wheel: Point
    wheel_size: Point
    cabin: Box
    window: Box
    body: Box
    lights: float  # their height


SHAPES = {
    "car": Shape((0.72, 0.18), (0.2, 0.22), (1.02, (0.72, 0.36), 0.22), (1.04, (0.56, 0.2), 0.12),
                 (0.55, (1.0, 0.34), 0.16), 0.62),
    "coupe": Shape((0.78, 0.18), (0.24, 0.22), (0.8, (0.64, 0.24), 0.2), (0.82, (0.5, 0.13), 0.08),
                   (0.45, (1.0, 0.26), 0.2), 0.5),
    "van": Shape((0.74, 0.16), (0.18, 0.2), (1.1, (0.88, 0.6), 0.14), (1.3, (0.68, 0.22), 0.06),
                 (0.58, (0.92, 0.42), 0.08), 0.66),
    "truck": Shape((0.7, 0.16), (0.26, 0.2), (1.0, (1.0, 0.76), 0.03), (1.0, (0.05, 0.6), 0.02),
                   (0.38, (0.96, 0.2), 0.04), 0.42),
    "buggy": Shape((0.8, 0.3), (0.24, 0.34), (0.92, (0.5, 0.34), 0.3), (0.96, (0.36, 0.2), 0.16),
                   (0.52, (0.66, 0.26), 0.16), 0.58),
}  # fmt: skip


def _box(u: np.ndarray, v: np.ndarray, center: Point, size: Point, radius: float) -> np.ndarray:
    """Signed distance to a rounded box, negative inside; everything in car units (half a car's width = 1)."""
    du, dv = np.abs(u - center[0]) - size[0] + radius, np.abs(v - center[1]) - size[1] + radius
    return np.hypot(np.maximum(du, 0), np.maximum(dv, 0)) + np.minimum(np.maximum(du, dv), 0) - radius


def draw_car(frames: np.ndarray, trajectory: Trajectory, look: Look, horizon: int) -> None:
    """Paints the car into float32 frames [N, h, w, 3], in place; `horizon` is the number of rows above it."""
    _, height, width, _ = frames.shape
    view, shape = look.view, SHAPES[look.view.vehicle]
    focal = view.focal * width  # in pixels
    unit = focal / view.distance * view.vehicle_width / 2  # pixels in half a car's width
    ground_row = horizon + focal * view.height / view.distance  # where the wheels stand
    turn = (trajectory.yaw_rate / 0.6).astype(np.float32)[:, None, None]
    pitch = np.clip(trajectory.acceleration / 30.0, -1, 1).astype(np.float32)[:, None, None]

    top, bottom = max(0, int(ground_row - 2 * unit)), min(height, int(ground_row + 0.4 * unit) + 1)
    left, right = max(0, int(width / 2 - 2.4 * unit)), min(width, int(width / 2 + 2.4 * unit) + 1)
    patch = frames[:, top:bottom, left:right]
    columns = (np.arange(left, right, dtype=np.float32) + 0.5 - width / 2)[None, None]
    rows = (np.arange(top, bottom, dtype=np.float32) + 0.5)[None, :, None]
    # In a left turn the tail swings out to the right and the body rolls outwards.
    u = columns / unit - turn * SWING / (view.vehicle_width / 2) * 0.5
    v = (ground_row - rows) / unit / view.vehicle_height  # up
    angle = LEAN * turn
    body_u = u * np.cos(angle) - v * np.sin(angle)
    body_v = v * np.cos(angle) + u * np.sin(angle) + 0.06 * pitch

    def paint(distance: np.ndarray, color: np.ndarray | tuple[int, int, int], opacity: float = 1.0) -> None:
        alpha = opacity * np.clip(0.5 - distance * unit, 0.0, 1.0)
        patch[...] += alpha[..., None] * (np.asarray(color, dtype=np.float32) - patch)

    color = car_color(look)
    paint(np.hypot(u / 1.15, (v + 0.02) / 0.2) * 0.2 - 0.2, (20, 20, 24), 0.45)  # shadow
    for side in (-shape.wheel[0], shape.wheel[0]):
        paint(_box(u, v, (side, shape.wheel[1]), shape.wheel_size, 0.08), (24, 24, 26))  # wheels stay on the ground
    # The cabin leans further than the body, which shows the side of the car that the turn uncovers.
    for part, lean, tone in (
        (shape.cabin, 0.1 * turn, 0.82 * color),
        (shape.window, 0.1 * turn, (46, 58, 74)),
        (shape.body, 0.0, color),
        ((0.3, (0.94 * shape.body[1][0], 0.1), 0.06), 0.0, 0.6 * color),  # the bumper
    ):
        paint(_box(body_u + lean, body_v, (0, part[0]), part[1], part[2]), tone)

    half = shape.body[1][0]
    lights = (
        (trajectory.braking, BRAKE_OFF, BRAKE_ON, 0.72 * half, (0.2 * half, 0.12)),
        (trajectory.reversing, REVERSE_OFF, REVERSE_ON, 0.3 * half, (0.15 * half, 0.11)),
    )
    for state, off, on, side, size in lights:
        lit = state.astype(np.float32)[:, None, None, None]
        lamp = np.asarray(off, np.float32) + lit * (np.asarray(on, np.float32) - np.asarray(off, np.float32))
        for sign in (-1, 1):
            distance = _box(body_u, body_v, (sign * side, shape.lights), size, 0.06)
            glow = 0.6 * lit[..., 0] * np.exp(-np.maximum(distance, 0) * 4.5) * (distance < 0.7)
            patch[...] += glow[..., None] * (lamp - patch)
            paint(distance, lamp)
