"""Known damage to video, of adjustable strength: what a measure of quality has to notice, more the worse it is.

Every function takes uint8 [B, N, h, w, 3], returns the same kind, and leaves its input alone; a strength of 0 changes
nothing. The strengths that `degrade` takes run from 0 to 1, the units of each are those of WORST.

Shapes: B batch, N raw frames, h w pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# What strength 1 means: standard deviation of the blur in pixels of a 64-row picture, standard deviation of the noise
# and of the colour shift in 0…255, share of the frames.
WORST = {"blur": 2.0, "noise": 24.0, "color_shift": 30.0, "frozen": 1.0, "shuffled": 1.0}


def degrade(frames: Tensor, kind: str, strength: float, generator: torch.Generator | None = None) -> Tensor:
    """One of WORST's kinds of damage at strength 0…1. `generator` lives where `frames` do.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in WORST:
        raise ValueError(f"unknown degradation {kind!r}; known are {', '.join(WORST)}")
    amount = strength * WORST[kind]
    if kind == "blur":
        return blur(frames, amount * frames.shape[2] / 64)
    function = {"noise": add_noise, "color_shift": shift_color, "frozen": freeze_frames, "shuffled": shuffle_frames}
    return function[kind](frames, amount, generator)


def blur(frames: Tensor, sigma: float) -> Tensor:
    """Gaussian blur within each frame; `sigma` in pixels."""
    if sigma <= 0:
        return frames.clone()
    down, across = (_blur_matrix(size, sigma, frames.device) for size in frames.shape[2:4])
    planes = frames.permute(0, 1, 4, 2, 3).float()  # [B, N, 3, h, w]
    return _to_bytes((down @ planes @ across.T).permute(0, 1, 3, 4, 2))


def _blur_matrix(size: int, sigma: float, device: torch.device) -> Tensor:
    """[size, size]: each row the weights of a pixel's neighbours, those beyond the edge given to the edge pixel."""
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, device=device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    neighbours = (torch.arange(size, device=device)[:, None] + offsets).clamp(0, size - 1)
    matrix = torch.zeros(size, size, device=device)
    return matrix.scatter_add_(1, neighbours, (kernel / kernel.sum()).expand(size, -1))


def add_noise(frames: Tensor, sigma: float, generator: torch.Generator | None = None) -> Tensor:
    """Independent Gaussian noise in every pixel and channel; `sigma` in 0…255."""
    noise = torch.randn(frames.shape, generator=generator, device=frames.device)
    return _to_bytes(frames.float() + sigma * noise)


def shift_color(frames: Tensor, amount: float, generator: torch.Generator | None = None) -> Tensor:
    """Adds one colour to each whole video: a random direction in RGB, root mean square `amount` in 0…255."""
    direction = torch.randn(len(frames), 1, 1, 1, 3, generator=generator, device=frames.device)
    direction = direction / direction.norm(dim=-1, keepdim=True) * math.sqrt(3)
    return _to_bytes(frames.float() + amount * direction)


def freeze_frames(frames: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """A stuttering video: `share` of the frames, at random places, repeat the frame shown before them."""
    batch, count = frames.shape[:2]
    frozen = _chosen(batch, count - 1, round(share * (count - 1)), generator, frames.device)
    frozen = torch.cat([torch.zeros_like(frozen[:, :1]), frozen], dim=1)  # [B, N]: the first has none before it
    shown = torch.arange(count, device=frames.device).expand(batch, -1).masked_fill(frozen, 0).cummax(1).values
    return _reorder(frames, shown)


def shuffle_frames(frames: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """`share` of the frames, at random places, change those places among themselves at random."""
    batch, count = frames.shape[:2]
    moved = _chosen(batch, count, round(share * count), generator, frames.device)
    order = torch.arange(count, device=frames.device).repeat(batch, 1)
    for row, places in zip(order, moved, strict=True):
        chosen = row[places]
        row[places] = chosen[torch.randperm(len(chosen), generator=generator, device=frames.device)]
    return _reorder(frames, order)


def _chosen(rows: int, columns: int, number: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """bool [rows, columns] with `number` random places of each row set."""
    rank = torch.rand(rows, columns, generator=generator, device=device).argsort(1).argsort(1)
    return rank < number


def _reorder(frames: Tensor, order: Tensor) -> Tensor:
    """Frame order[b, i] in place i: [B, N, …] and int64 [B, N]."""
    return frames[torch.arange(len(frames), device=frames.device)[:, None], order]


def _to_bytes(frames: Tensor) -> Tensor:
    return frames.round().clamp(0, 255).to(torch.uint8)
