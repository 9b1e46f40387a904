"""How far the look of a stream moves from where it began, segment by segment, in memory that does not grow with it.

A segment is ten seconds. Of each one it is known: the mean colour, saturation, contrast and sharpness of its frames,
and the Fréchet distance of its features from a reference of true video. Several streams run side by side as one batch;
a segment's distance is over all of them. Its finite-sample floor depends on how many scenes they show: streams of few
scenes lie far from a reference of all scenes although nothing drifts. Use many streams, or a reference of true video
with the same captions and the same controls, and measure the floor by metering true video in the streams' place.

Shapes: B streams, N raw frames of a piece, h w pixels, D feature width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from common.evaluation.frechet import FeatureStatistics, statistics_distance
from common.evaluation.scene_network import SceneNetwork, check_frames, cut_segments

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
FRAMES_AT_ONCE = 64  # bounds the memory of a long piece


@dataclass(frozen=True)
class Look:
    """What frames look like, all on the scale of 0…255.

    red, green, blue: mean of the channel.
    saturation: mean of the largest channel minus the smallest.
    contrast: standard deviation of the luma over a frame.
    sharpness: root mean square of the luma's Laplacian, the difference between a pixel and the mean of its four
        neighbours times four. It depends on the size of the picture: compare equal sizes.
    """

    red: float
    green: float
    blue: float
    saturation: float
    contrast: float
    sharpness: float


LOOK_NAMES = tuple(field.name for field in fields(Look))


def look_of_frames(frames: Tensor) -> Tensor:
    """uint8 [B, N, h, w, 3] → float64 [B, N, 6], the statistics of `Look` in its order, frame by frame, on the CPU."""
    check_frames(frames)
    parts = []
    for piece in frames.split(FRAMES_AT_ONCE, dim=1):
        pixels = piece.float()
        luma = pixels @ pixels.new_tensor(LUMA)  # [B, N, h, w]
        inner = luma[..., 1:-1, 1:-1]
        around = luma[..., :-2, 1:-1] + luma[..., 2:, 1:-1] + luma[..., 1:-1, :-2] + luma[..., 1:-1, 2:]
        statistics = [
            pixels.mean((2, 3)),
            (pixels.amax(-1) - pixels.amin(-1)).mean((2, 3))[..., None],
            luma.std((2, 3), correction=0)[..., None],
            (4 * inner - around).square().mean((2, 3)).sqrt()[..., None],
        ]
        parts.append(torch.cat(statistics, dim=-1).double().cpu())
    return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class Segment:
    """One segment of all streams together.

    start: seconds from the beginning of the streams.
    look: mean over frames and streams.
    distance: Fréchet distance from the reference.
    num_samples: network segments behind the distance.
    """

    start: float
    look: Look
    distance: float
    num_samples: int


class DriftMeter:
    """Watches streams go by.

        meter = DriftMeter(network, reference)
        for frames in pieces_of_any_length:  # uint8 [B, N, h, w, 3]
            meter.update(frames)
        summary = summarize(meter.segments)

    What it keeps: the features' sums of the segment under way, fewer frames than the network reads at once, and one
    line of numbers for every finished segment. Frames at the end of a segment that fill no network segment count for
    its look alone (at 16 fps there are none: 160 frames are 10 times 16).

    Args:
        network: reads features; it decides the device.
        reference: features of true video.
        fps: frames a second.
        segment_seconds: length of a segment.
    """

    def __init__(
        self, network: SceneNetwork, reference: FeatureStatistics, fps: float = 16.0, segment_seconds: float = 10.0
    ):
        self.network, self.reference = network, reference
        self.fps, self.segment_frames = fps, round(fps * segment_seconds)
        if self.segment_frames < network.config.num_frames:
            raise ValueError(
                f"a segment of {segment_seconds:g} s has {self.segment_frames} frames; "
                f"the network reads {network.config.num_frames} at once"
            )
        self.segments: list[Segment] = []
        self._begin()

    def _begin(self) -> None:
        self._features = FeatureStatistics(self.network.config.feature_dim)
        self._look_sum = torch.zeros(len(LOOK_NAMES), dtype=torch.float64)
        self._frames = 0  # of this segment, seen so far
        self._waiting: Tensor | None = None  # [B, fewer than the network reads, h, w, 3]

    def update(self, frames: Tensor) -> list[Segment]:
        """The next frames of all streams, uint8 [B, N, h, w, 3] with any N; returns the segments they completed."""
        check_frames(frames)
        finished = len(self.segments)
        while frames.shape[1]:
            room = self.segment_frames - self._frames
            self._add(frames[:, :room])
            frames = frames[:, room:]
            if self._frames == self.segment_frames:
                self._finish()
        return self.segments[finished:]

    def _add(self, frames: Tensor) -> None:
        """Frames that belong to the segment under way."""
        self._frames += frames.shape[1]
        self._look_sum += look_of_frames(frames).mean(0).sum(0)
        if self._waiting is not None:
            frames = torch.cat([self._waiting, frames], dim=1)
        length = self.network.config.num_frames
        ready = frames.shape[1] // length * length
        if ready:
            self._features.update(self.network.features(cut_segments(frames[:, :ready], length)))
        self._waiting = frames[:, ready:].clone()  # a copy: a view would keep the whole piece in memory

    def _finish(self) -> None:
        look = Look(*(self._look_sum / self._frames).tolist())
        distance = statistics_distance(self._features, self.reference)
        start = len(self.segments) * self.segment_frames / self.fps
        self.segments.append(Segment(start, look, distance, self._features.count))
        self._begin()


@dataclass(frozen=True)
class DriftSummary:
    """Ratios to the first minute: to the mean of its segments, not to one of them, whose own chance would be in all.

    distance_ratios: of every segment's Fréchet distance.
    look_ratios: name → ratio of every segment, of each statistic in `Look`.
    worst_distance: largest of distance_ratios; worst_distance_at: the seconds at which that segment begins.
    worst_look: name → the ratio farthest from 1, in either direction (half is as far as double).
    last_distance: mean ratio of the last minute.
    """

    distance_ratios: list[float]
    look_ratios: dict[str, list[float]]
    worst_distance: float
    worst_distance_at: float
    worst_look: dict[str, float]
    last_distance: float

    def distance_at(self, minute: int, segments_per_minute: int = 6) -> float:
        """Mean ratio of the segments of one minute, counted from 1.

        Raises:
            ValueError: when the stream was shorter.
        """
        ratios = self.distance_ratios[(minute - 1) * segments_per_minute : minute * segments_per_minute]
        if minute < 1 or len(ratios) < segments_per_minute:
            raise ValueError(f"the stream has {len(self.distance_ratios)} segments, too few for minute {minute}")
        return sum(ratios) / len(ratios)


def distance_from_one(ratio: float) -> float:
    """How far a ratio is from 1, where half is as far as double."""
    return abs(math.log(max(ratio, 1e-9)))


def summarize(segments: Sequence[Segment], first_seconds: float = 60.0, floor: float = 0.0) -> DriftSummary:
    """Compares every segment with the first `first_seconds`.

    Distances at their finite-sample floor hide drift: a ratio of 1.1 may be a doubling of the little that is real.
    `floor` (the mean distance of true video metered in the same way) is subtracted from every distance; what falls
    below a thousandth of it then counts as that.

    Raises:
        ValueError: without segments.
    """
    if not segments:
        raise ValueError("no segment is complete")
    distances = [max(segment.distance - floor, 1e-3 * floor, 1e-9) for segment in segments]
    first = [i for i, segment in enumerate(segments) if segment.start < first_seconds]

    def ratios(values: list[float]) -> list[float]:
        base = sum(values[i] for i in first) / len(first)
        return [value / base if base else math.inf if value else 1.0 for value in values]

    distance_ratios = ratios(distances)
    look_ratios = {name: ratios([getattr(segment.look, name) for segment in segments]) for name in LOOK_NAMES}
    worst = max(range(len(segments)), key=distance_ratios.__getitem__)
    last = [r for r, s in zip(distance_ratios, segments, strict=True) if s.start > segments[-1].start - 60.0]
    return DriftSummary(
        distance_ratios=distance_ratios,
        look_ratios=look_ratios,
        worst_distance=distance_ratios[worst],
        worst_distance_at=segments[worst].start,
        worst_look={name: max(values, key=distance_from_one) for name, values in look_ratios.items()},
        last_distance=sum(last) / len(last),
    )
