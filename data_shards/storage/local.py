"""A folder on a disk that behaves like a bucket: a write is whole or not at all."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from data_shards.errors import ObjectMissing, StorageError
from data_shards.storage.atomic import TEMPORARY, atomic_write, disk_errors, require_sha256

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalStorage:
    """A folder on a disk. Keys are relative, with forward slashes."""

    root: Path

    @property
    def url(self) -> str:
        """Where this storage is rooted."""
        return str(self.root)

    def _path(self, key: str) -> Path:
        if not key or key.startswith("/") or "\0" in key or ".." in key.split("/"):
            raise StorageError(f"{key!r} is not a key inside {self.root}")
        return self.root / key

    def read(self, key: str, *, sha256: str | None = None) -> bytes:
        """The whole object. Raises `ObjectMissing`; `DataError` if its digest differs."""
        path = self._path(key)
        with disk_errors(path):
            data = path.read_bytes()
        if sha256 is not None:
            require_sha256(str(path), hashlib.sha256(data).hexdigest(), sha256)
        return data

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from byte `start`. Raises `ObjectMissing`, `StorageError`."""
        path = self._path(key)
        with disk_errors(path), path.open("rb") as file:
            data = os.pread(file.fileno(), length, start)
        if len(data) != length:
            raise StorageError(f"{path} ends before byte {start + length}: is it truncated?")
        return data

    def write(self, key: str, data: bytes, *, create_once: bool = False) -> None:
        """Put an object, whole or not at all; `ObjectExists` if `create_once` and it is there."""
        path = self._path(key)
        with disk_errors(path), atomic_write(path, create_once=create_once) as file:
            file.write(data)

    def upload(self, key: str, path: Path) -> None:
        """Put a file. On S3 a large one goes in parts, and an interrupted upload is resumed."""
        _copy(path, self._path(key))

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> None:
        """Get an object into a file, whole or not at all; `DataError` if its digest differs."""
        _copy(self._path(key), path, sha256)

    def exists(self, key: str) -> bool:
        """Whether the object exists."""
        path = self._path(key)
        with disk_errors(path):
            return path.is_file()

    def size(self, key: str) -> int:
        """Bytes of the object. Raises `ObjectMissing`."""
        path = self._path(key)
        with disk_errors(path):
            return path.stat().st_size

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Key and bytes of all objects whose key starts with `prefix`, by ascending key."""
        found = []
        for folder, _, names in os.walk(self.root, onerror=_warn):
            for name in names:
                path = Path(folder, name)
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix) and not name.startswith(TEMPORARY):
                    with disk_errors(path), contextlib.suppress(FileNotFoundError):
                        found.append((key, path.stat().st_size))  # else it was deleted meanwhile
        yield from sorted(found)

    def delete(self, key: str) -> None:
        """Remove an object; do nothing if it does not exist."""
        path = self._path(key)
        with disk_errors(path):
            path.unlink(missing_ok=True)
        if path.parent != self.root:
            with contextlib.suppress(OSError):  # like a bucket, keep no empty folders
                path.parent.rmdir()

    def erase(self, key: str) -> None:
        """Remove an object with its earlier versions, which some buckets keep."""
        self.delete(key)

    def copy_from(self, other: object, other_key: str, key: str) -> bool:
        """Copy an object without reading it: by a link, or by the server; False if impossible."""
        if not isinstance(other, LocalStorage):
            return False
        source, path = other._path(other_key), self._path(key)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            try:
                os.link(source, path)
            except FileNotFoundError:
                raise ObjectMissing(f"{source} does not exist") from None
            except OSError:  # another disk, or one without links
                return False
        return True

    def child(self, key: str) -> Self:
        """The storage rooted at `key` below this one."""
        return type(self)(self._path(key))


def _warn(error: OSError) -> None:
    """Warn of a folder that cannot be listed, unless it is not there."""
    if not isinstance(error, FileNotFoundError):
        log.warning("%s is left out: %s", error.filename, error.strerror)


def _copy(source: Path, target: Path, sha256: str | None = None) -> None:
    with disk_errors(source):
        stream = source.open("rb")
    with stream, disk_errors(target), atomic_write(target) as file:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            file.write(chunk)
            digest.update(chunk)
        if sha256 is not None:
            require_sha256(str(source), digest.hexdigest(), sha256)
