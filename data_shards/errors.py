"""Errors that a person can act on.

Every message says what was wrong, where, and what to do. `command_line.run_command` prints it as
one `error:` line and exits with the class's `exit_code`. Any other exception is a bug and keeps its
traceback.
"""


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
