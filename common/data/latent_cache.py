"""Encoded clips on disk: the VAE's posterior moments of fixed windows, and the text encoder's features of
captions.

Layout of a cache directory: `fingerprint.json` says what made it (fingerprint.py); `shard-*.safetensors` hold
a few hundred MB of tensors each; `index.sqlite` says which shard holds what. A shard is renamed into place
before the index mentions it, so a killed writer loses at most one unfinished shard, and starting it again
goes on from there. Several processes may write at once. Nothing large is read at the start, whatever the
number of clips.

The moments are stored in the type in which they were computed, so a run on the cache equals one that encodes
as it goes.

Shapes: F latent frames · N raw frames · C latent channels · H W latent height/width · L text tokens · D text
width.
"""

import contextlib
import hashlib
import json
import os
import secrets
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.config.errors import UserError
from common.config.files import flush_to_disk, replace_text
from common.data.buckets import Bucket
from common.data.dataset import clip_identity
from common.data.fingerprint import VideoStamp, differences, is_current
from common.data.index import ClipRecord
from common.data.video import ClipError, ClipTooShort, UnreadableVideo

SHARD_BYTES = 256 << 20
RENEW = "python -m common.tools.precompute --config <the same config>"
MAX_OPEN_SHARDS = 64  # of a reading process
NO_VIDEO = (None, None, None)  # in the place of a VideoStamp

TABLES = """
CREATE TABLE IF NOT EXISTS windows (key TEXT PRIMARY KEY, shard TEXT, raw_frames BLOB, size INTEGER, mtime
INTEGER,
                                    digest TEXT, refusal TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS prompts (key TEXT PRIMARY KEY, shard TEXT) WITHOUT ROWID;
"""


class NotInCache(UserError):
    """The cache is of other settings or weights, or lacks something: training encodes that as it goes, if it may."""


def _hash(*parts: Any) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def window_key(record: ClipRecord, bucket: Bucket, window: int) -> str:
    """The name of a window in the cache: the clip, the shape, and which of the K windows."""
    return _hash(clip_identity(record), str(bucket), window)


def _connect(directory: Path, writable: bool) -> sqlite3.Connection:
    mode = "rwc" if writable else "ro"
    uri = f"{(directory / 'index.sqlite').resolve().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=120, isolation_level=None)


def check_fingerprint(directory: Path, fingerprint: dict[str, Any]) -> bool:
    """False when `directory` holds no cache yet; NotInCache when it was made by other settings or weights."""
    path = directory / "fingerprint.json"
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"latent_cache_dir: {path} is damaged; delete {directory} and run {RENEW}") from error
    if found != fingerprint:
        raise NotInCache(
            f"latent_cache_dir: {directory} does not fit these settings: {differences(fingerprint, found)}; "
            f"renew it with {RENEW} --renew, or give another directory"
        )
    return True


