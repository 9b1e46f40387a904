"""Index files: which clips there are, with caption and control labels. The forms are described in
data/README.md.

Entries are counted from 1 in every message, as an editor counts lines.
"""

import csv
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config.errors import UserError
from common.data.control_signals import CONTROL_TOKENS, parse_control_string, token_indices

NAMES_IN_DIRECTORY = ("index.json", "metadata.jsonl", "metadata.csv", "prompts.txt")
NUM_PROBED = 16


@dataclass(frozen=True, slots=True)
class ClipRecord:
    """One clip of the index. Labels are kept as bytes: a list of tokens for each of a million clips fills the
    memory."""

    root: Path  # data_root
    name: str  # the path as the index states it, relative to root
    caption: str
    control_codes: bytes | None  # place in CONTROL_TOKENS of each raw frame's token, from raw frame 0
    valid_frame_idx: int  # first usable raw frame
    entry: int  # number of the entry in its index, from 1

    @property
    def path(self) -> Path:
        """The video file."""
        return self.root / self.name

    @property
    def control(self) -> list[str] | None:
        """One token per raw frame of the source video, or None."""
        return None if self.control_codes is None else [CONTROL_TOKENS[code] for code in self.control_codes]

    def control_at(self, raw_frames: Iterable[int]) -> list[int]:
        """Token indices at raw frames of the source video. The sequence is padded with its last token, as the
        format says."""
        last = len(self.control_codes) - 1
        return [self.control_codes[min(int(frame), last)] for frame in raw_frames]


def read_index(index_file: str | os.PathLike, data_root: str | os.PathLike, needs_control: bool) -> list[ClipRecord]:
    """All clips of an index, in its order. Control labels are read only when needed.

    `index_file` is a .json, .jsonl or .csv file, the prompts.txt beside a videos.txt, or a directory holding
    one of these. Raises UserError naming the file and the entry.
    """
    path, root = _find_index(Path(index_file)), Path(data_root)
    readers = {".json": _json_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows, ".txt": _text_rows}
    if path.suffix.lower() not in readers:
        raise UserError(f"index_file: {path} is none of {', '.join(readers)}")
    try:
        rows = readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"index_file: cannot read {error.filename or path}: {error.strerror}") from error
    records = [_record(path, root, entry, row, needs_control) for entry, row in rows]
    if not records:
        raise UserError(f"{path}: lists no clip")
    _refuse_wrong_root(path, root, records)
    return records


def _find_index(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [path / name for name in NAMES_IN_DIRECTORY if (path / name).is_file()]
    if len(found) != 1:
        what = "holds none of" if not found else "holds more than one of"
        raise UserError(f"index_file: directory {path} {what} {', '.join(NAMES_IN_DIRECTORY)}; name the file itself")
    return found[0]


def _json_rows(path: Path) -> list[tuple[int, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: is not JSON: {error.msg}") from error
    rows = content.get("list") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise UserError(f'{path}: must be {{"list": [{{"path": …, "caption": …}}, …]}}')
    return list(enumerate(rows, start=1))


def _jsonl_rows(path: Path) -> list[tuple[int, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: entry {number} is not JSON: {error.msg}") from error
    return rows


def _csv_rows(path: Path) -> list[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        csv.field_size_limit(2**31 - 1)  # a label of an hour is longer than the module's default
        reader = csv.DictReader(file, strict=True)  # else a quote that is not closed takes all clips behind it in
        columns = reader.fieldnames or []
        missing = {"file_name", "caption"} - set(columns)
        if missing:
            listed = ", ".join(columns) or "none"
            raise UserError(f"{path}: column {' and '.join(sorted(missing))} is missing; its columns are {listed}")
        rows: list[tuple[int, Any]] = []
        try:
            for entry, row in enumerate(reader, start=1):
                if None in row:
                    what = "has more fields than columns; quote a caption that has commas"
                    raise UserError(f"{path}: entry {entry} {what}")
                rows.append((entry, {name: value for name, value in row.items() if value not in (None, "")}))
        except csv.Error as error:
            what = "close every quote, and double one that stands inside"
            raise UserError(f"{path}: entry {len(rows) + 1} is not CSV: {error}; {what}") from error
        return rows


def _text_rows(path: Path) -> list[tuple[int, Any]]:
    if path.name != "prompts.txt":
        raise UserError(f"index_file: {path}: name the prompts.txt that lies beside videos.txt")
    prompts, videos = (
        file.read_text(encoding="utf-8-sig").rstrip().split("\n") for file in (path, path.with_name("videos.txt"))
    )
    if len(prompts) != len(videos):
        raise UserError(f"{path}: {len(prompts)} prompts for {len(videos)} videos; line k of both files is one clip")
    pairs = zip(videos, prompts, strict=True)
    return [(n, {"path": video.strip(), "caption": prompt.strip()}) for n, (video, prompt) in enumerate(pairs, start=1)]


def _record(path: Path, root: Path, entry: int, row: Any, needs_control: bool) -> ClipRecord:
    where = f"{path}: entry {entry}"
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be an object with path and caption, is {str(row)[:40]!r}")
    name_key = "file_name" if "file_name" in row else "path"
    for key in (name_key, "caption"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            found = f"is {row[key]!r}" if key in row else "is missing"
            raise UserError(f"{where}: {key} {found}; it must be a text that is not empty")
    first = row.get("valid_frame_idx", 0)
    if isinstance(first, str) and first.strip().isdigit():
        first = int(first)  # CSV has no numbers
    if type(first) is not int or first < 0:
        raise UserError(f"{where}: valid_frame_idx is {first!r}; it must be a whole number, 0 or more")
    codes = None
    if needs_control:
        text = row.get("control_signal_seq")
        if not isinstance(text, str):
            found = f"is {text!r}" if "control_signal_seq" in row else "is missing"
            raise UserError(
                f'{where}: control_signal_seq {found}; it must be a text such as "D,D,DL", a token per frame'
            )
        codes = bytes(token_indices(parse_control_string(text, where=f"{where}: control_signal_seq")))
    return ClipRecord(root, row[name_key], row["caption"].strip(), codes, first, entry)


def _refuse_wrong_root(path: Path, root: Path, records: list[ClipRecord]) -> None:
    """A single missing video is met, named and counted when it is drawn; a wrong data_root is refused now."""
    step = max(len(records) // NUM_PROBED, 1)
    probed = records[::step]
    if not any(record.path.exists() for record in probed):
        first = records[0]
        raise UserError(
            f"{path}: entry {first.entry}: there is no video {first.path}, nor any of {len(probed)} entries looked up; "
            f"is data_root right?"
        )
