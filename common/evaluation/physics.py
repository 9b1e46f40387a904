"""How a driving world answers its signals: speed and yaw rate each follow a target with a first-order lag.

Passed in by whoever knows the world (for the mini world, `data.miniworld.instruments.PHYSICS`).

Letters: `B` clips, `N` frames; a signal is an index into `Physics.signals`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Physics:
    """Names of the signals and, in the same order, the speed (m/s) and the steering (−1 right … 1 left) each leads to.

    The lags (s) are those of speed and yaw rate. At full lock the yaw rate (rad/s) is `yaw_rate_at_rest` for a car that
    stands, grows linearly with |speed| and stays at `yaw_rate_moving` from `full_yaw_speed` (m/s) on.

    Raises:
        ValueError: unless the signals are all the combinations of their speeds and steerings, each once.
    """

    signals: tuple[str, ...]
    target_speeds: tuple[float, ...]
    steerings: tuple[float, ...]
    speed_lag: float
    yaw_lag: float
    yaw_rate_at_rest: float
    yaw_rate_moving: float
    full_yaw_speed: float
    fps: float = 16.0

    def __post_init__(self) -> None:
        pairs = set(zip(self.target_speeds, self.steerings, strict=True))
        complete = len(set(self.target_speeds)) * len(set(self.steerings))
        if not len(self.signals) == len(pairs) == complete:
            raise ValueError(
                f"{len(self.signals)} signals have {len(pairs)} different pairs of target speed and steering; each of "
                f"the {complete} combinations has to belong to exactly one signal"
            )

    @property
    def speed_decay(self) -> float:
        """The part of a difference to the target speed that is left after one frame."""
        return math.exp(-1.0 / (self.fps * self.speed_lag))

    @property
    def yaw_decay(self) -> float:
        """The part of a difference to the target yaw rate that is left after one frame."""
        return math.exp(-1.0 / (self.fps * self.yaw_lag))

    def lock(self, speed: Tensor) -> Tensor:
        """Yaw rate (rad/s) at full lock and this speed (m/s)."""
        grip = (speed.abs() / self.full_yaw_speed).clamp(max=1.0)
        return self.yaw_rate_at_rest + (self.yaw_rate_moving - self.yaw_rate_at_rest) * grip

    def drive(self, signals: Tensor, speed: Tensor, yaw_rate: Tensor) -> tuple[Tensor, Tensor]:
        """Speed and yaw rate, each [B, N], after each frame of signals int64 [B, N], from a start of [B] each."""
        targets = torch.as_tensor(self.target_speeds, dtype=speed.dtype, device=speed.device)[signals]
        steerings = torch.as_tensor(self.steerings, dtype=speed.dtype, device=speed.device)[signals]
        speeds, yaw_rates = [], []
        for target, steering in zip(targets.T, steerings.T, strict=True):
            # Both answer to the speed before the frame.
            target_yaw = steering * self.lock(speed)
            speed = target + self.speed_decay * (speed - target)
            yaw_rate = target_yaw + self.yaw_decay * (yaw_rate - target_yaw)
            speeds.append(speed)
            yaw_rates.append(yaw_rate)
        return torch.stack(speeds, dim=1), torch.stack(yaw_rates, dim=1)
