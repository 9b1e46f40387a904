"""The measuring instruments of `common.evaluation`, set to the mini world's camera and physics."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from common.evaluation.control_accuracy import ObeyedControl, obeyed_control
from common.evaluation.motion import Camera, Motion, estimate_motion
from common.evaluation.physics import Physics
from data.miniworld.render import CAMERA_DISTANCE, CAMERA_HEIGHT, FOCAL_LENGTH, HORIZON
from data.miniworld.simulator import (
    FPS,
    SIGNALS,
    SPEED_LAG,
    STEERING,
    TARGET_SPEED,
    YAW_LAG,
    YAW_RATE_AT_REST,
    YAW_RATE_MOVING,
)

PHYSICS = Physics(
    signals=tuple(SIGNALS),
    target_speeds=tuple(TARGET_SPEED[signal[0]] for signal in SIGNALS),
    steerings=tuple(STEERING[signal[1:]] for signal in SIGNALS),
    speed_lag=SPEED_LAG,
    yaw_lag=YAW_LAG,
    yaw_rate_at_rest=YAW_RATE_AT_REST,
    yaw_rate_moving=YAW_RATE_MOVING,
    full_yaw_speed=5.0,
    fps=FPS,
)
CAMERA = Camera(height=CAMERA_HEIGHT, distance=CAMERA_DISTANCE, horizon=HORIZON, focal_length=FOCAL_LENGTH)
FRAMES_PER_LATENT = 4


def latent_signals(num_latents: int, rng: np.random.Generator) -> list[str]:
    """One signal per latent frame, each held for 3 to 9 of them; all nine are equally common."""
    signals: list[str] = []
    while len(signals) < num_latents:
        signal = str(rng.choice(SIGNALS))
        if signals and signals[-1] == signal:
            continue
        signals += [signal] * int(rng.integers(3, 10))
    return signals[:num_latents]


def signals_of_frames(latent: list[str]) -> list[str]:
    """Signals of the 4F − 3 raw frames under F latent frames: the first covers one frame, each later one four."""
    return latent[:1] + [signal for signal in latent[1:] for _ in range(FRAMES_PER_LATENT)]


def measure_control(frames: Tensor) -> tuple[Motion, ObeyedControl]:
    """What uint8 clips [B, N, h, w, 3], N = 4(F − 1) + 1, do, and which signals latent frames 1…F − 1 obey."""
    motion = estimate_motion(frames, CAMERA, FPS)
    return motion, obeyed_control(motion, PHYSICS, FRAMES_PER_LATENT)
