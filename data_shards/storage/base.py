"""What a local folder and an S3 prefix have in common."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol


class Storage(Protocol):
    """Named byte strings below a URL. Keys are relative, with forward slashes."""

    @property
    def url(self) -> str:
        """Where this storage is rooted."""
        ...

    def read(self, key: str, *, sha256: str | None = None) -> bytes:
        """The whole object. Raises `ObjectMissing`; `DataError` if its digest differs."""
        ...

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from byte `start`. Raises `ObjectMissing`, `StorageError`."""
        ...

    def write(self, key: str, data: bytes, *, create_once: bool = False) -> None:
        """Put an object, whole or not at all; `ObjectExists` if `create_once` and it is there."""
        ...

    def upload(self, key: str, path: Path) -> None:
        """Put a file; a large one in parts, resuming an interrupted upload of the same file."""
        ...

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> None:
        """Get an object into a file, whole or not at all; `DataError` if its digest differs."""
        ...

    def exists(self, key: str) -> bool:
        """Whether the object exists."""
        ...

    def size(self, key: str) -> int:
        """Bytes of the object. Raises `ObjectMissing`."""
        ...

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Key and bytes of all objects whose key starts with `prefix`, by ascending key."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; do nothing if it does not exist."""
        ...

    def child(self, key: str) -> Storage:
        """The storage rooted at `key` below this one."""
        ...
