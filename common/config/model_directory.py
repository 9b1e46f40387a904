"""Where a model lies on disk, be it named by a directory or by a hub id."""

import re
from pathlib import Path

from common.config.errors import UserError


def resolve_pipeline_directory(path: str | Path) -> Path:
    """A local directory as it is; a hub id ("org/name") as its downloaded snapshot. Raises UserError."""
    directory = Path(path)
    if directory.is_dir():
        return directory
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or str(path).startswith("."):
        raise UserError(f"no model directory at {path}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path)))
    except Exception as error:  # offline, unknown, gated: hub libraries raise a dozen types
        raise UserError(f"{path} is no directory here and could not be had from the hub: {error}") from error
