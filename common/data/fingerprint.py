"""What a latent cache depends on, as a small dictionary that can be compared and shown to the user.

Weights are known by their content, not by their path: every stage's directory holds the same VAE and text
encoder, so all of them share a cache.
"""

import functools
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from common.config.errors import SettingError
from common.config.model_directory import resolve_pipeline_directory
from common.config.settings import TrainingSettings

CACHE_FORMAT = 2  # since files are hashed whole up to 1 GiB
WHOLE_UP_TO = 1 << 30  # bytes; larger files are known by samples, since hashing a text encoder of 10 GB takes a minute
NUM_BLOCKS, BLOCK_BYTES = 1024, 64 << 10  # a sample in every 5 MB of a T5 shard, whose matrices have 33
COMPONENTS = ("vae", "text_encoder", "tokenizer")
WEIGHT_SUFFIXES = (".json", ".safetensors", ".bin", ".model")


def file_digest(path: str | os.PathLike, whole_up_to: int = WHOLE_UP_TO) -> str:
    """A hash of the file's content: of all of it, or of its size and blocks spread over it when it is larger."""
    path = Path(path)
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        if size <= whole_up_to:
            while block := file.read(1 << 20):
                digest.update(block)
        else:
            for number in range(NUM_BLOCKS):
                file.seek(max(size - BLOCK_BYTES, 0) * number // (NUM_BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


class VideoStamp(NamedTuple):
    """What tells whether a video is still the one that was encoded."""

    size: int
    mtime: int
    digest: str

    @classmethod
    def of(cls, path: Path) -> "VideoStamp | None":
        """The stamp of a file, None without one. To be taken before the file is decoded: what changes it meanwhile is
        then noticed."""
        try:
            stat = path.stat()
            return cls(stat.st_size, stat.st_mtime_ns, _content_digest(path, stat.st_size, stat.st_mtime_ns))
        except OSError:
            return None


@functools.lru_cache(maxsize=1 << 17)
def _content_digest(path: Path, size: int, mtime: int) -> str:
    """Of all of the file; remembered while it looks the same, since it comes up with every window and epoch."""
    return file_digest(path, whole_up_to=sys.maxsize)


def is_current(path: Path, size: int | None, mtime: int | None, digest: str | None) -> bool:
    """True when the video is the one with this stamp (None: there was none), or when there is none any more: then what
    was encoded is all there is."""
    try:
        stat = path.stat()
    except OSError:
        return True
    if stat.st_size != size:
        return False
    # A copied file has a new time and the same content.
    return stat.st_mtime_ns == mtime or _content_digest(path, stat.st_size, stat.st_mtime_ns) == digest


def component_digest(directory: Path) -> str:
    """A hash of a component's files: names and contents, but not what a library notes about itself in
    config.json, or in scheduler_config.json."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(p for p in directory.iterdir() if p.suffix in WEIGHT_SUFFIXES):
        digest.update(path.name.encode())
        if path.name in ("config.json", "scheduler_config.json"):
            config = json.loads(path.read_text(encoding="utf-8"))
            config = {name: value for name, value in config.items() if not name.startswith("_")}
            config.pop("transformers_version", None)
            digest.update(json.dumps(config, sort_keys=True).encode())
        else:
            digest.update(file_digest(path).encode())
    return digest.hexdigest()


def pipeline_digests(directory: Path, index: dict[str, Any]) -> dict[str, str]:
    """What a pipeline is made of: a digest of each component, beside the class that the index names for it.

    The transformer's, called "weights", and the VAE's are digests alone: they are shown in reports.
    """
    digests = {name: component_digest(directory / name) for name in index if (directory / name).is_dir()}
    shown = {"weights": digests.pop("transformer"), "vae": digests.pop("vae")}
    return shown | {name: f"{index[name][1]} {digest}" for name, digest in digests.items()}


def cache_fingerprint(settings: TrainingSettings) -> dict[str, Any]:
    """Everything that a cache's numbers depend on besides the videos and captions themselves.

    Buckets are not in it: a cache may hold more of them than a run uses.
    """
    directory = resolve_pipeline_directory(settings.pretrained_model_name_or_path)
    fingerprint: dict[str, Any] = {"format": CACHE_FORMAT}
    for name in COMPONENTS:
        if not (directory / name).is_dir():
            raise SettingError("pretrained_model_name_or_path", f"{directory} holds no {name}/")
        fingerprint[name] = component_digest(directory / name)
    for name in ("fps", "windows_per_clip", "max_sequence_length", "mixed_precision"):
        fingerprint[name] = getattr(settings, name)
    return fingerprint


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """What differs, in words: "fps is 8 (cache: 16), the vae is another"."""
    parts = []
    for name in [*ours, *(key for key in theirs if key not in ours)]:
        if ours.get(name) != theirs.get(name):
            if name in COMPONENTS:
                parts.append(f"the {name} is another")
            else:
                parts.append(f"{name} is {ours.get(name)} (cache: {theirs.get(name)})")
    return ", ".join(parts)
