"""Does what the caption names appear in the video? Accuracy of a classifier that was validated on true videos.

Shapes: B videos, N raw frames, h w pixels, K segments of a video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.evaluation.scene_network import SceneNetwork, check_frames, cut_segments


@dataclass(frozen=True)
class TextScore:
    """Verdicts on B videos.

    correct: label kind → float64 [B], 1 where the video shows what the caption names, 0 where it shows something else,
        NaN where the caption names nothing of that kind.
    shown: for each video, kind → the value that is seen in it.
    """

    correct: dict[str, Tensor]
    shown: list[dict[str, str]]


def score_text(network: SceneNetwork, frames: Tensor, captions: Sequence[str]) -> TextScore:
    """Reads B videos, uint8 [B, N, h, w, 3] with N at least the network's segment, against their captions.

    A video shows the value with the largest probability, averaged over its segments: what is out of sight for a moment
    is not held against it.

    Raises:
        ValueError: unless there is one caption a video.
    """
    check_frames(frames)
    if len(captions) != len(frames):
        raise ValueError(f"{len(captions)} captions for {len(frames)} videos")
    reading = network.read(cut_segments(frames, network.config.num_frames))
    named = [network.labels_of_caption(caption) for caption in captions]
    correct, shown = {}, [{} for _ in captions]
    for kind, logits in reading.logits.items():
        probability = logits.softmax(-1).unflatten(0, (len(frames), -1)).mean(1)  # [B·K, values] → [B, values]
        seen = [network.label_values(kind)[i] for i in probability.argmax(-1)]
        for video, value in zip(shown, seen, strict=True):
            video[kind] = value
        verdicts = [float(v == n[kind]) if kind in n else torch.nan for v, n in zip(seen, named, strict=True)]
        correct[kind] = torch.tensor(verdicts, dtype=torch.float64)
    return TextScore(correct, shown)
