"""Errors that a person can act on, and how a command line shows them.

Every message says what was wrong, where, and what to do. A command that meets one prints it as a
single `error:` line and exits with the class's `exit_code`; anything else is a defect and keeps
its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence


class ReidError(Exception):
    """Base of all errors that this project raises on purpose."""

    exit_code = 1


class ConfigError(ReidError):
    """A setting, a recipe or a command line is wrong."""

    exit_code = 2


class DataError(ReidError):
    """A dataset, a shard, an image, an embedding or a checkpoint is wrong."""

    exit_code = 3


class StorageError(ReidError):
    """Object storage or a disk refused, failed, or ran full."""

    exit_code = 4


class ObjectMissing(StorageError):
    """The object, bucket or file is not there."""


class ObjectExists(StorageError):
    """A create-once write found something in its place."""


class Interrupted(ReidError):
    """The process was asked to end by a signal, and did so in order."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command's `main`; turn a `ReidError` into one line on stderr and its exit code."""
    try:
        return main() or 0
    except ReidError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def run_one_of(
    commands: Mapping[str, Callable[[list[str]], int | None]],
    usage: str,
    words: Sequence[str] | None = None,
) -> int:
    """Run the command that the first word names; return its exit code.

    Args:
        commands: by name; each takes the words after its name.
        usage: printed for `--help` and where no command is named.
        words: by default those of the command line.
    """
    name, *arguments = (sys.argv[1:] if words is None else words) or [""]
    if name in ("", "-h", "--help"):
        print(usage)
        return 0 if name else 2
    if name not in commands:
        print(f"error: no command {name!r}; there are {', '.join(commands)}", file=sys.stderr)
        return 2
    return run_command(lambda: commands[name](arguments))
