"""The player's car, seen from behind: leans out of its turns, dips when it brakes, lights for braking and reversing."""

from __future__ import annotations

import numpy as np

from data.miniworld.looks import CAR_COLORS, Look
from data.miniworld.simulator import Trajectory

CAR_WIDTH = 2.1  # m
LEAN = 0.16  # rad of roll at 0.6 rad/s
SWING = 0.8  # m that the car moves sideways in the picture at 0.6 rad/s
BRAKE_OFF, BRAKE_ON = (120, 16, 20), (255, 70, 50)
REVERSE_OFF, REVERSE_ON = (150, 150, 155), (255, 255, 245)


Point = tuple[float, float]


def _box(u: np.ndarray, v: np.ndarray, center: Point, size: Point, radius: float) -> np.ndarray:
    """Signed distance to a rounded box, negative inside; everything in car units (half a car's width = 1)."""
    du, dv = np.abs(u - center[0]) - size[0] + radius, np.abs(v - center[1]) - size[1] + radius
    return np.hypot(np.maximum(du, 0), np.maximum(dv, 0)) + np.minimum(np.maximum(du, dv), 0) - radius


def draw_car(frames: np.ndarray, trajectory: Trajectory, look: Look, focal: float, camera: Point, horizon: int) -> None:
    """Paints the car into float32 frames [N, h, w, 3], in place; `camera` is (height, distance) in metres."""
    _, height, width, _ = frames.shape
    unit = focal / camera[1] * CAR_WIDTH / 2  # pixels in half a car's width
    ground_row = horizon + focal * camera[0] / camera[1]  # where the wheels stand
    turn = (trajectory.yaw_rate / 0.6).astype(np.float32)[:, None, None]
    pitch = np.clip(trajectory.acceleration / 30.0, -1, 1).astype(np.float32)[:, None, None]

    top, bottom = max(0, int(ground_row - 1.9 * unit)), min(height, int(ground_row + 0.4 * unit) + 1)
    left, right = max(0, int(width / 2 - 2.4 * unit)), min(width, int(width / 2 + 2.4 * unit) + 1)
    patch = frames[:, top:bottom, left:right]
    columns = (np.arange(left, right, dtype=np.float32) + 0.5 - width / 2)[None, None]
    rows = (np.arange(top, bottom, dtype=np.float32) + 0.5)[None, :, None]
    # In a left turn the tail swings out to the right and the body rolls outwards.
    u = columns / unit - turn * SWING / (CAR_WIDTH / 2) * 0.5
    v = (ground_row - rows) / unit  # up
    angle = LEAN * turn
    body_u = u * np.cos(angle) - v * np.sin(angle)
    body_v = v * np.cos(angle) + u * np.sin(angle) + 0.06 * pitch

    def paint(distance: np.ndarray, color: np.ndarray | tuple[int, int, int], opacity: float = 1.0) -> None:
        alpha = opacity * np.clip(0.5 - distance * unit, 0.0, 1.0)
        patch[...] += alpha[..., None] * (np.asarray(color, dtype=np.float32) - patch)

    night = look.biome == "city"
    color = CAR_COLORS[look.color] * (0.8 if night else 1.0)
    paint(np.hypot(u / 1.15, (v + 0.02) / 0.2) * 0.2 - 0.2, (20, 20, 24), 0.45)  # shadow
    for side in (-0.72, 0.72):
        paint(_box(u, v, (side, 0.18), (0.2, 0.22), 0.08), (24, 24, 26))  # wheels stay on the ground
    # The cabin leans further than the body, which shows the side of the car that the turn uncovers.
    paint(_box(body_u + 0.1 * turn, body_v, (0, 1.02), (0.72, 0.36), 0.22), 0.82 * color)
    paint(_box(body_u + 0.1 * turn, body_v, (0, 1.04), (0.56, 0.2), 0.12), (46, 58, 74))
    paint(_box(body_u, body_v, (0, 0.55), (1.0, 0.34), 0.16), color)
    paint(_box(body_u, body_v, (0, 0.3), (0.94, 0.1), 0.06), 0.6 * color)

    lights = (
        (trajectory.braking, BRAKE_OFF, BRAKE_ON, 0.72, 0.62, (0.2, 0.12)),
        (trajectory.reversing, REVERSE_OFF, REVERSE_ON, 0.3, 0.62, (0.15, 0.11)),
    )
    for state, off, on, side, up, size in lights:
        lit = state.astype(np.float32)[:, None, None, None]
        lamp = np.asarray(off, np.float32) + lit * (np.asarray(on, np.float32) - np.asarray(off, np.float32))
        for sign in (-1, 1):
            distance = _box(body_u, body_v, (sign * side, up), size, 0.06)
            glow = 0.6 * lit[..., 0] * np.exp(-np.maximum(distance, 0) * 4.5) * (distance < 0.7)
            patch[...] += glow[..., None] * (lamp - patch)
            paint(distance, lamp)
