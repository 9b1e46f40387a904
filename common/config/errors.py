"""Errors that a user can mend, and how a command line shows them: one line, exit code 2, no traceback."""

import errno
import sys
from collections.abc import Callable

MENDABLE_OS_ERRORS = (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR)


class UserError(ValueError):
    """Something the user gave is wrong. The message is ONE line: what, where, and what would be right."""


class SettingError(UserError):
    """A setting has an impossible value. `setting` is its name, by which the loader finds where it was
    set."""

    def __init__(self, setting: str, message: str):
        super().__init__(f"{setting}: {message}")
        self.setting = setting


def is_out_of_memory(error: BaseException) -> bool:
    """True for every form in which host or device memory runs out; recognised by name, so torch is not
    imported."""
    if isinstance(error, MemoryError) or any(c.__name__ == "OutOfMemoryError" for c in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error).lower() for words in ("out of memory", "can't allocate memory")
    )


def one_line(text: object) -> str:
    """`text` without line breaks, so that an error stays one line whatever a library put into its message."""
    return " ".join(str(text).split())


def run_cli(main: Callable[[], int | None], memory_help: str = "out of memory") -> None:
    """Run `main` as a program and leave Python with its exit code.

    `UserError` is printed to stderr as `error: …` with exit code 2, and so are the system errors that a user can
    mend (no permission, no space, a file where a directory belongs) and running out of memory: `memory_help` can
    name the settings that help. Anything else is a bug and keeps its traceback.
    """
    try:
        code = main() or 0
    except UserError as error:
        code = _report(one_line(error))
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if is_out_of_memory(error):
            code = _report(f"{memory_help} ({one_line(error)[:200]})")
        elif isinstance(error, OSError) and error.errno in MENDABLE_OS_ERRORS:
            code = _report(one_line(error))
        else:
            raise
    sys.exit(code)


def _report(line: str) -> int:
    sys.stderr.write(f"error: {line}\n")
    return 2
