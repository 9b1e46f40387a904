"""Training of the network that judges mini-world videos: labels and truth of every clip, and a run from end to end."""

import json

import numpy as np
import pytest
import torch

from common.config.errors import UserError
from common.data.index import read_index
from common.evaluation.scene_network import DEGRADATIONS, SceneNetwork
from data.miniworld import make_videos
from data.miniworld.looks import random_look
from data.miniworld.make_scene_network import (
    LABELS,
    draw_batch,
    make_scene_network,
    mean_motion,
    parse_arguments,
    read_clips,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Five clips of 20 frames, 32×64 pixels; the jobs that drew them."""
    folder = tmp_path_factory.mktemp("world")
    words = f"--output_dir {folder} --num_clips 5 --num_frames 20 --height 32 --width 64 --num_workers 0"
    args = make_videos.parse_arguments(words.split())
    make_videos.make_videos(args)
    return folder, make_videos.make_jobs(args)


@pytest.fixture(scope="module")
def clips(world):
    return read_clips(read_index(world[0] / "index.json", world[0], needs_control=False), SceneNetwork(LABELS))


def test_labels_and_motion_are_those_that_were_drawn(world, clips):
    network = SceneNetwork(LABELS)
    for number, job in enumerate(world[1]):
        look, _ = random_look(job.clip_seed())
        found = {kind: network.label_values(kind)[values[number]] for kind, values in clips.labels.items()}
        assert found == {"biome": look.biome, "weather": look.weather, "color": look.color}
        with np.load(job.truth) as truth:
            assert np.array_equal(clips.motion[number, :, 0], truth["speed"])
            assert np.array_equal(clips.motion[number, :, 1], truth["yaw_rate"])
    assert clips.frames.shape == (5, 20, 64, 96, 3) and clips.frames.dtype == torch.uint8


def test_a_batch_is_mirrored_with_its_labels_and_damaged_as_it_says(clips):
    batch = draw_batch(clips, 16, 20, torch.Generator().manual_seed(0))
    frames, motion, strengths = batch["frames"], batch["motion"], batch["strengths"]
    assert frames.shape == (20, 16, 64, 96, 3) and all(len(batch[kind]) == 20 for kind in LABELS)
    assert (strengths[:10] == 0).all() and ((strengths[10:] > 0).sum(1) == 1).all()
    assert ((strengths > 0).sum(0) == 10 // len(DEGRADATIONS)).all()
    for i in range(10):  # undamaged: each is a window of a clip, turned around where the number is even
        picture = frames[i].flip(2) if i % 2 == 0 else frames[i]
        picture = picture.flip(0) if i % 3 == 0 else picture
        sign = torch.tensor([1.0, -1.0 if i % 2 == 0 else 1.0]) * (-1 if i % 3 == 0 else 1)
        places = [(c, s) for c in range(5) for s in range(5) if torch.equal(clips.frames[c, s : s + 16], picture)]
        expected = [mean_motion(clips.motion[c, s : s + 16]) * sign for c, s in places]
        assert any(torch.allclose(motion[i], truth) for truth in expected)
        assert places[0][0] in (batch["color"][i] == clips.labels["color"]).nonzero()
    again = draw_batch(clips, 16, 20, torch.Generator().manual_seed(0))
    assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_training_writes_a_network_that_loads(world, tmp_path, capsys):
    output = tmp_path / "scene"
    words = f"--data_root {world[0]} --output_dir {output} --num_heldout 1 --steps 2 --batch_size 4 --device cpu"
    trained = make_scene_network(parse_arguments(words.split()))
    assert "biome accuracy" in capsys.readouterr().out
    assert sorted(file.name for file in output.iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors", "training.json"
    ]  # fmt: skip
    frames = torch.randint(0, 256, (2, 16, 64, 96, 3), dtype=torch.uint8)
    loaded = SceneNetwork.from_pretrained(output)
    assert torch.equal(loaded.read(frames).features, trained.read(frames).features)
    record = json.loads((output / "training.json").read_text())
    assert record["settings"]["steps"] == 2 and set(record["heldout"]) >= {"color accuracy", "speed R²"}


def test_bad_input_is_named(world, tmp_path):
    folder, jobs = world
    words = f"--data_root {folder} --output_dir {tmp_path} --device cpu"
    with pytest.raises(UserError, match="5 clips; --num_heldout 60 leaves none"):
        make_scene_network(parse_arguments(words.split()))
    entry = {"path": "videos/00000.mp4", "caption": "A car in the snow in fog."}
    (tmp_path / "index.json").write_text(json.dumps({"list": [entry]}))
    with pytest.raises(UserError, match="entry 1: the caption names no color"):
        read_clips(read_index(tmp_path / "index.json", folder, needs_control=False), SceneNetwork(LABELS))
    entry["caption"] = "A red car in the snow in fog."
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "00000.mp4").write_bytes(jobs[0].video.read_bytes())
    (tmp_path / "index.json").write_text(json.dumps({"list": [entry]}))
    with pytest.raises(UserError, match="entry 1: no truth in .*use make_videos"):
        read_clips(read_index(tmp_path / "index.json", tmp_path, needs_control=False), SceneNetwork(LABELS))