class LatentCacheWriter:
    """Adds to a cache, as a context manager. What is already there and still fits is found by `has_*`."""

    def __init__(self, directory: str | os.PathLike, fingerprint: dict[str, Any], shard_bytes: int = SHARD_BYTES):
        self.directory, self.shard_bytes = Path(directory), shard_bytes
        self.directory.mkdir(parents=True, exist_ok=True)
        self.index = _connect(self.directory, writable=True)
        try:
            self._claim(fingerprint)
        except BaseException:
            self.index.close()  # and its lock
            raise
        self._tensors: dict[str, Tensor] = {}
        self._rows: list[tuple[str, tuple]] = []
        self._bytes = 0

    def _claim(self, fingerprint: dict[str, Any]) -> None:
        """Only one of several writers that start together says what the cache is made by; the others must agree."""
        self.index.execute("BEGIN IMMEDIATE")
        if not check_fingerprint(self.directory, fingerprint):
            for table in ("windows", "prompts"):  # entries of which nobody knows any more what made them
                self.index.execute(f"DROP TABLE IF EXISTS {table}")
            replace_text(self.directory / "fingerprint.json", json.dumps(fingerprint, indent=2) + "\n")
        self.index.execute("COMMIT")
        self.index.executescript(TABLES)

    def __enter__(self) -> "LatentCacheWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self.flush()
        self.index.close()

    def has_window(self, record: ClipRecord, bucket: Bucket, window: int) -> bool:
        """True when the window is stored and its video has not changed. Refused clips are tried again."""
        query = "SELECT size, mtime, digest FROM windows WHERE key = ? AND refusal IS NULL"
        row = self.index.execute(query, (window_key(record, bucket, window),)).fetchone()
        return row is not None and is_current(record.path, *row)

    def has_prompt(self, caption: str) -> bool:
        """True when the caption's features are stored."""
        key = _hash(caption)
        return f"p{key}" in self._tensors or bool(
            self.index.execute("SELECT 1 FROM prompts WHERE key = ?", (key,)).fetchone()
        )

    def add_window(
        self,
        record: ClipRecord,
        bucket: Bucket,
        window: int,
        stamp: VideoStamp | None,
        moments: Tensor,
        raw_frames: Tensor,
    ) -> None:
        """Moments [F, 2C, H, W] in the type they were computed in; raw_frames int64 [N], the source frames
        shown; `stamp` of the video that they are of."""
        key = window_key(record, bucket, window)
        frames = raw_frames.numpy().astype("<i8").tobytes()
        row = (key, frames, *(stamp or NO_VIDEO), None)
        self._add(f"w{key}", moments, "INSERT OR REPLACE INTO windows VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def add_refusal(
        self, record: ClipRecord, bucket: Bucket, window: int, stamp: VideoStamp | None, error: ClipError
    ) -> None:
        """Notes that a clip cannot be used, so that training on the cache replaces it as training on videos
        would."""
        kind = "unreadable" if isinstance(error, UnreadableVideo) else "short"
        row = (window_key(record, bucket, window), None, None, *(stamp or NO_VIDEO), f"{kind}:{error}")
        self.index.execute("INSERT OR REPLACE INTO windows VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def add_prompt(self, caption: str, embeds: Tensor) -> None:
        """Features [L, D] of a caption."""
        key = _hash(caption)
        self._add(f"p{key}", embeds, "INSERT OR REPLACE INTO prompts VALUES (?, ?)", (key,))

    def _add(self, name: str, tensor: Tensor, statement: str, row: tuple) -> None:
        self._tensors[name] = tensor.detach().cpu().contiguous()
        self._rows.append((statement, row))
        self._bytes += tensor.numel() * tensor.element_size()
        if self._bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is held in memory as one shard and enter it in the index."""
        if not self._tensors:
            return
        shard = f"shard-{secrets.token_hex(8)}.safetensors"
        partial = self.directory / f"{shard}.tmp"
        save_file(self._tensors, partial)
        flush_to_disk(partial)  # before the index names it, which SQLite writes through
        partial.replace(self.directory / shard)
        self.index.execute("BEGIN IMMEDIATE")
        for statement, (key, *values) in self._rows:
            self.index.execute(statement, (key, shard, *values))
        self.index.execute("COMMIT")
        self._tensors, self._rows, self._bytes = {}, [], 0


class LatentCache:
    """Reads a cache made with the same fingerprint. Cheap to open; safe to hand to worker processes."""

    def __init__(self, directory: str | os.PathLike, fingerprint: dict[str, Any]):
        self.directory = Path(directory)
        if not check_fingerprint(self.directory, fingerprint) or not (self.directory / "index.sqlite").is_file():
            raise UserError(f"latent_cache_dir: {self.directory} holds no cache; make it with {RENEW}")
        self._connection: tuple[int, sqlite3.Connection] | None = None
        self._shards: dict[str, Any] = {}  # open files: opening one reads the names of all tensors in it

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_connection": None, "_shards": {}}

    def _row(self, query: str, key: str) -> tuple | None:
        if self._connection is None or self._connection[0] != os.getpid():  # SQLite must not cross a fork
            self._connection = (os.getpid(), _connect(self.directory, writable=False))
        return self._connection[1].execute(query, (key,)).fetchone()

    def _tensor(self, shard: str, name: str) -> Tensor:
        try:
            if shard not in self._shards:
                if len(self._shards) >= MAX_OPEN_SHARDS:
                    self._shards.pop(next(iter(self._shards)))  # the one opened first
                self._shards[shard] = safe_open(self.directory / shard, framework="pt")
            return self._shards[shard].get_tensor(name)
        except (OSError, SafetensorError) as error:
            path = self.directory / shard
            raise UserError(f"latent_cache_dir: {path} is missing or damaged; run {RENEW} --renew") from error

    def window(self, record: ClipRecord, bucket: Bucket, window: int) -> tuple[Tensor, np.ndarray]:
        """Moments [F, 2C, H, W] as stored, and the source frames int64 [N].

        Raises the ClipError that the clip met when the cache was made; NotInCache when it is absent or has changed.
        """
        key = window_key(record, bucket, window)
        row = self._row("SELECT shard, raw_frames, size, mtime, digest, refusal FROM windows WHERE key = ?", key)
        where = f"index entry {record.entry} ({record.name})"
        if row is None:
            raise NotInCache(f"latent_cache_dir: {self.directory} lacks {where} at {bucket}; run {RENEW}")
        shard, frames, size, mtime, digest, refusal = row
        if not is_current(record.path, size, mtime, digest):
            raise NotInCache(f"latent_cache_dir: the video of {where} has changed since it was encoded; run {RENEW}")
        if refusal is not None:
            kind, _, message = refusal.partition(":")
            raise (UnreadableVideo if kind == "unreadable" else ClipTooShort)(message)
        return self._tensor(shard, f"w{key}"), np.frombuffer(frames, dtype="<i8").astype(np.int64)

    def prompt(self, caption: str) -> Tensor:
        """Features [L, D] of a caption. Raises NotInCache."""
        row = self._row("SELECT shard FROM prompts WHERE key = ?", _hash(caption))
        if row is None:
            shown = repr(caption[:60])
            raise NotInCache(f"latent_cache_dir: {self.directory} lacks the caption {shown}; run {RENEW}")
        return self._tensor(row[0], f"p{_hash(caption)}")


def clear_cache(directory: str | os.PathLike) -> None:
    """Delete a cache's own files, and nothing else that may lie in the directory."""
    directory = Path(directory)
    for pattern in ("index.sqlite*", "shard-*.safetensors*", "fingerprint*"):
        for path in directory.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
