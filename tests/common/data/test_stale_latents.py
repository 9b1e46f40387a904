"""What a cache is made of is known by content: what has changed is named, and nothing stale is ever read."""

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest
import torch
from barcode import write_video
from cached_run import refusal, settings

from common.config.errors import UserError
from common.data.buckets import Bucket
from common.data.fingerprint import VideoStamp, cache_fingerprint, file_digest, is_current
from common.data.index import read_index
from common.data.latent_cache import LatentCache, LatentCacheWriter
from common.data.loader import build_train_loader
from common.tools.precompute import precompute
from common.training.encoding import encode_moments


def test_other_settings_are_named(cache, data, tiny_base):
    assert "fps is 8 (cache: 16)" in refusal(settings(data, tiny_base, cache, fps=8))
    message = refusal(settings(data, tiny_base, cache, windows_per_clip=3, mixed_precision="bf16"))
    assert "windows_per_clip is 3 (cache: 2), mixed_precision is bf16 (cache: no)" in message
    with pytest.raises(UserError, match="fps is 8 .cache: 16.*--renew"):
        precompute(settings(data, tiny_base, cache, fps=8))


def test_other_buckets_are_lacking(cache, data, tiny_base):
    assert "lacks index entry" in refusal(settings(data, tiny_base, cache, frame_buckets=[5]))
    assert "at 5x32x32" in refusal(settings(data, tiny_base, cache, frame_buckets=[5], width_buckets=[32]))


def test_no_cache(data, tiny_base, tmp_path):
    assert "holds no cache" in refusal(settings(data, tiny_base, tmp_path / "none"))


def test_other_weights_are_named_but_another_place_is_not(cache, data, tiny_base, tmp_path):
    base = Path(shutil.copytree(tiny_base, tmp_path / "stage1_fused"))
    list(islice(build_train_loader(settings(data, base, cache), False), 1))
    weights = base / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # the last bit of the last weight
    weights.write_bytes(content)
    assert "the vae is another" in refusal(settings(data, base, cache))
    shutil.rmtree(base / "text_encoder")
    with pytest.raises(UserError, match="holds no text_encoder/"):
        cache_fingerprint(settings(data, base, cache))


def test_changed_videos_and_captions_are_named_copies_are_not(own_cache, data, tiny_base, tmp_path):
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    args = settings(moved, tiny_base, own_cache)
    for path in moved.glob("*.mp4"):
        os.utime(path, (1, 1))
    list(islice(build_train_loader(args, True), 8))  # a copy, with other times: the same content
    (moved / "clip_0.mp4").unlink()
    list(islice(build_train_loader(args, True), 8))  # the cache is enough
    write_video(moved / "clip_0.mp4", 50, 16)
    assert "the video of index entry 1 (clip_0.mp4) has changed" in refusal(args)
    precompute(args)
    list(islice(build_train_loader(args, True), 8))
    index = json.loads((moved / "index.json").read_text())
    index["list"][2]["caption"] = "New words."
    (moved / "index.json").write_text(json.dumps(index))
    assert "lacks the caption 'New words.'" in refusal(args)
    assert precompute(args)["captions"] == 1
    list(islice(build_train_loader(args, True), 8))


def test_renew_replaces_a_stale_cache_and_nothing_else(own_cache, data, tiny_base):
    (own_cache / "notes.txt").touch()
    args = settings(data, tiny_base, own_cache, fps=8, frame_buckets=[5], width_buckets=[32])
    precompute(args, renew=True)
    assert list(islice(build_train_loader(args, False), 2)) and (own_cache / "notes.txt").exists()


def test_damaged_cache_files_are_named(own_cache, data, tiny_base):
    args = settings(data, tiny_base, own_cache)
    for shard in own_cache.glob("shard-*"):
        shard.write_bytes(shard.read_bytes()[:50])
    assert "is missing or damaged" in refusal(args)
    (own_cache / "fingerprint.json").write_text("{")
    assert "fingerprint.json is damaged" in refusal(args)


