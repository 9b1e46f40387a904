"""Drift of a stream: statistics with known values, any cut into pieces, memory, and the summary."""

import dataclasses
import tracemalloc

import pytest
import torch

from common.evaluation.drift import LOOK_NAMES, DriftMeter, Look, Segment, look_of_frames, summarize
from common.evaluation.frechet import FeatureStatistics, statistics_distance
from common.evaluation.scene_network import SceneNetwork, cut_segments

LABELS = {"weather": {"clear": ["clear sky"], "rain": ["in rain"]}}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return SceneNetwork(LABELS, height=16, width=24, num_frames=8, feature_dim=6, channels=(4, 4, 8, 8)).eval()


def random_frames(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_flat_colour():
    frames = torch.tensor([200, 100, 50], dtype=torch.uint8).expand(2, 3, 8, 8, 3)
    look = look_of_frames(frames)
    assert look.shape == (2, 3, len(LOOK_NAMES))
    expected = torch.tensor([200.0, 100, 50, 150, 0, 0], dtype=torch.float64).expand_as(look)
    torch.testing.assert_close(look, expected, rtol=0, atol=1e-4)


def test_checkerboard_has_the_largest_contrast_and_sharpness():
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 255
    look = look_of_frames(board.to(torch.uint8)[None, None, :, :, None].expand(1, 1, 8, 8, 3))[0, 0]
    # 4·255 against four black neighbours in every inner pixel, of either sign
    torch.testing.assert_close(look, torch.tensor([127.5, 127.5, 127.5, 0, 127.5, 1020], dtype=torch.float64))


def test_look_of_a_long_piece_is_that_of_its_frames():
    frames = random_frames(2, 70, 6, 6)
    alone = torch.cat([look_of_frames(frame) for frame in frames.split(1, dim=1)], dim=1)
    torch.testing.assert_close(look_of_frames(frames), alone)


@pytest.mark.parametrize("pieces", [[64], [1] * 64, [5, 13, 30, 16], [40, 24]])
def test_segments_do_not_depend_on_how_the_stream_is_cut(network, pieces):
    frames = random_frames(2, 64, 16, 24)
    reference = network.features(random_frames(20, 8, 16, 24, seed=1))
    meter = DriftMeter(network, FeatureStatistics.of(reference), fps=4, segment_seconds=5)  # 20 frames: 2 × 8 and 4
    completed = [segment for piece in frames.split(pieces, dim=1) for segment in meter.update(piece)]
    assert completed == meter.segments and len(completed) == 3
    for index, segment in enumerate(completed):
        part = frames[:, 20 * index : 20 * (index + 1)]
        features = network.features(cut_segments(part, 8))
        expected = statistics_distance(FeatureStatistics.of(features), FeatureStatistics.of(reference))
        assert (segment.start, segment.num_samples) == (5.0 * index, 4)
        assert segment.distance == pytest.approx(expected, rel=1e-4)
        look = look_of_frames(part).mean((0, 1))
        assert dataclasses.astuple(segment.look) == pytest.approx(look.tolist(), rel=1e-6)


def test_memory_does_not_grow_with_the_stream(network):
    """Python's own objects are traced; tensors are counted through the meter's attributes."""
    meter = DriftMeter(network, FeatureStatistics.of(torch.randn(20, 6)), fps=4, segment_seconds=5)

    def kept() -> int:
        tensors = [meter._waiting, meter._look_sum, meter._features.mean, meter._features._scatter]
        return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)

    sizes = []
    tracemalloc.start()
    for step in range(60):
        meter.update(random_frames(3, 13, 16, 24, seed=step))
        sizes.append((kept(), tracemalloc.get_traced_memory()[0]))
    tracemalloc.stop()
    tensors, objects = zip(*sizes, strict=True)
    assert max(tensors) < 3 * 8 * 16 * 24 * 3 + 4096
    assert len(meter.segments) == 39
    assert objects[-1] - objects[30] < 20 * 1000  # a line of numbers a segment


def test_a_segment_shorter_than_the_network_reads_is_refused(network):
    with pytest.raises(ValueError, match="has 4 frames; the network reads 8"):
        DriftMeter(network, FeatureStatistics.of(torch.randn(20, 6)), fps=4, segment_seconds=1)
    with pytest.raises(ValueError, match=r"float32 \[1, 8, 16, 24, 3\]"):
        DriftMeter(network, FeatureStatistics.of(torch.randn(20, 6)), fps=4).update(torch.zeros(1, 8, 16, 24, 3))


def segments_with(distances: list[float], red: list[float]) -> list[Segment]:
    return [
        Segment(10.0 * i, Look(r, 100, 100, 40, 50, 20), d, 100)
        for i, (d, r) in enumerate(zip(distances, red, strict=True))
    ]


def test_summary_compares_with_the_mean_of_the_first_minute():
    distances = [1.0, 3.0, 2.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0, 5.0, 3.0, 3.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]
    red = [100.0] * 6 + [150.0, 120.0] + [100.0] * 9 + [40.0]
    summary = summarize(segments_with(distances, red))
    assert summary.distance_ratios == pytest.approx([d / 2 for d in distances])
    assert (summary.worst_distance, summary.worst_distance_at) == (2.5, 90.0)
    assert summary.distance_at(1) == 1.0 and summary.distance_at(3) == 2.0 and summary.last_distance == 2.0
    assert summary.worst_look["red"] == pytest.approx(0.4)  # 1/0.4 is farther than 1.5
    assert summary.worst_look["green"] == 1.0
    with pytest.raises(ValueError, match="18 segments, too few for minute 4"):
        summary.distance_at(4)


def test_summary_without_the_floor_shows_more():
    segments = segments_with([3.0] * 6 + [4.0], [100.0] * 7)
    assert summarize(segments).worst_distance == pytest.approx(4 / 3)
    assert summarize(segments, floor=2.0).worst_distance == pytest.approx(2.0)
    assert summarize(segments_with([1.0] * 7, [0.0] * 7), floor=2.0).worst_distance == 1.0
    with pytest.raises(ValueError, match="no segment"):
        summarize([])
