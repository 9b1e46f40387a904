"""What a video of a driving world does: speed and yaw rate of the camera car, measured from its pixels alone.

Turning shifts everything above the horizon, so the yaw is the shift, in bearing, at which the sky and landmarks of two
frames correlate best. Driving moves the ground; seen from straight above, and turned by the yaw already known, that is
a plain translation along the direction of travel, so the speed is the shift at which the two views of the ground
correlate best. Both correlations are normalised, so weather, night and haze change only the confidence.

Several gaps between frames are compared and their curves added: short gaps cannot be fooled by texture that repeats
(kerbs every 2.75 m), long ones measure small motions more finely and survive blur.

Letters: `N` frames of one clip, `n` pairs of frames, `h w` picture, `D` bearings, `A` steps ahead on the ground, `R`
steps across it, `K` shifts, `V` candidate rates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 128  # pairs of frames compared at once; bounds the memory of long videos
GAPS = (1, 2, 4)  # frames between the two that are compared

# Candidate rates: wider than the car can go, so that the parabola through the best one has neighbours.
MAX_YAW_RATE, YAW_STEP = 0.8, 0.02  # rad/s
MIN_SPEED, MAX_SPEED, SPEED_STEP = -7.0, 14.0, 0.5  # m/s

BEARINGS = 128  # D
FARTHEST = 13.0  # m ahead; beyond, a row of the picture covers more than a metre of ground
STEP_AHEAD, STEP_ACROSS = 0.2, 0.4  # m
HALF_WIDTH = 9.0  # m of ground to either side
BASE = 1.4  # m between the two points on the ground whose difference in brightness is followed


@dataclass(frozen=True)
class Camera:
    """A pinhole camera behind a car that turns about its own middle.

    `height` and `distance` (behind the pivot) in metres, `horizon` as the share of the picture above it,
    `focal_length` in picture widths. `car_half_width`, `car_top` and `car_bottom` (m, at the pivot, from its ground
    up) bound what the car, its shadow and its leaning hide of the ground.
    """

    height: float
    distance: float
    horizon: float
    focal_length: float
    car_half_width: float = 1.9
    car_top: float = 1.7
    car_bottom: float = -0.4


@dataclass(frozen=True)
class Motion:
    """Measured motion, all [B, N]: entry i belongs to the step from frame i − 1 to frame i.

    `yaw_rate` in rad/s, left positive; `speed` in m/s, backwards negative; the confidences are the correlation at the
    best fit, 0…1. Entry 0 has no step: it repeats entry 1 with confidence 0.
    """

    yaw_rate: Tensor
    speed: Tensor
    yaw_confidence: Tensor
    speed_confidence: Tensor


def estimate_motion(frames: Tensor, camera: Camera, fps: float = 16.0, gaps: Sequence[int] = GAPS) -> Motion:
    """Measures the motion in clips: uint8 [B, N, h, w, 3] on any device → Motion of float32 [B, N] there.

    `gaps` are the numbers of frames between those compared. A gap of g spreads each change of motion over g − 1 frames
    before and after it; (1,) is the sharpest in time, and the noisiest.

    Raises:
        ValueError: for frames of another shape or type, fewer than two of them, or gaps without 1.
    """
    if frames.ndim != 5 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
        raise ValueError(f"frames are {frames.dtype} {tuple(frames.shape)}; they have to be uint8 [B, N, h, w, 3]")
    if frames.shape[1] < 2:
        raise ValueError("a clip of one frame has no motion; give at least two")
    gaps = [gap for gap in gaps if gap < frames.shape[1]]
    if min(gaps, default=0) != 1:
        raise ValueError(f"gaps are {gaps}; they have to be positive and to include 1")
    clips = [_measure_clip(clip, camera, fps, gaps) for clip in frames]
    return Motion(*(torch.stack(values) for values in zip(*clips, strict=True)))


def _measure_clip(frames: Tensor, camera: Camera, fps: float, gaps: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Yaw rate, speed and their confidences, each [N], of uint8 [N, h, w, 3]."""
    device = frames.device
    yaw_rates = torch.arange(-MAX_YAW_RATE, MAX_YAW_RATE + YAW_STEP / 2, YAW_STEP, device=device)
    speeds = torch.arange(MIN_SPEED, MAX_SPEED + SPEED_STEP / 2, SPEED_STEP, device=device)

    yaw_rate, yaw_confidence = _best(
        _pool([_yaw_curves(frames, camera, g, yaw_rates * g / fps) for g in gaps]), yaw_rates
    )
    turned = F.pad(torch.cumsum(yaw_rate / fps, dim=0), (1, 0))  # [N] radians since frame 0
    curves = [_speed_curves(frames, camera, gap, turned[gap:] - turned[:-gap], speeds * gap / fps) for gap in gaps]
    speed, speed_confidence = _best(_pool(curves), speeds)

    def whole(values: Tensor, first: Tensor) -> Tensor:
        return torch.cat([first[None], values])

    nothing = torch.zeros((), device=device)
    return (
        whole(yaw_rate, yaw_rate[0]), whole(speed, speed[0]),
        whole(yaw_confidence, nothing), whole(speed_confidence, nothing),
    )  # fmt: skip


