"""Distilling a light decoder from the mini world's VAE: it learns, resumes exactly, and says what is wrong."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from common.cogvideox.light_decoder import LightVideoDecoder, load_light_decoder
from common.cogvideox.pipeline_io import load_component
from common.data.buckets import Bucket
from common.data.dataset import VideoDataset
from common.data.index import read_index
from common.tools import distill_decoder
from common.training import decoder_targets
from common.training.decoder_distillation import DecoderDistillation, reconstruction_loss
from tests.conftest import ROOT

BASE = ROOT / "data" / "miniworld" / "weights" / "base"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def distill(tiny_world, tmp_path, monkeypatch):
    """Runs the tool on windows of 17 frames of 32×64 pixels; returns the report. `where` is the output's name."""
    monkeypatch.setattr(distill_decoder, "TIMED_CHUNKS", 3)

    def run(where: str, options: str = "--steps 8"):
        place = ["--model_path", str(BASE), "--data_root", str(tiny_world), "--output_dir", str(tmp_path / where)]
        size = "--height 32 --width 64 --num_frames 17 --num_heldout 1 --widths 16 16 8 --layers 1 1 1 --batch_size 2"
        words = [*place, "--device", "cpu", *f"{size} {options}".split()]
        return distill_decoder.distill(distill_decoder.parse_arguments(words))

    return run


def weights(path):
    return load_file(path / WEIGHTS)


def untrained_psnr(tiny_world, report):
    settings = report["settings"]
    vae = load_component(BASE, "vae")
    torch.manual_seed(0)
    light = LightVideoDecoder.for_vae(vae, **{name: settings[name] for name in ("widths", "layers", "memory_layers")})
    records = read_index(tiny_world / "index.json", tiny_world, needs_control=False)
    videos = VideoDataset(records[-1:], [Bucket(17, 32, 64)], fps=16)
    return distill_decoder.quality(light, vae, videos)["psnr_to_vae"]


def test_it_learns_what_the_vae_shows_and_leaves_a_model_and_a_report(distill, tiny_world, tmp_path, capsys):
    options = "--steps 60 --learning_rate 5e-3 --widths 32 16 16 --crop 4"
    report = distill("light", options)
    assert report["psnr_to_vae"] > untrained_psnr(tiny_world, report) + 5
    assert report["psnr_to_video"] < report["vae_psnr_to_video"]
    assert report["milliseconds"] > 0 and report["vae_milliseconds"] > 0 and report["frames_timed"] == 8
    assert sorted(path.name for path in (tmp_path / "light").iterdir()) == ["config.json", WEIGHTS, "report.json"]
    assert json.loads((tmp_path / "light" / "report.json").read_text()) == report
    light = load_light_decoder(tmp_path / "light", load_component(BASE, "vae"))
    assert sum(p.numel() for p in light.parameters()) == report["parameters"]
    rows = distill_decoder.table(report).splitlines()
    assert rows[1].split() == ["PSNR", "to", "the", "VAE", f"{report['psnr_to_vae']:.2f}"]
    capsys.readouterr()
    assert distill("light", options) == report
    assert "is complete; nothing to do" in capsys.readouterr().out


def test_stopped_anywhere_and_resumed_it_equals_an_unbroken_run(distill, tmp_path, monkeypatch):
    distill("unbroken")
    expected = weights(tmp_path / "unbroken")

    def terminated(owner, name, call):
        """SIGTERM comes during the `call`-th call of a function."""
        original, calls = getattr(owner, name), []

        def wrapped(*args):
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args)

        return original, lambda: monkeypatch.setattr(owner, name, wrapped)

    for owner, name, call in ((decoder_targets, "reconstruct", 2), (DecoderDistillation, "take_step", 3)):
        original, patch = terminated(owner, name, call)
        patch()
        assert distill("broken") is None
        monkeypatch.setattr(owner, name, original)
    partial = tmp_path / "broken" / ".partial"
    assert torch.load(partial / "checkpoint.pt", weights_only=True)["step"] == 3
    assert json.loads((partial / "done.json").read_text()) == {"windows": 3}
    assert distill("broken")["steps"] == 8
    assert not partial.exists()
    found = weights(tmp_path / "broken")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_killed_run_goes_on_from_its_last_checkpoint(distill, tmp_path, monkeypatch):
    original = DecoderDistillation.take_step

    def killed(self, *batch):
        if self.step == 5:
            raise MemoryError("killed")
        return original(self, *batch)

    monkeypatch.setattr(DecoderDistillation, "take_step", killed)
    with pytest.raises(MemoryError):
        distill("killed", "--steps 8 --checkpointing_steps 2")
    checkpoint = tmp_path / "killed" / ".partial" / "checkpoint.pt"
    assert torch.load(checkpoint, weights_only=True)["step"] == 4
    monkeypatch.setattr(DecoderDistillation, "take_step", original)
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:1000])
    with pytest.raises(distill_decoder.UserError, match="checkpoint.pt is damaged"):
        distill("killed")
    checkpoint.write_bytes(whole)
    with pytest.raises(distill_decoder.UserError, match=r"other settings \(steps 8 -> 9, seed 0 -> 1\)"):
        distill("killed", "--steps 9 --seed 1")
    assert distill("killed")["steps"] == 8


