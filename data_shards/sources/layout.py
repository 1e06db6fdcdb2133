"""What the parsers share: finding a dataset's folder, checking paths, counting."""

import functools
import posixpath
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_shards.errors import DataError
from data_shards.records import ImageRecord
from data_shards.storage.atomic import disk_errors
from data_shards.storage.object_path import Place


class Counts(NamedTuple):
    """A dataset's published size; `val` counts as train."""

    train_images: int
    train_identities: int
    query_images: int
    gallery_images: int
    cameras: int


class Source(NamedTuple):
    """A dataset's parser: `read(root, **options)` returns its records; `counts` is its size.

    If the source is streamed, `read` scans the images too, and returns what `scan` does.
    """

    title: str
    read: Callable[..., Any]
    counts: Counts | None = None
    streamed: bool = False


def with_disk_errors(read: Callable[..., Any]) -> Callable[..., Any]:
    """The same parser, which raises a `StorageError` for what the disk refuses."""

    @functools.wraps(read)
    def checked(root: Place, **options: Any) -> Any:
        try:
            return read(root, **options)
        except OSError as error:
            with disk_errors(Path(error.filename or str(root))):
                raise

    return checked


def count(records: Sequence[ImageRecord]) -> Counts:
    """Count records as the published tables do."""
    train = [r for r in records if r.split in ("train", "val")]
    return Counts(
        train_images=len(train),
        train_identities=len({r.pid for r in train}),
        query_images=sum(r.split == "query" for r in records),
        gallery_images=sum(r.split == "gallery" for r in records),
        cameras=len({r.camid for r in records}),
    )


def difference(source: Source, records: Sequence[ImageRecord], root: Place | str) -> str | None:
    """How the records differ from the published counts, as a sentence; None if they do not."""
    if source.counts is None or source.counts == (found := count(records)):
        return None
    names = [name.replace("_", " ") for name in Counts._fields]
    pairs = zip(names, source.counts, found, strict=True)
    wrong = [(f"{want:,} {name}", f"{have:,}") for name, want, have in pairs if want != have]
    expected, have = (", ".join(column) for column in zip(*wrong, strict=True))
    return f"{source.title}: expected {expected}, found {have} under {root}"


def require_folder(root: Place) -> Place:
    """Return the root if it is a folder."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: give the dataset's folder with --root")
    return root


def is_of_macos(path: str) -> bool:
    """Whether macOS made a file beside the images: `._name` or `.DS_Store`."""
    return posixpath.basename(path).startswith(("._", ".DS_Store"))


def normalized(root: Place, relative: str, where: str) -> str:
    """Check a path under `root` and return its shortest form, such as `a/b.jpg` of `./a//b.jpg`."""
    if not relative or relative.startswith("/") or "\\" in relative or "\0" in relative:
        raise DataError(f"{where}: {relative!r} is not a path relative to {root}")
    if ".." in relative.split("/"):
        raise DataError(f"{where}: {relative!r} leads out of {root}")
    return posixpath.normpath(relative)


def numbered(
    values: Sequence[str], field: str, where: Callable[[int], str]
) -> tuple[list[int], bool]:
    """Integers as they are, names numbered in sorted order. A mix of both is refused.

    Returns the numbers, and whether they are of names.

    Args:
        values: those of a field, `pid` or `camid`, of all images.
        field: its name, for messages.
        where: what a message calls the image of a position.
    """
    names = [i for i, v in enumerate(values) if not (v.isascii() and v.isdecimal())]
    if not names:
        return [int(value) for value in values], False
    wrong = next((i for i in names if not values[i] or values[i].lstrip("-").isdecimal()), None)
    if len(names) < len(values) or wrong is not None:
        or_none = ", or none at all if cameras are not known" if field == "camid" else ""
        raise DataError(
            f"{where(names[0])}: {field} {values[names[0]]!r} is not an integer from 0"
            f" up (use integers for all images, or names for all{or_none})"
        )
    number = {name: i for i, name in enumerate(sorted(set(values)))}
    return [number[value] for value in values], True
