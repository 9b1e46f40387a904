"""From a config file and a launch line to checked settings.

`--config PATH [--dry_run] [--name value …]`: the config module is executed by its path, its `args` taken, the
launch line's values put over it, paths made absolute, and all of it validated. Every error names `file:line`
or `--name`.
"""

import ast
import os
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.config.errors import SettingError, UserError, one_line
from common.config.fields import is_path, parse_words, words_that_are_not_paths
from common.config.settings import TrainingSettings, closest_name, setting_types

# These may also name a repository on the Hugging Face hub ("org/name"), when no directory of that name
# exists.
HUB_ID_SETTINGS = ("pretrained_model_name_or_path", "control_text_encoder")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

USAGE = "--config PATH [--dry_run] [--name value …]"


def parse_launch_line(argv: Sequence[str]) -> tuple[str, bool, list[str]]:
    """Split a launch line (without the program's name) into (config path, dry run?, remaining overrides)."""
    config_path, dry_run, overrides = "", False, []
    words = iter(argv)
    for word in words:
        if word == "--config":
            config_path = next(words, "")
        elif word.startswith("--config="):
            config_path = word.removeprefix("--config=")
        elif word == "--dry_run":
            dry_run = True
        else:
            overrides.append(word)
    if not config_path or config_path.startswith("--"):
        raise UserError(f"--config is missing; usage: {USAGE}")
    return config_path, dry_run, overrides


def load_settings(config_path: str | os.PathLike, overrides: Sequence[str] = ()) -> TrainingSettings:
    """The checked settings of a config file with the launch line's `--name value …` applied.

    Relative paths count from the config file when it states them, from the current directory when the launch
    line does. Raises UserError, naming `file:line` or `--name`.
    """
    path = Path(config_path).expanduser().resolve()
    args = _execute_config(path)
    _resolve_paths(args, base=path.parent, names=setting_types(type(args)))
    given = parse_overrides(type(args), overrides)
    for name, value in given.items():
        setattr(args, name, value)
    _resolve_paths(args, base=Path.cwd(), names=given)
    try:
        args.validate()
    except SettingError as error:
        raise UserError(f"{_origin(path, error.setting, given)}: {error}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return args


def parse_overrides(settings_class: type, overrides: Sequence[str]) -> dict[str, Any]:
    """`["--fps", "8", "--frame_buckets", "33", "65"]` → {"fps": 8, "frame_buckets": [33, 65]}."""
    known = setting_types(settings_class)
    words_of: dict[str, list[str]] = {}
    words: list[str] | None = None
    for word in overrides:
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            if name not in known:
                raise UserError(f"--{name}: no such setting{closest_name(name, known)}")
            words = words_of[name] = [value] if has_value else []  # said twice: the last counts
        elif words is None:
            raise UserError(f"{word!r} follows no --name; usage: {USAGE}")
        else:
            words.append(word)
    values = {}
    for name, given in words_of.items():
        try:
            values[name] = parse_words(known[name], given)
        except TypeError as error:
            raise UserError(f"--{name}: {error}") from None
    return values


def _execute_config(path: Path) -> TrainingSettings:
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise UserError(f"--config: cannot read {path}: {reason}") from error
    # Executed from source rather than imported: no bytecode file is left or found, and two stages may both
    # call their module lora_config.
    namespace: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    try:
        exec(compile(source, str(path), "exec"), namespace)
    except SyntaxError as error:
        raise UserError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except UserError as error:
        raise UserError(f"{path}:{_line_in(path, error)}: {error}") from error
    except Exception as error:
        where = f"{path}:{_line_in(path, error)}"
        raise UserError(f"{where}: {type(error).__name__}: {one_line(error)}") from error
    args = namespace.get("args")
    if not isinstance(args, TrainingSettings):
        raise UserError(f"{path}: defines no `args`; write args = LoraSettings() or another stage's settings")
    return args


def _line_in(path: Path, error: BaseException) -> int:
    """The line of the config file in which `error` arose, however deep it was raised."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return lines[-1] if lines else 1


def _origin(path: Path, name: str, given: dict[str, Any]) -> str:
    """Where a setting got its value: the launch line, a line of the config file, or a default."""
    if name in given:
        return "launch line"
    lines = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr == name
    ]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _resolve_paths(args: TrainingSettings, base: Path, names: Any) -> None:
    types = setting_types(type(args))
    for name in names:
        value = getattr(args, name)
        if is_path(types[name]) and value and value not in words_that_are_not_paths(types[name]):
            setattr(args, name, resolve_path(value, base, may_be_hub_id=name in HUB_ID_SETTINGS))


def resolve_path(value: str, base: Path, may_be_hub_id: bool = False) -> str:
    """`value` as an absolute path counted from `base`; a hub id stays as it is when no such directory
    exists."""
    path = (base / Path(value).expanduser()).resolve()
    if may_be_hub_id and HUB_ID.fullmatch(value) and not path.exists():
        return value
    return str(path)
