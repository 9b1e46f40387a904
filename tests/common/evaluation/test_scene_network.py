"""The shipped network of the mini world: it reads true videos, and its features see damage, more the worse it is."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.evaluation.degradations import WORST, degrade, freeze_frames, shuffle_frames
from common.evaluation.frechet import FeatureStatistics, statistics_distance
from common.evaluation.scene_network import DEGRADATIONS, SceneNetwork, cut_segments, labels_of_caption
from common.evaluation.text_score import score_text
from data.miniworld.captions import BIOME_WORDS, COLORS, WEATHER_WORDS
from data.miniworld.looks import random_look
from data.miniworld.make_scene_network import LABELS, mean_motion
from data.miniworld.render import render
from data.miniworld.simulator import random_signals, simulate

SHIPPED = Path(__file__).parents[3] / "data" / "miniworld" / "scene_network"
NUM_SCENES, NUM_FRAMES = 64, 16
STRENGTHS = (0.25, 0.5, 1.0)


@pytest.fixture(scope="module")
def network():
    return SceneNetwork.from_pretrained(SHIPPED)


def true_segments(first_seed: int) -> dict:
    """One segment of each of NUM_SCENES scenes, never seen in training. Another `first_seed`: the same scenes, other
    drives; so that what differs between two such sets is chance of the drive alone."""
    frames, motion, captions = [], [], []
    for number in range(NUM_SCENES):
        look, caption = random_look(5_000_000 + number)
        drive = first_seed + number
        trajectory = simulate(random_signals(NUM_FRAMES, np.random.default_rng(drive)), drive)
        frames.append(torch.from_numpy(render(trajectory, look)))
        motion.append(torch.from_numpy(np.stack([trajectory.speed, trajectory.yaw_rate], axis=-1)))
        captions.append(caption)
    return {"frames": torch.stack(frames), "motion": torch.stack(motion), "captions": captions}


@pytest.fixture(scope="module")
def true():
    return true_segments(6_000_000)


@pytest.fixture(scope="module")
def reading(network, true):
    return network.read(true["frames"])


@pytest.fixture(scope="module")
def reference(network):
    """Features of true video, the same scenes with other drives."""
    return FeatureStatistics.of(network.features(true_segments(7_000_000)["frames"]))


def test_it_reads_true_videos(network, true):
    correct = score_text(network, true["frames"], true["captions"]).correct
    assert correct["biome"].mean() == 1.0
    assert correct["weather"].mean() >= 0.95 and correct["color"].mean() >= 0.95


def test_it_reads_motion(reading, true):
    truth = mean_motion(true["motion"])
    error = (reading.motion - truth).square().mean(0) / truth.var(0)
    assert (error < torch.tensor([0.15, 0.15])).all(), error


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_distance_grows_with_damage(network, true, reading, reference, kind):
    """From the undamaged, and beyond what chance of the drive makes at this number of segments."""
    undamaged = FeatureStatistics.of(reading.features)
    floor = statistics_distance(undamaged, reference)
    distances = []
    for strength in STRENGTHS:
        damaged = degrade(true["frames"], kind, strength, torch.Generator().manual_seed(0))
        distances.append(statistics_distance(FeatureStatistics.of(network.features(damaged)), undamaged))
    growth = [after / before for before, after in zip(distances, distances[1:], strict=False)]
    assert min(growth) > 1.3 and distances[0] > 0.1, distances
    assert distances[1] > floor and distances[2] > 2.5 * floor, (floor, distances)


def test_it_names_the_damage(network, true, reading):
    assert reading.degradation.abs().mean() < 0.1
    for index, kind in enumerate(DEGRADATIONS):
        damaged = degrade(true["frames"][:12], kind, 0.8, torch.Generator().manual_seed(1))
        seen = network.read(damaged).degradation.mean(0)
        assert seen.argmax() == index and seen[index] > 2 * seen.sort().values[-2], (kind, seen)


def test_order_counts_and_not_only_the_pictures(network, true, reading):
    """Played backwards, the same pictures move the other way."""
    backwards = network.read(true["frames"].flip(1)).motion
    assert torch.corrcoef(torch.stack([backwards[:, 1], reading.motion[:, 1]]))[0, 1] < -0.8
    assert torch.corrcoef(torch.stack([backwards[:, 0], reading.motion[:, 0]]))[0, 1] < -0.5


def test_mirrored_video_turns_the_other_way(network, true, reading):
    mirrored = network.read(true["frames"].flip(3)).motion
    torch.testing.assert_close(mirrored[:, 1], -reading.motion[:, 1], rtol=0, atol=0.15)


def test_every_caption_of_the_world_is_understood(network):
    for kind, values in (("biome", BIOME_WORDS), ("weather", WEATHER_WORDS), ("color", COLORS)):
        assert set(network.label_values(kind)) == set(values)
    for seed in range(300):
        look, caption = random_look(seed)
        expected = {"biome": look.biome, "weather": look.weather, "color": look.color}
        assert network.labels_of_caption(caption) == expected, caption


def test_captions_in_other_words():
    assert labels_of_caption("SNOW at sunset; no vehicle", LABELS) == {"biome": "snow", "weather": "sunset"}
    assert labels_of_caption("a forest beside a desert, in fog", LABELS) == {"weather": "fog"}  # two biomes: unclear
    assert labels_of_caption("a red barn and a blue car", LABELS) == {"color": "blue"}
    assert labels_of_caption("grassy", LABELS) == {}


def test_a_caption_that_names_nothing_does_not_count(network, true):
    score = score_text(network, true["frames"][:3], [*true["captions"][:2], "a quiet drive in fog"])
    assert score.correct["biome"].isnan().tolist() == [False, False, True]
    assert (score.correct["biome"][:2] == 1).all() and set(score.shown[2]) == set(LABELS)
    with pytest.raises(ValueError, match="1 captions for 3 videos"):
        score_text(network, true["frames"][:3], ["a"])


def test_other_sizes_are_resized(network, true, reading):
    large = true["frames"][:4].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    small = network.read(large)
    assert torch.equal(small.logits["biome"].argmax(-1), reading.logits["biome"][:4].argmax(-1))


def test_wrong_input_is_refused(network):
    with pytest.raises(ValueError, match="uint8"):
        network(torch.zeros(1, 16, 64, 96, 3))
    with pytest.raises(ValueError, match="8 frames; this network reads 16"):
        network(torch.zeros(1, 8, 64, 96, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="has 5 frames; a segment needs 16"):
        cut_segments(torch.zeros(1, 5, 4, 4, 3, dtype=torch.uint8), 16)


def test_another_world_is_saved_with_its_labels(tmp_path):
    labels = {"room": {"kitchen": ["in the kitchen"], "hall": ["a long hall"], "attic": ["under the roof"]}}
    network = SceneNetwork(labels, height=16, width=24, num_frames=4, feature_dim=5, channels=(4, 4, 4, 4)).eval()
    with torch.no_grad():
        network.position.normal_(generator=torch.Generator().manual_seed(0))
    frames = torch.randint(0, 256, (3, 4, 20, 30, 3), dtype=torch.uint8)
    before = network.read(frames, batch_size=2)
    network.rescale_features(before.features)
    network.save_pretrained(tmp_path)
    loaded = SceneNetwork.from_pretrained(tmp_path)
    after = loaded.read(frames)
    torch.testing.assert_close(after.features.var(0).mean(), torch.tensor(1.0))
    torch.testing.assert_close(after.logits["room"], before.logits["room"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after.motion, before.motion, rtol=1e-3, atol=1e-3)
    assert loaded.label_values("room") == network.label_values("room") == ("attic", "hall", "kitchen")
    assert loaded.labels_of_caption("We stand in the kitchen") == {"room": "kitchen"}


@pytest.mark.parametrize("kind", WORST)
def test_no_strength_no_damage(kind):
    frames = torch.randint(0, 256, (2, 6, 16, 16, 3), dtype=torch.uint8)
    assert torch.equal(degrade(frames, kind, 0.0), frames)
    again = [degrade(frames, kind, 0.7, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again) and again[0].dtype == torch.uint8 and not torch.equal(again[0], frames)


def test_frozen_and_shuffled_frames():
    frames = torch.arange(10, dtype=torch.uint8)[None, :, None, None, None].expand(4, 10, 2, 2, 3)
    frozen = freeze_frames(frames, 5 / 9, torch.Generator().manual_seed(0))[:, :, 0, 0, 0].int()
    assert ((frozen.diff(dim=1) == 0).sum(1) == 5).all() and (frozen[:, 0] == 0).all()
    assert (freeze_frames(frames, 1.0) == 0).all()
    shuffled = shuffle_frames(frames, 0.4, torch.Generator().manual_seed(0))[:, :, 0, 0, 0].int()
    assert (shuffled.sort(1).values == torch.arange(10)).all() and ((shuffled != torch.arange(10)).sum(1) <= 4).all()
    with pytest.raises(ValueError, match="unknown degradation 'fire'"):
        degrade(frames, "fire", 0.5)
