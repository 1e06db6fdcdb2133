"""A place in a storage, with those methods of `pathlib.Path` that the sources of images use."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self

from data_shards.errors import ConfigError, ObjectMissing
from data_shards.progress import Progress, silent
from data_shards.storage import LocalStorage, open_storage

log = logging.getLogger(__name__)

_LISTED = 1000  # keys between two reports: as many as S3 has in a page


class Readable(Protocol):
    """What an `ObjectPath` needs of a storage."""

    @property
    def url(self) -> str: ...
    def read(self, key: str) -> bytes: ...
    def read_range(self, key: str, start: int, length: int) -> bytes: ...
    def size(self, key: str) -> int: ...


@dataclass(frozen=True, slots=True)
class ObjectPath:
    """An object, a part of one, or a folder of them. The listing stays out of pickles.

    Without a listing, every key may be a folder, and `iterdir` is not possible.
    """

    storage: Readable
    key: str = ""  # "" is the storage's root
    span: tuple[int, int] | None = None  # first byte and length, of a part of the object
    listing: Mapping[str, Mapping[str, bool]] | None = field(
        default=None, repr=False, compare=False
    )  # of each folder: its names, and whether each is a folder

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.storage, self.key, self.span)

    def __str__(self) -> str:
        return f"{self.storage.url}/{self.key}".rstrip("/")

    def __lt__(self, other: Self) -> bool:
        return self.key < other.key

    def __truediv__(self, name: str) -> Self:
        return replace(self, key=f"{self.key}/{name}" if self.key else name)

    @property
    def parent(self) -> Self:
        return replace(self, key=self.key.rpartition("/")[0])

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2] or self.storage.url.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    def absolute(self) -> Self:
        return self

    def is_dir(self) -> bool:
        return self.listing is None or self.key in self.listing

    def is_file(self) -> bool:
        if self.listing is None:
            try:
                self.storage.size(self.key)
            except ObjectMissing:
                return False
            return True
        folder, _, name = self.key.rpartition("/")
        return self.listing.get(folder, {}).get(name) is False

    def iterdir(self) -> Iterator[Self]:
        assert self.listing is not None
        return (self / name for name in self.listing[self.key])

    def read_bytes(self) -> bytes:
        if self.span is not None:
            return self.storage.read_range(self.key, *self.span)
        return self.storage.read(self.key)

    def read_text(self) -> str:
        return self.read_bytes().decode()


Place = Path | ObjectPath


def open_place(
    url: str | Place, *, file: bool = False, listed: bool = False, progress: Progress = silent
) -> Place:
    """Open a path of this machine, or an object or a prefix on S3.

    Args:
        url: a path, `file:///…` or `s3://bucket/prefix`; a place is returned as it is.
        file: it is an object, not a folder of them.
        listed: list everything below it now, page by page; only then can folders be looked into.
        progress: called with the stage "listing", the number of keys so far, and -1 as total.

    Raises:
        StorageError: the storage cannot be reached, or denies listing.
    """
    if not isinstance(url, str):
        return url
    if "://" not in url:
        return Path(url)
    storage = open_storage(url)
    if isinstance(storage, LocalStorage):
        return storage.root
    if file:
        return object_at(url)
    return ObjectPath(storage, listing=_tree(storage.list(), url, progress) if listed else None)


def object_at(url: str) -> ObjectPath:
    """The object `s3://bucket/KEY`; its parents reach up to the bucket's root."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not key or not url.startswith("s3://"):
        raise ConfigError(f"{url} names no object: write s3://bucket/KEY")
    return ObjectPath(open_storage(f"s3://{bucket}"), key)


def _tree(
    objects: Iterator[tuple[str, int]], url: str, progress: Progress
) -> dict[str, dict[str, bool]]:
    """The names in each folder, in order, and whether each is a folder."""
    tree, odd, number = {}, list[str](), 0
    for number, (key, _) in enumerate(objects, 1):
        if number == _LISTED:
            progress("listing", 0, -1)  # else the first report would count as done before
        if number % _LISTED == 0:
            progress("listing", number, -1)  # how many there are is not known
        parts = key.split("/")
        if parts[-1] == "":  # a folder, as some programs write it
            continue
        if not {"", ".", ".."}.isdisjoint(parts):
            odd.append(key)
            continue
        tree.setdefault("/".join(parts[:-1]), {})[parts[-1]] = False
        for depth in range(len(parts) - 1, 0, -1):
            above = tree.setdefault("/".join(parts[: depth - 1]), {})
            if above.get(parts[depth - 1]):
                break
            above[parts[depth - 1]] = True
    if number >= _LISTED:
        progress("listing", number, number)
    if odd:
        log.warning("%s: skipped %d keys that are not paths, such as %r", url, len(odd), odd[0])
    return tree
