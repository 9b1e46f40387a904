"""A run on the cache equals one that encodes as it goes; what has changed is named."""

import json
import os
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from barcode import write_video
from diffusers import AutoencoderKLCogVideoX
from transformers import AutoTokenizer, T5EncoderModel

from common.config.errors import UserError
from common.config.settings import TrainingSettings
from common.data.buckets import Bucket
from common.data.fingerprint import cache_fingerprint, file_digest
from common.data.index import read_index
from common.data.latent_cache import LatentCache, LatentCacheWriter
from common.data.loader import build_train_loader, build_validation_batch
from common.tools.precompute import main, precompute
from common.training.encoding import encode_moments, encode_prompts


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("cached")
    entries = []
    for clip in range(5):
        name = f"clip_{clip}.mp4"
        write_video(root / name, 6 if clip == 1 else 30 + 5 * clip, "30000/1001" if clip % 2 else 16)
        labels = ",".join(("D", "DL", "N")[(clip + frame // 4) % 3] for frame in range(20))
        entries.append({"path": name, "caption": f"A red car, {clip}.", "control_signal_seq": labels})
    entries[3]["caption"] = entries[0]["caption"]
    (root / "index.json").write_text(json.dumps({"list": entries}))
    return root


def settings(data, base, cache="", **changes) -> TrainingSettings:
    values = {
        "pretrained_model_name_or_path": str(base), "data_root": str(data), "index_file": str(data / "index.json"),
        "num_validation_clips": 1, "height_buckets": [32], "width_buckets": [32, 48], "frame_buckets": [9],
        "windows_per_clip": 2, "latent_cache_dir": str(cache), "max_sequence_length": 16, "mixed_precision": "no",
        "dataloader_num_workers": 0, "train_batch_size": 2,
    }  # fmt: skip
    args = TrainingSettings(**(values | changes))
    args.validate()
    return args


@pytest.fixture(scope="module")
def cache(data, tiny_base, tmp_path_factory):
    """A finished float32 cache, read only."""
    directory = tmp_path_factory.mktemp("cache")
    # 3 clips that are long enough and 1 that is not, in 2 buckets and 2 windows; 1 held out; "" and 4 captions.
    assert precompute(settings(data, tiny_base, directory)) == {"windows": 17, "captions": 5}
    return directory


@pytest.fixture
def own_cache(cache, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(cache, tmp_path / "cache"))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_cached_and_on_the_fly_are_interchangeable(data, tiny_base, tmp_path, precision, monkeypatch):
    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[precision]
    vae = AutoencoderKLCogVideoX.from_pretrained(tiny_base, subfolder="vae", torch_dtype=dtype).eval()
    text_encoder = T5EncoderModel.from_pretrained(tiny_base, subfolder="text_encoder", dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(Path(tiny_base) / "tokenizer")
    cached_args = settings(data, tiny_base, tmp_path / "cache", mixed_precision=precision)
    plain_args = settings(data, tiny_base, mixed_precision=precision)
    # On a CPU the trainer computes in float32; what a GPU would hold is asked for here.
    monkeypatch.setattr("common.tools.precompute.weight_dtype", lambda settings, device: dtype)
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


def test_a_second_run_has_only_the_refused_clip_to_try_again(cache, data, tiny_base):
    assert precompute(settings(data, tiny_base, cache)) == {"windows": 4, "captions": 0}


def test_few_files_for_many_clips(cache):
    names = sorted(path.suffix for path in cache.iterdir())
    assert names.count(".safetensors") <= 2 and len(names) <= 4


def test_a_killed_writer_goes_on_where_it_was(data, tmp_path):
    records = read_index(data / "index.json", data, False)
    bucket = Bucket(9, 32, 48)
    fingerprint = {"format": 1}
    writer = LatentCacheWriter(tmp_path, fingerprint, shard_bytes=2 * 3 * 4 * 4)
    moments = [torch.full((3, 4), float(n)) for n in range(3)]
    for n in range(3):  # two fill a shard; the third is lost with the process
        writer.add_window(records[n], bucket, 0, moments[n], torch.arange(9))
    (tmp_path / "shard-dead.safetensors.tmp").write_bytes(b"half")
    del writer
    with LatentCacheWriter(tmp_path, fingerprint) as writer:
        assert [writer.has_window(records[n], bucket, 0) for n in range(3)] == [True, True, False]
        writer.add_window(records[2], bucket, 0, moments[2], torch.arange(9))
    cache = LatentCache(tmp_path, fingerprint)
    for n in range(3):
        stored, frames = cache.window(records[n], bucket, 0)
        assert torch.equal(stored, moments[n]) and frames.tolist() == list(range(9))


def refusal(args) -> str:
    with pytest.raises(UserError) as error:
        list(islice(build_train_loader(args, False), 12))
    message = str(error.value)
    assert message.startswith("latent_cache_dir: ") and "\n" not in message
    assert "python -m common.tools.precompute --config" in message
    return message


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


def test_large_files_are_known_by_samples(tmp_path):
    path = tmp_path / "weights"
    content = bytearray(os.urandom(200_000))
    digests = set()
    for position in (None, 0, 100_000, 199_999):
        changed = bytearray(content)
        if position is not None:
            changed[position] ^= 1
        path.write_bytes(changed)
        digests.add((file_digest(path), file_digest(path, whole_up_to=6400)))
    assert len({whole for whole, _ in digests}) == 4
    assert len({sampled for _, sampled in digests}) >= 3  # both ends are always among the samples


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
    assert "5 windows and 5 captions added" in capsys.readouterr().out
