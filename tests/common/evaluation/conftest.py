"""True clips of the mini world, drawn once for all tests of the instruments."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.miniworld.instruments import latent_signals, measure_control, signals_of_frames
from data.miniworld.looks import BIOMES, WEATHERS, Look
from data.miniworld.render import render
from data.miniworld.simulator import SIGNALS, simulate

NUM_LATENTS = 17


@pytest.fixture(scope="session")
def drives():
    """Clips of all biomes and weathers, on the road and off, with the truth and what the instruments say.

    `frames` uint8 [B, N, h, w, 3], `signals` [B, F], `speed` and `yaw_rate` [B, N], `motion`, `control`, `looks`.
    """
    looks = [Look(b, w, "red", 40 + i) for i, (b, w) in enumerate((b, w) for b in BIOMES for w in WEATHERS)]
    looks = [look for look in looks if (look.biome, look.weather) != ("city", "sunset")][::2]
    cars, signals = [], []
    for index in range(len(looks)):
        latent = latent_signals(NUM_LATENTS, np.random.default_rng([31, index]))
        signals.append([SIGNALS.index(signal) for signal in latent])
        cars.append(simulate(signals_of_frames(latent), seed=70_000 + index))
    frames = torch.from_numpy(np.stack([render(car, look) for car, look in zip(cars, looks, strict=True)]))
    motion, control = measure_control(frames)
    return SimpleNamespace(
        frames=frames,
        signals=torch.tensor(signals),
        speed=torch.tensor(np.stack([car.speed for car in cars]), dtype=torch.float32),
        yaw_rate=torch.tensor(np.stack([car.yaw_rate for car in cars]), dtype=torch.float32),
        motion=motion,
        control=control,
        looks=looks,
    )
