"""A run on the cache equals one that encodes as it goes, whatever part of it the cache holds."""

import json
import logging
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from barcode import write_video
from cached_run import refusal, settings
from diffusers import AutoencoderKLCogVideoX
from transformers import AutoTokenizer, T5EncoderModel

from common.config.errors import UserError
from common.data import dataset
from common.data.buckets import Bucket
from common.data.index import ClipRecord
from common.data.latent_cache import LatentCache, LatentCacheWriter
from common.data.loader import build_train_loader, build_validation_batch
from common.tools.precompute import main, precompute
from common.training.encoding import LatentEncoder, encode_moments, encode_prompts
from common.training.random import SampleRandom


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_cached_and_on_the_fly_are_interchangeable(data, tiny_base, tmp_path, precision, monkeypatch):
    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[precision]
    vae = AutoencoderKLCogVideoX.from_pretrained(tiny_base, subfolder="vae", torch_dtype=dtype).eval()
    text_encoder = T5EncoderModel.from_pretrained(tiny_base, subfolder="text_encoder", dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(Path(tiny_base) / "tokenizer")
    cached_args = settings(data, tiny_base, tmp_path / "cache", mixed_precision=precision)
    plain_args = settings(data, tiny_base, mixed_precision=precision)
    # On a CPU the trainer computes in float32; what a GPU would hold is asked for here.
    monkeypatch.setattr("common.tools.precompute.compute_dtype", lambda settings, device: dtype)
    precompute(cached_args)
    cached = list(islice(build_train_loader(cached_args, True), 8))
    plain = list(islice(build_train_loader(plain_args, True), 8))
    cached.append(build_validation_batch(cached_args, True))
    plain.append(build_validation_batch(plain_args, True))
    assert len({sample for batch in cached for sample in batch["sample_ids"]}) >= 6
    for ours, theirs in zip(cached, plain, strict=True):
        for name in ("captions", "sample_ids"):
            assert ours[name] == theirs[name]
        for name in ("slots", "control_indices"):
            assert torch.equal(ours[name], theirs[name])
        assert ours["latent_moments"].dtype == dtype
        assert torch.equal(ours["latent_moments"].float(), encode_moments(vae, theirs["pixel_values"]))
        assert torch.equal(ours["prompt_embeds"], encode_prompts(tokenizer, text_encoder, theirs["captions"], 16))


@pytest.fixture(scope="module")
def encode(tiny_base):
    """A batch of either form as the trainer sees it."""
    vae = AutoencoderKLCogVideoX.from_pretrained(tiny_base, subfolder="vae").eval()
    text_encoder = T5EncoderModel.from_pretrained(tiny_base, subfolder="text_encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(Path(tiny_base) / "tokenizer")
    encoder = LatentEncoder(
        vae, tokenizer, text_encoder, max_sequence_length=16, caption_dropout=0.2, device="cpu", dtype=torch.float32
    )
    return lambda batch: encoder.encode(batch, SampleRandom(0, 0, batch["slots"]))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_the_cache_lacks_is_encoded_as_the_run_goes(own_cache, data, tiny_base, tmp_path, encode, caplog, workers):
    """A video made anew, a caption written anew, a clip added: no step is trained on anything but what is there now."""
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    write_video(moved / "clip_0.mp4", 50, 16)
    write_video(moved / "clip_9.mp4", 40, 16)
    index = json.loads((moved / "index.json").read_text())
    index["list"][2]["caption"] = "New words."
    index["list"].insert(3, {**index["list"][2], "path": "clip_9.mp4"})
    (moved / "index.json").write_text(json.dumps(index))
    cached_args = settings(moved, tiny_base, own_cache, dataloader_num_workers=workers, train_batch_size=1)
    plain_args = settings(moved, tiny_base, train_batch_size=1)
    with caplog.at_level(logging.WARNING):
        cached = list(islice(build_train_loader(cached_args, True), 12))
    if not workers:  # else the workers have said it
        assert caplog.text.count("what the cache lacks is encoded while training") == 1
    plain = list(islice(build_train_loader(plain_args, True), 12))
    forms = [name for batch in cached for name in ("latent_moments", "pixel_values") if name in batch]
    assert set(forms) == {"latent_moments", "pixel_values"} and len(forms) == len(cached)
    for ours, theirs in zip(cached, plain, strict=True):
        assert ours["sample_ids"] == theirs["sample_ids"]
        one, other = encode(ours), encode(theirs)
        for name in ("latents", "prompt_embeds", "control_indices"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_a_batch_has_one_form(own_cache, data, tiny_base, tmp_path):
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    write_video(moved / "clip_0.mp4", 50, 16)
    args = settings(moved, tiny_base, own_cache, train_batch_size=4)
    batch = next(iter(build_train_loader(args, False)))  # all of the four clips, one of which has changed
    assert batch["pixel_values"].shape[0] == 4 and "latent_moments" not in batch and "prompt_embeds" not in batch
    held_out = build_validation_batch(args, False)
    assert "latent_moments" in held_out  # which is another batch


def test_held_out_clips_that_the_cache_lacks_are_encoded_too(cache, data, tiny_base, encode):
    ours = build_validation_batch(settings(data, tiny_base, cache, frame_buckets=[5]), False)
    theirs = build_validation_batch(settings(data, tiny_base, frame_buckets=[5]), False)
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"]) and ours["sample_ids"] == theirs["sample_ids"]


def test_a_cache_of_other_settings_is_named_and_left_aside(cache, data, tiny_base, caplog):
    args = settings(data, tiny_base, cache, fps=8, frame_buckets=[5])
    with caplog.at_level(logging.WARNING):
        ours = [*islice(build_train_loader(args, False), 4), build_validation_batch(args, False)]
    assert caplog.text.count("videos are encoded while training, which is slow: latent_cache_dir: ") == 1
    assert "fps is 8 (cache: 16)" in caplog.text and "precompute" in caplog.text
    args = settings(data, tiny_base, fps=8, frame_buckets=[5])
    theirs = [*islice(build_train_loader(args, False), 4), build_validation_batch(args, False)]
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(ours, theirs, strict=True))
    assert "fps is 8" in refusal(settings(data, tiny_base, cache, fps=8))  # a recorded step can do nothing else


def test_the_moments_are_those_of_diffusers(cache, data, tiny_base):
    vae = AutoencoderKLCogVideoX.from_pretrained(tiny_base, subfolder="vae").eval()
    args = settings(data, tiny_base, cache)
    batch = build_validation_batch(args, False)
    pixels = build_validation_batch(settings(data, tiny_base), False)["pixel_values"]
    with torch.no_grad():
        posterior = vae.encode(pixels[0].float().div(127.5).sub(1).movedim(0, 1)[None]).latent_dist
    mean, logvar = batch["latent_moments"][0].chunk(2, dim=1)
    assert batch["latent_moments"].shape == (1, 3, 32, 4, 4)
    torch.testing.assert_close(mean.movedim(0, 1)[None], posterior.mean)
    torch.testing.assert_close(logvar.movedim(0, 1)[None].clamp(-30, 20), posterior.logvar)


def test_workers_read_the_cache_too(cache, data, tiny_base):
    alone, helped = (
        list(islice(build_train_loader(settings(data, tiny_base, cache, dataloader_num_workers=n), True), 4))
        for n in (0, 2)
    )
    for a, b in zip(alone, helped, strict=True):
        assert a["sample_ids"] == b["sample_ids"] and torch.equal(a["latent_moments"], b["latent_moments"])


def test_a_second_run_accepts_what_the_first_accepted(data, tiny_base, tmp_path, monkeypatch, caplog):
    """It tries only the refused clips again; the share of unreadable ones is that of all clips all the same."""
    monkeypatch.setattr(dataset, "SHARE_COUNTED_FROM", 1)
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    (moved / "clip_3.mp4").write_bytes(b"")
    args = settings(moved, tiny_base, tmp_path / "cache", max_unreadable_share=0.25)
    assert precompute(args) == {"windows": 9, "captions": 5, "refused": 2}
    assert "skipping index entry 4: " in caplog.text and "takes its place" not in caplog.text
    assert precompute(args) == {"windows": 0, "captions": 0, "refused": 2}


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux")
def test_ten_thousand_clips_make_few_files_and_a_worker_reads_little_of_the_index(tmp_path):
    records = [ClipRecord(tmp_path, f"{number}.mp4", "", None, 0, number) for number in range(10_000)]
    bucket, frames = Bucket(33, 64, 96), torch.arange(33)
    with LatentCacheWriter(tmp_path, {}, shard_bytes=4000) as writer:
        for record in records:
            writer.add_window(record, bucket, 0, None, torch.tensor([float(record.entry)]), frames)
    assert len(list(tmp_path.iterdir())) == 12  # ten shards of 1000 windows, index and fingerprint
    assert (tmp_path / "index.sqlite").stat().st_size > 3e6
    cache = LatentCache(tmp_path, {})
    before = bytes_read()
    for number in (7, 9999, 4321):
        stored, shown = cache.window(records[number], bucket, 0)
        assert stored.item() == number and shown.tolist() == frames.tolist()
    assert bytes_read() - before < 100_000


def test_the_command_line(data, tiny_base, tmp_path, monkeypatch, capsys):
    config = tmp_path / "some_config.py"
    config.write_text("from common.config.settings import TrainingSettings\nargs = TrainingSettings()\n")
    given = settings(data, tiny_base).to_dict()
    words = ["precompute", "--config", str(config)]
    for name in ("pretrained_model_name_or_path", "data_root", "index_file"):
        words += [f"--{name}", given[name]]
    words += ["--height_buckets", "32", "--width_buckets", "48", "--frame_buckets", "9", "--num_validation_clips", "1"]
    words += ["--max_sequence_length", "16", "--dataloader_num_workers", "0"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(UserError, match="latent_cache_dir: must be set"):
        main()
    words += ["--latent_cache_dir", str(tmp_path / "cache"), "--windows_per_clip", "1"]
    monkeypatch.setattr("sys.argv", [*words, "--dry_run"])
    main()
    assert "5 windows and 5 captions belong" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr("sys.argv", words)
    main()
    assert "4 windows and 5 captions added, 1 clip refused; all others" in capsys.readouterr().out
