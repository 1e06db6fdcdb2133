"""Files that appear whole or not at all, and disk errors in one line."""

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from data_shards.errors import DataError, ObjectExists, ObjectMissing, StorageError

TEMPORARY = ".tmp-"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # of a file system without hard links


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` inside the block into a `StorageError` about `path`."""
    try:
        yield
    except FileNotFoundError:
        raise ObjectMissing(f"{path} does not exist") from None
    except OSError as error:
        text = f"{path}: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = f"disk full while writing {path}: free some space, or choose another folder"
        raise StorageError(text) from None


@contextlib.contextmanager
def atomic_write(path: Path, *, create_once: bool = False) -> Iterator[IO[bytes]]:
    """Yield a temporary file beside `path` that replaces it when the block succeeds.

    If `create_once` and `path` exists by then, raise `ObjectExists` and leave it as it is.
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
            _rename_new(name, path)
        else:
            os.replace(name, path)
    except FileExistsError:
        raise ObjectExists(f"{path} already exists") from None
    finally:
        with contextlib.suppress(FileNotFoundError):  # it was renamed
            os.unlink(name)


def _rename_new(name: str, path: Path) -> None:
    """Give a file its name, or raise `FileExistsError` if there is a file of that name."""
    try:
        os.link(name, path)  # unlike a rename, fails if the target exists
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            # Keeps out other processes of this machine; nobody sees a file that is not whole.
            fcntl.flock(folder, fcntl.LOCK_EX)
            if os.path.lexists(path):
                raise FileExistsError from None
            os.replace(name, path)
        finally:
            os.close(folder)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_sha256(what: str, found: str, expected: str | None) -> None:
    """Raise `DataError` if two digests differ; expect any digest if `expected` is None."""
    if expected not in (None, found):
        raise DataError(f"{what} is damaged: its SHA-256 is {found[:12]}…, not {expected[:12]}…")
