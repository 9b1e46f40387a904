"""A small video network that names what a segment shows and measures how it moves; its features carry the Fréchet
distance.

It learns on true, labelled videos of one world, and all it knows of that world is in its config: which kinds of label
there are, their values, and the words by which captions name them. So it serves any world whose captions name things.

Shapes: B batch, N raw frames of a segment, h w pixels, D feature width, K segments of a video.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

# Pictures damaged in these ways are part of the training, and the network has to say how badly (0…1 each).
DEGRADATIONS = ("blur", "noise", "color_shift", "frozen", "shuffled")


@dataclass(frozen=True)
class SceneReading:
    """What the network reads from B segments.

    features: [B, D], the layer that everything else is a linear function of.
    logits: name of a label kind → [B, number of its values], in the order of `label_values`.
    motion: [B, 2], mean speed in m/s and mean yaw rate in rad/s (left is positive).
    degradation: [B, 5], estimated strength 0…1 of each of DEGRADATIONS.
    """

    features: Tensor
    logits: dict[str, Tensor]
    motion: Tensor
    degradation: Tensor


def _convolution(inputs: int, outputs: int, kernel: tuple[int, ...], stride: tuple[int, ...]) -> nn.Sequential:
    """Convolution over time, height and width. Batch and not group normalisation: a group's statistics would divide
    the very brightness and contrast out of the picture whose drift is to be seen."""
    padding = tuple(size // 2 for size in kernel)
    convolution = nn.Conv3d(inputs, outputs, kernel, stride, padding, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm3d(outputs), nn.SiLU())


class SceneNetwork(ModelMixin, ConfigMixin):
    """Classifier of labels, estimator of motion and of damage; `save_pretrained` and `from_pretrained` are diffusers'.

    Args:
        labels: kind → value → the phrases by which a caption names it, as {"color": {"red": ["red car"], …}, …}.
        height, width: pixels that segments are resized to, multiples of 8.
        num_frames: raw frames of a segment, N.
        feature_dim: D.
        channels: widths of the four convolutions.
        motion_scale: m/s and rad/s that the motion head counts as 1.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        labels: Mapping[str, Mapping[str, Sequence[str]]],
        height: int = 64,
        width: int = 96,
        num_frames: int = 16,
        feature_dim: int = 64,
        channels: Sequence[int] = (16, 32, 64, 96),
        motion_scale: Sequence[float] = (6.0, 0.3),
    ):
        super().__init__()
        first, second, third, fourth = channels
        self.stem = _convolution(6, first, (1, 5, 5), (1, 2, 2))
        self.down = _convolution(first, second, (1, 3, 3), (1, 2, 2))
        self.position = nn.Parameter(torch.zeros(second, 1, height // 4, width // 4))
        self.motion_down = _convolution(second, third, (3, 3, 3), (2, 2, 2))
        self.deep = _convolution(third, fourth, (3, 3, 3), (2, 1, 1))
        self.pool = nn.AdaptiveAvgPool3d((1, 2, 3))  # sky and ground, left, middle and right
        self.feature = nn.Linear(fourth * 6, feature_dim)
        self.heads = nn.ModuleDict({kind: nn.Linear(feature_dim, len(values)) for kind, values in labels.items()})
        self.motion = nn.Linear(feature_dim, 2)
        self.degradation = nn.Linear(feature_dim, len(DEGRADATIONS))
        self.register_buffer("motion_unit", torch.tensor(tuple(motion_scale)), persistent=False)

    def forward(self, frames: Tensor) -> SceneReading:
        """Segments uint8 [B, N, h, w, 3] → SceneReading.

        Raises:
            ValueError: unless `frames` has that type and shape, with the N of the config.
        """
        check_frames(frames)
        if frames.shape[1] != self.config.num_frames:
            raise ValueError(f"segments have {frames.shape[1]} frames; this network reads {self.config.num_frames}")
        pictures = self._pictures(frames)  # [B, 3, N, h, w]
        # What changed since the frame before, at full resolution and enlarged: motion of a fraction of a pixel, noise,
        # and frames that stand still or are out of order are small beside the picture itself, and would be learnt last.
        changes = pad(4 * pictures.diff(dim=2), (0, 0, 0, 0, 1, 0))
        hidden = self.down(self.stem(torch.cat([pictures, changes], dim=1))) + self.position  # [B, C, N, h/4, w/4]
        pooled = self.pool(self.deep(self.motion_down(hidden)))  # [B, C, 1, 2, 3]
        features = self.feature(pooled.flatten(1))
        logits = {kind: head(features) for kind, head in self.heads.items()}
        return SceneReading(features, logits, self.motion(features) * self.motion_unit, self.degradation(features))

    def _pictures(self, frames: Tensor) -> Tensor:
        """uint8 [B, N, h, w, 3] → [B, 3, N, height, width] in −1…1, in the network's number type."""
        size = (self.config.height, self.config.width)
        pictures = frames.permute(0, 1, 4, 2, 3).to(self.dtype)  # [B, N, 3, h, w]
        if frames.shape[2:4] != size:
            flat = interpolate(pictures.flatten(0, 1), size=size, mode="bilinear", antialias=True)
            pictures = flat.unflatten(0, frames.shape[:2])
        return pictures.transpose(1, 2) / 127.5 - 1

    @torch.no_grad()
    def read(self, segments: Tensor, batch_size: int = 32) -> SceneReading:
        """`forward` without gradients, in evaluation mode, in batches; float32 results on the CPU.

        Segments uint8 [B, N, h, w, 3] may lie on any device.
        """
        was_training = self.training
        self.eval()
        parts = [self(batch.to(self.device)) for batch in segments.split(batch_size)]
        self.train(was_training)

        def joined(tensors: list[Tensor]) -> Tensor:
            return torch.cat([tensor.float().cpu() for tensor in tensors])

        return SceneReading(
            features=joined([part.features for part in parts]),
            logits={kind: joined([part.logits[kind] for part in parts]) for kind in self.heads},
            motion=joined([part.motion for part in parts]),
            degradation=joined([part.degradation for part in parts]),
        )

    def features(self, segments: Tensor, batch_size: int = 32) -> Tensor:
        """float32 [B, D] on the CPU: what the Fréchet distance compares. Segments uint8 [B, N, h, w, 3]."""
        return self.read(segments, batch_size).features

    def label_values(self, kind: str) -> tuple[str, ...]:
        """The values of a label kind, in the order of its logits: alphabetical, since a saved config keeps no other."""
        return tuple(sorted(self.config.labels[kind]))

    def labels_of_caption(self, caption: str) -> dict[str, str]:
        """What a caption names: kind → value; see `labels_of_caption`."""
        return labels_of_caption(caption, self.config.labels)

    @torch.no_grad()
    def rescale_features(self, features: Tensor) -> None:
        """Shifts and scales the feature layer, in place, so that `features` [n, D] of true video would have had mean 0
        and a mean variance of 1; what the heads say stays the same.

        One factor for all directions: their proportions, which training found, are kept. It makes distances of
        differently trained networks comparable in size.
        """
        mean, scale = features.double().mean(0), features.double().var(0).mean().sqrt()
        for head in (*self.heads.values(), self.motion, self.degradation):
            head.bias += (head.weight.double() @ mean.to(head.weight.device)).to(head.bias)
            head.weight *= scale.to(head.weight)
        self.feature.bias -= mean.to(self.feature.bias)
        self.feature.bias /= scale.to(self.feature.bias)
        self.feature.weight /= scale.to(self.feature.weight)


def check_frames(frames: Tensor) -> None:
    """ValueError unless `frames` is uint8 [B, N, h, w, 3]."""
    if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
        found = f"{str(frames.dtype).removeprefix('torch.')} {list(frames.shape)}"
        raise ValueError(f"frames are {found}; uint8 [B, N, h, w, 3] is needed")


def cut_segments(frames: Tensor, num_frames: int) -> Tensor:
    """Videos [B, n, h, w, 3] → their whole segments [B·K, num_frames, h, w, 3], K = n // num_frames, one after another.

    Raises:
        ValueError: when a video is shorter than a segment.
    """
    count = frames.shape[1] // num_frames
    if not count:
        raise ValueError(f"the video has {frames.shape[1]} frames; a segment needs {num_frames}")
    return frames[:, : count * num_frames].unflatten(1, (count, num_frames)).flatten(0, 1)


def labels_of_caption(caption: str, labels: Mapping[str, Mapping[str, Sequence[str]]]) -> dict[str, str]:
    """What a caption names: kind → value, only kinds of which it names exactly one value.

    A value is named by one of its phrases; where the caption holds no known phrase of a kind, by the value's own name
    as a word ("snow"). Upper and lower case are the same.
    """
    text = caption.lower()
    found = {}
    for kind, phrases in labels.items():
        named = [value for value, words in phrases.items() if any(_holds(text, phrase) for phrase in words)]
        named = named or [value for value in phrases if _holds(text, value)]
        if len(named) == 1:
            found[kind] = named[0]
    return found


def _holds(text: str, phrase: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(phrase.lower())}(?!\w)", text) is not None
