"""From videos to the numbers that a part of an evaluation holds; see common.evaluation.parts.

Everything is kept video by video, so that the report can draw intervals over videos and pair models by them.

Shapes: B videos, N raw frames (4(F − 1) + 1), F latent frames, K segments, D features, h w pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.evaluation.control_accuracy import ObeyedControl, trajectory_error
from common.evaluation.drift import DriftMeter
from common.evaluation.frechet import FeatureStatistics
from common.evaluation.latency import response_latency
from common.evaluation.motion import Motion, estimate_motion
from common.evaluation.scene_network import SceneNetwork, cut_segments
from common.evaluation.text_score import score_text
from data import miniworld
from data.miniworld.heldout import LEAD_IN, Scene
from data.miniworld.instruments import CAMERA, FRAMES_PER_LATENT, PHYSICS, measure_control
from data.miniworld.simulator import FPS, SIGNALS

DIGITS = 5  # of a feature, whose variance is about 1


def load_scene_network(device: torch.device) -> SceneNetwork:
    """The network that the mini world ships, in float32."""
    folder = Path(miniworld.__file__).parent / "scene_network"
    return SceneNetwork.from_pretrained(folder).float().eval().to(device)


def signal_indices(signals: Iterable[str]) -> list[int]:
    """Places in SIGNALS, the order of the mini world's physics."""
    return [SIGNALS.index(signal) for signal in signals]


def control_values(frames: Tensor, signals: Sequence[Sequence[str]]) -> dict[str, Any]:
    """What clips obey, uint8 [B, N, h, w, 3], under signals [B][F]; latent frame 0 is a picture and has no motion."""
    motion, obeyed = measure_control(frames)
    true = torch.tensor([signal_indices(row) for row in signals], device=frames.device)  # [B, F]
    error = trajectory_error(motion, *_driven(obeyed, true), FPS)
    return {
        "true": true[:, 1:].tolist(),
        "obeyed": obeyed.signals.tolist(),
        "position_share": error.position_share.tolist(),
        "heading_share": error.heading_share.tolist(),
    }


def _driven(obeyed: ObeyedControl, signals: Tensor) -> tuple[Tensor, Tensor]:
    """Speed and yaw rate [B, N] of the true car under latent signals [B, F], from the motion that the video begins
    with: no model is told how fast to start."""
    each = signals[:, 1:].repeat_interleave(FRAMES_PER_LATENT, dim=1)[:, 1:]  # of raw frames 2 …
    first = obeyed.speed[:, :1], obeyed.yaw_rate[:, :1]  # of raw frame 1
    later = PHYSICS.drive(each, first[0][:, 0], first[1][:, 0])
    return tuple(torch.cat([start, start, rest], dim=1) for start, rest in zip(first, later, strict=True))


def feature_values(network: SceneNetwork, frames: Tensor) -> dict[str, Any]:
    """Features [B][K][D] of the whole segments of videos."""
    segments = cut_segments(frames, network.config.num_frames)
    features = network.features(segments).double().unflatten(0, (len(frames), -1))
    return {"features": [[[round(x, DIGITS) for x in row] for row in video] for video in features.tolist()]}


def text_values(network: SceneNetwork, frames: Tensor, captions: Sequence[str]) -> dict[str, Any]:
    """Per kind of label, 1 or 0 for each video: shows it what its caption names?"""
    score = score_text(network, frames, captions)
    return {"correct": {kind: verdicts.tolist() for kind, verdicts in score.correct.items()}, "shown": score.shown}


def values_of(measure: str, network: SceneNetwork, frames: Tensor, scenes: Sequence[Scene], skip: int = 0) -> dict:
    """One of the measures of finished videos, "control", "frechet" or "text", without their first `skip` raw frames."""
    counted = frames[:, skip:]
    if measure == "control":
        signals = [scene.latent_signals()[skip // FRAMES_PER_LATENT :] for scene in scenes]
        return control_values(counted, signals)
    if measure == "frechet":
        return feature_values(network, counted)
    return text_values(network, counted, [scene.caption for scene in scenes])


def latency_values(frames: Tensor, scenes: Sequence[Scene]) -> dict[str, Any]:
    """Frames until each change of a live command shows, None for never."""
    motion: Motion = estimate_motion(frames, CAMERA, FPS, gaps=(1,))
    commands = torch.tensor([signal_indices(scene.signals) for scene in scenes], device=frames.device)
    latency = response_latency(motion, commands, PHYSICS)
    return {"frames": latency.frames.tolist(), "noise": list(latency.noise)}


def statistics_of(values: dict[str, Any]) -> FeatureStatistics:
    """Of all segments of all videos of a "frechet" part."""
    return FeatureStatistics.of(torch.tensor(values["features"], dtype=torch.float64).flatten(0, 1))


def drift_values(network: SceneNetwork, reference: FeatureStatistics, pieces: Iterable[Tensor]) -> dict[str, Any]:
    """Segments of ten seconds of streams that come in pieces, uint8 [B, n, h, w, 3]; the lead-in does not count."""
    meter, left = DriftMeter(network, reference, FPS), LEAD_IN
    for piece in pieces:
        skipped = min(left, piece.shape[1])
        left -= skipped
        if skipped < piece.shape[1]:
            meter.update(piece[:, skipped:])
    return {"segments": [asdict(segment) for segment in meter.segments]}