def _pool(curves: list[Tensor]) -> Tensor:
    """Adds up what all pairs of frames say about each single step: curves of [N − gap, V] → [N − 1, V].

    A pair `gap` frames apart says something about each of the steps it spans, so a step's curve is the mean over the
    pairs across it, and then over the gaps. At the ends of a clip fewer long pairs lie across a step, and to one side
    only: there they count less.
    """
    steps = max(len(curve) for curve in curves)  # those of gap 1
    total, weight = curves[0].new_zeros(steps, curves[0].shape[1]), curves[0].new_zeros(steps, 1)
    for curve in curves:
        gap = steps + 1 - len(curve)
        for offset in range(gap):
            total[offset : offset + len(curve)] += curve / gap
            weight[offset : offset + len(curve)] += 1 / gap
    return total / weight


def _best(curves: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
    """The rate of the highest point of each curve [n, V], refined by a parabola, and its height clipped to 0…1."""
    peak = curves[:, 1:-1].argmax(dim=1, keepdim=True) + 1
    left, middle, right = (curves.gather(1, peak + side)[:, 0] for side in (-1, 0, 1))
    bend = left - 2 * middle + right
    # A flat curve (nothing to see) has no peak: its rate counts as zero, with no confidence.
    offset = torch.where(bend < -1e-7, 0.5 * (left - right) / bend.clamp(max=-1e-7), 0.0).clamp(-0.5, 0.5)
    flat = curves.amax(dim=1) - curves.amin(dim=1) < 1e-4
    rate = rates[peak[:, 0]] + offset * (rates[1] - rates[0])
    return rate.masked_fill(flat, 0.0), middle.clamp(0, 1).masked_fill(flat, 0.0)


def _resample(curves: Tensor, positions: Tensor) -> Tensor:
    """Reads curves [n, K] at fractional positions [V] with Catmull-Rom splines: [n, V]."""
    base = positions.floor().clamp(1, curves.shape[1] - 3)
    t = positions - base
    weights = 0.5 * torch.stack(
        [-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, -(t**2) + t**3]
    )  # [4, V]
    index = base.long() + torch.arange(-1, 3, device=curves.device)[:, None]  # [4, V]
    return (curves[:, index] * weights).sum(dim=1)


def _diagonal_sums(product: Tensor, first: int, count: int) -> Tensor:
    """Sums of `count` diagonals of [n, P, Q], from offset `first` on: entry k is Σ_p product[p, p + first + k]."""
    n, rows, columns = product.shape
    before, after = max(0, -first), max(0, first + count - 1 + rows - columns)
    padded = F.pad(product, (before, after))
    shear = padded.as_strided(
        (n, rows, count), (padded.stride(0), padded.stride(1) + 1, 1), padded.storage_offset() + first + before
    )
    return shear.sum(dim=1)


# ---- yaw -------------------------------------------------------------------------------------------------------------


def _yaw_curves(frames: Tensor, camera: Camera, gap: int, angles: Tensor) -> Tensor:
    """Correlation [N − gap, V] of each frame's sky with that `gap` frames before, turned by each of the angles [V]."""
    height, width = frames.shape[1:3]
    rows, device = round(camera.horizon * height), frames.device
    edge = math.atan(0.5 / camera.focal_length) - 0.5 / width  # of the outermost pixels' middles
    bearing = torch.linspace(-edge, edge, BEARINGS, device=device)  # right of the middle
    column = width * (0.5 + camera.focal_length * torch.tan(bearing)) - 0.5
    # Linear interpolation between columns as a matrix [w, D].
    weights = (1 - (column - torch.arange(width, device=device)[:, None]).abs()).clamp(min=0)
    step = float(bearing[1] - bearing[0])
    most = math.ceil(float(angles.abs().max()) / step) + 2
    curves = []
    for start in range(0, len(frames) - gap, CHUNK):
        part = frames[start : start + CHUNK + gap, :rows].float()
        part = torch.einsum("nrwc,wd->ndrc", part, weights).flatten(2)  # [n + gap, D, rows·3]
        part = part - part.mean(dim=1, keepdim=True)
        energy = F.pad(part.square().sum(dim=2).cumsum(dim=1), (1, 0))  # [n + gap, D + 1]
        before, after = part[:-gap], part[gap:]
        # After a turn to the left by s steps, what was at bearing index i is at i + s.
        product = torch.bmm(before, after.transpose(1, 2))  # [n, D, D]
        correlation = _diagonal_sums(product, -most, 2 * most + 1)
        shift = torch.arange(-most, most + 1, device=device)
        low, high = (-shift).clamp(min=0), BEARINGS - shift.clamp(min=0)  # bearings of `before` that stay in view
        energy_before = energy[:-gap][:, high] - energy[:-gap][:, low]
        energy_after = energy[gap:][:, high + shift] - energy[gap:][:, low + shift]
        correlation = correlation / (energy_before * energy_after + 1.0).sqrt()
        curves.append(_resample(correlation, angles / step + most))
    return torch.cat(curves)


# ---- speed -----------------------------------------------------------------------------------------------------------


def _ground_views(frames: Tensor, camera: Camera, ahead: Tensor, turned: Tensor | None) -> tuple[Tensor, Tensor]:
    """The ground seen from above: how its colours change over BASE ahead, [n, A', R, 3], and where that is visible,
    0 or 1, [n or 1, A', R]; A' is A less the steps in BASE.

    `ahead` [A] is metres from the camera; `turned` [n] turns the view about the pivot, to the left when positive: the
    pixel (a, r) shows what will be there after that turn.
    """
    height, width = frames.shape[1:3]
    rows, focal = round(camera.horizon * height), camera.focal_length * width
    across = torch.arange(-HALF_WIDTH, HALF_WIDTH + STEP_ACROSS / 2, STEP_ACROSS, device=frames.device)
    right, forward = across[None, None], (ahead - camera.distance)[None, :, None]  # from the pivot
    if turned is not None:
        sine, cosine = turned.sin()[:, None, None], turned.cos()[:, None, None]
        right, forward = right * cosine - forward * sine, forward * cosine + right * sine
    depth = forward + camera.distance
    right, depth = torch.broadcast_tensors(right, depth)
    column, below = width / 2 + focal * right / depth, focal * camera.height / depth  # edges at 0 and w; 0 at horizon
    visible = (column > 1) & (column < width - 1) & (below < height - rows - 0.5)
    unit = focal / camera.distance  # pixels of a metre at the pivot
    up = camera.height - below / unit
    hidden = (
        ((column - width / 2).abs() < camera.car_half_width * unit) & (up < camera.car_top) & (up > camera.car_bottom)
    )
    mask = (visible & ~hidden).float()

    grid = torch.stack([2 * column / width - 1, 2 * below / (height - rows) - 1], dim=-1)
    picture = frames[:, rows:].permute(0, 3, 1, 2).float()
    view = F.grid_sample(picture, grid.expand(len(frames), -1, -1, -1), align_corners=False, padding_mode="border")
    # A difference along the direction of travel, where both its ends are visible. A filter that changes with the place
    # in the picture would itself be texture that stands still, and draw every speed towards zero.
    reach = round(BASE / STEP_AHEAD)
    mask = mask[:, reach:] * mask[:, :-reach]
    view = (view[:, :, reach:] - view[:, :, :-reach]) * mask[:, None]
    return view.permute(0, 2, 3, 1), mask


def _speed_curves(frames: Tensor, camera: Camera, gap: int, turned: Tensor, distances: Tensor) -> Tensor:
    """Correlation [N − gap, V] of each frame's ground with that `gap` frames before, moved by each distance [V] (m).

    `turned` [N − gap] is how far the car turned between the two.
    """
    height, width = frames.shape[1:3]
    nearest = camera.focal_length * width * camera.height / (height - round(camera.horizon * height)) + 0.05
    first = math.floor(float(distances.min()) / STEP_AHEAD) - 2  # the lowest shift, in steps
    count = math.ceil(float(distances.max()) / STEP_AHEAD) + 2 - first + 1
    steps = round((FARTHEST - nearest) / STEP_AHEAD)
    ahead = nearest + STEP_AHEAD * torch.arange(steps, device=frames.device)
    positions = distances / STEP_AHEAD - first
    curves = []
    for start in range(0, len(frames) - gap, CHUNK):
        part = frames[start : start + CHUNK + gap]
        # With `s` the way driven: p_before = R(turned) · (p_after + s), both from the pivot, in the car's directions.
        before, seen_before = _ground_views(part[:-gap], camera, ahead, turned[start : start + CHUNK])
        after, seen_after = _ground_views(part[gap:], camera, ahead, None)
        shape = (len(before), before.shape[1], -1)

        def sums(x: Tensor, y: Tensor, shape=shape) -> Tensor:
            product = torch.bmm(x.reshape(shape), y.reshape(shape).transpose(1, 2))
            return _diagonal_sums(product, first, count)

        energy_after = sums(after.square().sum(-1), seen_before)
        energy_before = sums(seen_after.expand_as(seen_before), before.square().sum(-1))
        correlation = sums(after, before) / (energy_after * energy_before + 1.0).sqrt()
        curves.append(_resample(correlation, positions))
    return torch.cat(curves)