def test_the_loss_is_that_of_pixels_and_of_what_is_sharp():
    target = torch.rand(1, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert reconstruction_loss(target, target) == 0
    assert reconstruction_loss(target + 0.1, target).item() == pytest.approx(0.1, rel=1e-4)  # no differences
    blurred = target.mean(dim=(-1, -2), keepdim=True).expand_as(target)
    assert reconstruction_loss(blurred, target) > 1.5 * (blurred - target).abs().mean() / 3
    assert reconstruction_loss(target[:, :1], target[:, :1]) == 0  # a single frame has no time


def test_the_share_of_unreadable_clips_can_be_set(distill, tiny_world, tmp_path):
    shutil.copytree(tiny_world, tmp_path / "data")
    records = read_index(tmp_path / "data" / "index.json", tmp_path / "data", needs_control=False)
    records[0].path.write_bytes(b"")
    options = f"--steps 2 --data_root {tmp_path / 'data'}"
    with pytest.raises(distill_decoder.UserError, match="more than max_unreadable_share 0.01 allows"):
        distill("light", options)
    assert distill("light", f"{options} --max_unreadable_share 0.4")["steps"] == 2


MISTAKES = [
    ("--widths 16 16", "--widths (16, 16): 3 numbers are needed for spatial_factor 8"),
    ("--widths 12 16 16", "argument --widths: 12 does not fit; use 8 or 16"),
    ("--num_heldout 4", "index.json has 4 clips; --num_heldout 4 leaves none to train on"),
    ("--cache_gib 1e-6", "cache_gib: 1e-06 is too little: a window of 33x32x64 takes"),
    ("--num_frames 32", "argument --num_frames: 32 does not fit; use 29 or 33"),
    ("--num_frames 9", "argument --num_frames: 9 is too small; use 17 or more"),
    ("--height 40", "argument --height: 40 does not fit; use 32 or 48"),
    ("--minutes -1", "argument --minutes: '-1' is not a number of 0 or more"),
    ("--device gpu", "--device gpu: "),
    ("--index_file /nowhere.json", "index_file: cannot read /nowhere.json"),
    ("--model_path /nowhere", "no model directory at /nowhere"),
    ("--num_frames 37", "found no clip for 37 frames at 16 fps"),
    ("--max_unreadable_share 2", "argument --max_unreadable_share: '2' is not a number from 0 to 1"),
    ("--steps many", "argument --steps: 'many' is not a whole number"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_bad_input(refused, tiny_world, tmp_path, words, message):
    place = ["--model_path", BASE, "--data_root", tiny_world, "--output_dir", tmp_path / "light", "--height", 32]
    line = refused(distill_decoder.main, *place, "--width", 64, "--num_heldout", 1, "--device", "cpu", *words.split())
    assert message in line
    assert not (tmp_path / "light" / "config.json").exists()


def test_an_output_that_cannot_be_written_is_refused(refused, tiny_world, tmp_path):
    (tmp_path / "file").write_text("")
    place = ["--model_path", BASE, "--data_root", tiny_world, "--num_heldout", 1, "--device", "cpu"]
    assert "is no directory" in refused(distill_decoder.main, *place, "--output_dir", tmp_path / "file" / "light")
