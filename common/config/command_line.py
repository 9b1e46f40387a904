"""What the programs' command lines share: wrong arguments as one line, and outputs checked before any work."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from common.config.errors import SettingError, UserError


class ArgumentParser(argparse.ArgumentParser):
    """Shows a program's docstring as it is written; a wrong argument is a `UserError`, not the whole usage."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help explains the options)")


def whole_number(minimum: int, step: int = 1) -> Callable[[str], int]:
    """An argument's `type`: minimum, minimum + step, minimum + 2·step …; other values are refused with the nearest."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is too small; use {minimum} or more")
        if (value - minimum) % step:
            below = value - (value - minimum) % step
            raise argparse.ArgumentTypeError(f"{value} does not fit; use {below} or {below + step}")
        return value

    return convert


def positive_number(text: str) -> float:
    """An argument's `type`: a number of more than 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of more than 0")
    return value


def not_negative_number(text: str) -> float:
    """An argument's `type`: a number of 0 or more."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value


def fraction(text: str) -> float:
    """An argument's `type`: a number from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def refuse_unwritable(directory: str | os.PathLike, setting: str) -> None:
    """SettingError when `directory` cannot be made or written to. Looking leaves nothing behind."""
    existing = Path(directory).absolute()
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise SettingError(setting, f"{directory} cannot be written: {existing} is no directory; choose another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise SettingError(setting, f"{directory} cannot be written: no permission in {existing}; choose another")
