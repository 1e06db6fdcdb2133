"""Files that appear whole or not at all, and what a disk can say, in one line."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from data_shards.errors import DataError, ObjectExists, ObjectMissing, StorageError

TEMPORARY = ".tmp-"


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn an `OSError` inside the block into a `StorageError` about `where`."""
    try:
        yield
    except FileNotFoundError:
        raise ObjectMissing(f"{where} is not there") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"disk full while writing {where}: free some space, or name another folder"
            ) from None
        raise StorageError(f"{where}: {error.strerror or error}") from None


@contextlib.contextmanager
def replacing(path: Path, *, create_once: bool = False) -> Iterator[IO[bytes]]:
    """A temporary file beside `path` that takes its place when the block succeeds.

    Args:
        path: the file to appear; its folder is made.
        create_once: raise `ObjectExists` if `path` is there by then, and leave it as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        if create_once:
            os.link(name, path)  # unlike a rename, fails if the target is there
            os.unlink(name)
        else:
            os.replace(name, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        if isinstance(error, FileExistsError):
            raise ObjectExists(f"{path} is there already") from None
        raise


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_sha256(what: str, found: str, expected: str) -> None:
    """Raise `DataError` where two digests differ."""
    if found != expected:
        raise DataError(f"{what} is damaged: its SHA-256 is {found[:12]}…, not {expected[:12]}…")
