"""Results on disk, one small JSON file each, written when a measurement is finished.

A part is what one row of the report (a model, or true video) gave in one measure at one sampling seed: numbers of
single videos, from which the report computes means and intervals. So an interrupted evaluation goes on where it was,
and the parts of several machines, copied into one folder, make one report.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.config.errors import UserError
from common.config.files import replace_text

MEASURES = ("control", "frechet", "text", "latency", "drift")


@dataclass(frozen=True)
class PartKey:
    """What a part is of; also its file's name. `variant` tells apart what one measure does in several ways ("clips",
    "streams", "w2", "straight")."""

    row: str
    measure: str
    variant: str
    seed: int

    @property
    def file_name(self) -> str:
        return f"{self.row}.{self.measure}.{self.variant}.seed{self.seed}.json"


@dataclass(frozen=True)
class Part:
    """key: what it is of. kind: "model", "vae", "true" or "reference". settings: all that decides the numbers.
    about: what else is of interest (the machine, the time it took). values: the numbers."""

    key: PartKey
    kind: str
    settings: dict[str, Any]
    about: dict[str, Any]
    values: dict[str, Any]


class PartStore:
    """The parts in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def load(self, key: PartKey, settings: dict[str, Any]) -> Part | None:
        """The part of this key, None when there is none yet.

        Raises:
            UserError: when it was made with other settings.
        """
        path = self.folder / key.file_name
        if not path.exists():
            return None
        part = read_part(path)
        wanted = json.loads(json.dumps(settings))
        for name in sorted({*wanted, *part.settings}):
            there, here = part.settings.get(name), wanted.get(name)
            if there != here:
                raise UserError(
                    f"{path} was made with {name} {there}, now it is {here}: take another --name or --output_dir, or "
                    "delete the file"
                )
        return part

    def save(self, part: Part) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(without_nan(asdict(part)), allow_nan=False) + "\n"
        replace_text(self.folder / part.key.file_name, text)

    def all(self) -> list[Part]:
        """Every part, in the order of their names."""
        return [read_part(path) for path in sorted(self.folder.glob("[!.]*.json"))]


def read_part(path: Path) -> Part:
    """Raises UserError for a file that is no part."""
    try:
        read = json.loads(path.read_text())
        return Part(PartKey(**read.pop("key")), **read)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a part of an evaluation ({error}); delete it") from error


def without_nan(value: Any) -> Any:
    """Numbers that are not finite become None, all through lists and dictionaries: JSON has no others."""
    if isinstance(value, dict):
        return {name: without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
