"""Files that are always whole under their name: written beside it, then renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A name beside `path`, of the same suffix, to write to; renamed to `path` when the block ends without an error.

    A process killed at any moment leaves the old file as it was.
    """
    path = Path(path)
    beside = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def replace_text(path: str | os.PathLike, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def flush_to_disk(path: Path) -> None:
    """Waits until a file's content, or a directory's list of names, would survive the machine's going down."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