def test_large_files_are_known_by_samples_of_every_matrix(tmp_path, monkeypatch):
    monkeypatch.setattr("common.data.fingerprint.BLOCK_BYTES", 64)
    path, size = tmp_path / "weights", 1 << 20
    content = bytearray(os.urandom(size))

    def digest(start: int, length: int, **options) -> str:
        path.write_bytes(content[:start] + bytes(length) + content[start + length :])
        return file_digest(path, **options)

    whole = {digest(0, 0), digest(0, 1), digest(size // 2 + 100, 1), digest(size - 1, 1)}
    changed = [(0, 0), (0, 64), (size - 64, 64), *((place, size // 500) for place in range(0, size, size // 7))]
    sampled = [digest(*one, whole_up_to=6400) for one in changed]
    assert len(whole) == 4 and len(set(sampled)) == len(sampled)
    assert digest(70, 1, whole_up_to=6400) == sampled[0]  # between two samples


def test_a_video_of_the_same_size_is_known_by_its_content(own_cache, data, tiny_base, tmp_path):
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    args = settings(moved, tiny_base, own_cache)
    path = moved / "clip_0.mp4"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "the video of index entry 1 (clip_0.mp4) has changed" in refusal(args)


def test_any_byte_of_a_long_video_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("common.data.fingerprint.BLOCK_BYTES", 64)  # samples would miss most of it
    path = tmp_path / "long.mp4"
    content = bytearray(os.urandom(9 << 20))
    path.write_bytes(content)
    stamp = VideoStamp.of(path)
    os.utime(path, (1, 1))
    assert is_current(path, *stamp)
    content[7_000_003] ^= 1
    path.write_bytes(content)
    assert not is_current(path, *stamp)


def test_a_refused_clip_that_was_mended_is_stale_too(own_cache, data, tiny_base, tmp_path):
    """Or it would be left out for ever."""
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    args = settings(moved, tiny_base, own_cache)
    write_video(moved / "clip_1.mp4", 30, 16)  # was too short
    assert "the video of index entry 2 (clip_1.mp4) has changed" in refusal(args)
    precompute(args)
    assert "clip_1.mp4@" in str([batch["sample_ids"] for batch in islice(build_train_loader(args, False), 12)])


def test_what_changes_while_it_is_encoded_is_noticed(data, tiny_base, tmp_path, monkeypatch):
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    args = settings(moved, tiny_base, tmp_path / "cache")

    def encode_late(vae, pixels):
        write_video(moved / "clip_0.mp4", 50, 16)
        return encode_moments(vae, pixels)

    monkeypatch.setattr("common.tools.precompute.encode_moments", encode_late)
    precompute(args)
    assert "the video of index entry 1 (clip_0.mp4) has changed" in refusal(args)


def test_writers_that_start_together_agree_on_what_makes_the_cache(tmp_path):
    """Neither's entries pass for the other's. Each thread stands for a process."""
    for number in range(20):
        directory, start = tmp_path / str(number), threading.Barrier(2)

        def write(fps, directory=directory, start=start):
            start.wait()
            try:
                with LatentCacheWriter(directory, {"fps": fps}) as writer:
                    writer.add_prompt(f"{fps}", torch.full((1, 1), float(fps)))
            except UserError as error:
                return str(error)
            return fps

        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(write, (8, 16))
        winner, told = (first, second) if isinstance(second, str) else (second, first)
        assert "does not fit these settings" in told
        assert float(LatentCache(directory, {"fps": winner}).prompt(str(winner))) == winner


def test_entries_without_a_fingerprint_are_not_taken_up(tmp_path):
    """As a `--renew` that was killed leaves them."""
    with LatentCacheWriter(tmp_path, {"fps": 8}) as writer:
        writer.add_prompt("x", torch.zeros(1))
    (tmp_path / "fingerprint.json").unlink()
    with LatentCacheWriter(tmp_path, {"fps": 16}) as writer:
        assert not writer.has_prompt("x")


def test_what_was_encoded_outlives_its_video(own_cache, data, tiny_base, tmp_path):
    """Also when the cache is brought up to date for other clips."""
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    args = settings(moved, tiny_base, own_cache, max_unreadable_share=1.0)
    (moved / "clip_0.mp4").unlink()
    assert precompute(args) == {"windows": 0, "captions": 0, "refused": 1}
    batches = list(islice(build_train_loader(args, True), 8))
    assert "clip_0.mp4@" in str([batch["sample_ids"] for batch in batches])


def test_a_killed_writer_goes_on_where_it_was(data, tmp_path):
    records = read_index(data / "index.json", data, False)
    bucket = Bucket(9, 32, 48)
    fingerprint = {"format": 1}
    writer = LatentCacheWriter(tmp_path, fingerprint, shard_bytes=2 * 3 * 4 * 4)
    moments = [torch.full((3, 4), float(n)) for n in range(3)]
    for n in range(3):  # two fill a shard; the third is lost with the process
        writer.add_window(records[n], bucket, 0, VideoStamp.of(records[n].path), moments[n], torch.arange(9))
    (tmp_path / "shard-dead.safetensors.tmp").write_bytes(b"half")
    del writer
    with LatentCacheWriter(tmp_path, fingerprint) as writer:
        assert [writer.has_window(records[n], bucket, 0) for n in range(3)] == [True, True, False]
        writer.add_window(records[2], bucket, 0, VideoStamp.of(records[2].path), moments[2], torch.arange(9))
    cache = LatentCache(tmp_path, fingerprint)
    for n in range(3):
        stored, frames = cache.window(records[n], bucket, 0)
        assert torch.equal(stored, moments[n]) and frames.tolist() == list(range(9))
