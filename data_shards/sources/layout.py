"""What the parsers share: finding a dataset's folder, checking paths, counting."""

import posixpath
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data_shards.errors import DataError
from data_shards.records import ImageRecord


class Counts(NamedTuple):
    """A dataset's published size; `val` counts as train."""

    train_images: int
    train_identities: int
    query_images: int
    gallery_images: int
    cameras: int


class Source(NamedTuple):
    """A dataset's parser: `read(root, **options)` returns its records; `counts` is its size."""

    title: str
    read: Callable[..., list[ImageRecord]]
    counts: Counts | None = None


def count(records: list[ImageRecord]) -> Counts:
    """Count records as the published tables do."""
    train = [r for r in records if r.split in ("train", "val")]
    return Counts(
        train_images=len(train),
        train_identities=len({r.pid for r in train}),
        query_images=sum(r.split == "query" for r in records),
        gallery_images=sum(r.split == "gallery" for r in records),
        cameras=len({r.camid for r in records}),
    )


def difference(source: Source, records: list[ImageRecord], root: Path) -> str | None:
    """How the records differ from the published counts, as a sentence; None if they do not."""
    if source.counts is None or source.counts == (found := count(records)):
        return None
    names = [name.replace("_", " ") for name in Counts._fields]
    pairs = zip(names, source.counts, found, strict=True)
    wrong = [(f"{want:,} {name}", f"{have:,}") for name, want, have in pairs if want != have]
    expected, have = (", ".join(column) for column in zip(*wrong, strict=True))
    return f"{source.title}: expected {expected}, found {have} under {root}"


def require_folder(root: Path) -> Path:
    """Return the root if it is a folder."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: give the dataset's folder with --root")
    return root


def is_of_macos(path: str) -> bool:
    """Whether macOS made a file beside the images: `._name` or `.DS_Store`."""
    return posixpath.basename(path).startswith(("._", ".DS_Store"))


def normalized(root: Path, relative: str, where: str) -> str:
    """Check a path under `root` and return its shortest form, such as `a/b.jpg` of `./a//b.jpg`."""
    if not relative or relative.startswith("/") or "\\" in relative or "\0" in relative:
        raise DataError(f"{where}: {relative!r} is not a path relative to {root}")
    if ".." in relative.split("/"):
        raise DataError(f"{where}: {relative!r} leads out of {root}")
    return posixpath.normpath(relative)
