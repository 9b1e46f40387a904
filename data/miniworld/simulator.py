"""The physics of the mini world: nine driving signals in, speed, yaw rate and pose of every frame out.

The car is a point on an endless plane that answers to its signal with inertia: speed and yaw rate each follow their
target with a first-order lag of a few frames. Steering works at any speed (an arcade car), so that all nine signals
can be told apart by what the picture does, and left always turns the view to the left, in reverse too.

Units: metres, seconds, radians. x points east, y north; heading 0 looks north and grows to the left
(counterclockwise), so a left turn has a positive yaw rate. `N` below is the number of frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from common.data.control_signals import CONTROL_TOKENS

FPS = 16

# The first letter is the pedal (D drive, B brake and reverse, N neutral), the second the wheel (L left, R right, none
# straight on); the order is that of the control vocabulary's indices.
SIGNALS = CONTROL_TOKENS

TARGET_SPEED = {"D": 12.0, "B": -5.0, "N": 0.0}  # m/s
STEERING = {"": 0.0, "L": 1.0, "R": -1.0}
SPEED_LAG = 5.0 / FPS  # s; 63 % of a change of speed after five frames
YAW_LAG = 2.5 / FPS  # s
YAW_RATE_AT_REST = 0.36  # rad/s at full lock
YAW_RATE_MOVING = 0.60  # rad/s at full lock, from 5 m/s on

# The road network: roads along both axes, every ROAD_SPACING metres, so that there is always one in sight.
ROAD_SPACING = 44.0
ROAD_HALF_WIDTH = 4.2


@dataclass(frozen=True)
class State:
    """Where the car is and how it moves, between two frames."""

    x: float
    y: float
    heading: float
    speed: float = 0.0
    yaw_rate: float = 0.0


@dataclass(frozen=True)
class Trajectory:
    """One value per frame, arrays [N]: what the car did. A slice of it is a trajectory too.

    `signals` holds indices into SIGNALS; `braking` and `reversing` say which lights are on (0 or 1); `acceleration`
    in m/s².
    """

    signals: np.ndarray
    x: np.ndarray
    y: np.ndarray
    heading: np.ndarray
    speed: np.ndarray
    yaw_rate: np.ndarray
    acceleration: np.ndarray
    braking: np.ndarray
    reversing: np.ndarray

    def __len__(self) -> int:
        return len(self.signals)

    def __getitem__(self, frames: slice) -> Trajectory:
        return Trajectory(**{field.name: getattr(self, field.name)[frames] for field in fields(self)})


def signal_targets(signal: str, speed: float) -> tuple[float, float]:
    """Speed (m/s) and yaw rate (rad/s) that a signal leads to when it is held.

    Raises:
        ValueError: for a signal that is not one of SIGNALS.
    """
    if signal not in SIGNALS:
        raise ValueError(f"unknown driving signal {signal!r}; the signals are {', '.join(SIGNALS)}")
    grip = min(abs(speed) / 5.0, 1.0)
    lock = YAW_RATE_AT_REST + (YAW_RATE_MOVING - YAW_RATE_AT_REST) * grip
    return TARGET_SPEED[signal[0]], STEERING[signal[1:]] * lock


def random_start(rng: np.random.Generator) -> State:
    """A start anywhere: two in three on a road (at any place across it, roughly along it), the rest in open country.

    Speeds cover everything that driving reaches, so that no kind of beginning is over-represented in training clips.
    """
    heading = rng.integers(4) * np.pi / 2 + rng.normal(0.0, 0.22)
    along, across = rng.uniform(-500.0, 500.0), rng.uniform(-1.0, 1.0) * ROAD_HALF_WIDTH
    road = ROAD_SPACING * rng.integers(-10, 11)
    if rng.uniform() < 1 / 3:
        heading, across = rng.uniform(-np.pi, np.pi), rng.uniform(-0.5, 0.5) * ROAD_SPACING
    # Headings near 0 and π run along y, those near ±π/2 along x.
    x, y = (road + across, along) if abs(np.cos(heading)) > abs(np.sin(heading)) else (along, road + across)
    speed = rng.uniform(TARGET_SPEED["B"], TARGET_SPEED["D"])
    return State(float(x), float(y), float(heading), float(speed), float(rng.normal(0.0, 0.2)))


def random_signals(num_frames: int, rng: np.random.Generator) -> list[str]:
    """Signals that change at random times, after 0.6 to 2.2 seconds; driving on is the commonest, nothing is rare."""
    signals: list[str] = []
    while len(signals) < num_frames:
        pedal = rng.choice(["D", "B", "N"], p=[0.5, 0.25, 0.25])
        wheel = rng.choice(["", "L", "R"], p=[0.4, 0.3, 0.3])
        if signals and signals[-1] == pedal + wheel:
            continue
        signals += [str(pedal + wheel)] * int(rng.integers(int(0.6 * FPS), int(2.2 * FPS)))
    return signals[:num_frames]


def simulate(signals: Sequence[str], seed: int = 0, start: State | None = None) -> Trajectory:
    """Drives the car through a list of signals, one a frame (N of them).

    Frame i shows the car after signal i has acted for one frame (1/16 s), so the first frame already answers to
    signal 0. `seed` draws the start when none is given; the motion itself is free of chance.

    Raises:
        ValueError: for an unknown signal.
    """
    state = start or random_start(np.random.default_rng([seed, 0]))
    x, y, heading, speed, yaw_rate = state.x, state.y, state.heading, state.speed, state.yaw_rate
    # The exact response of a first-order lag over one frame.
    speed_gain, yaw_gain = 1.0 - np.exp(-1.0 / (FPS * SPEED_LAG)), 1.0 - np.exp(-1.0 / (FPS * YAW_LAG))
    rows = []
    for signal in signals:
        target_speed, target_yaw_rate = signal_targets(signal, speed)
        before = speed
        speed += speed_gain * (target_speed - speed)
        yaw_rate += yaw_gain * (target_yaw_rate - yaw_rate)
        heading += yaw_rate / FPS
        x, y = x - np.sin(heading) * speed / FPS, y + np.cos(heading) * speed / FPS
        braking = signal[0] == "B" and speed > 0.3
        reversing = speed < -0.3
        rows.append((x, y, heading, speed, yaw_rate, (speed - before) * FPS, braking, reversing))
    indices = np.array([SIGNALS.index(signal) for signal in signals], dtype=np.int64)
    columns = np.array(rows, dtype=np.float64).reshape(len(rows), 8).T
    return Trajectory(indices, *columns)
