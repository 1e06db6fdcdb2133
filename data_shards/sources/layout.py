"""What the parsers share: finding a dataset's folder, checking paths, counting."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from data_shards.errors import DataError
from data_shards.records import ImageRecord


@dataclass(frozen=True)
class Counts:
    """A dataset's published size; `val` counts as train."""

    train_images: int
    train_identities: int
    query_images: int
    gallery_images: int
    cameras: int


@dataclass(frozen=True)
class Source:
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
    if source.counts is None:
        return None
    found, wrong = count(records), []
    for field in fields(Counts):
        want, have = getattr(source.counts, field.name), getattr(found, field.name)
        if want != have:
            wrong.append((f"{want:,} {field.name.replace('_', ' ')}", f"{have:,}"))
    if not wrong:
        return None
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


def read_folders(root: Path, title: str, below: str, pattern: re.Pattern[str]) -> list[ImageRecord]:
    """Read Market-1501's layout: three folders, with pid and camid in each file's name.

    Images of pid -1 (false detections) are dropped; pid 0 (distractors) is kept.

    Args:
        root: the folder that holds `bounding_box_train`, or its parent.
        title: the dataset, for messages.
        below: the name of that folder in the dataset's archive.
        pattern: matches a file name; has the groups `pid` and `camid`.
    """
    folders = {"bounding_box_train": "train", "query": "query", "bounding_box_test": "gallery"}
    candidates = (require_folder(root), root / below)
    base = next((c for c in candidates if all((c / f).is_dir() for f in folders)), None)
    if base is None:
        raise DataError(f"{title}: no folders {', '.join(folders)} under {root} or {root / below}")
    records = []
    for folder, split in folders.items():
        for path in sorted((base / folder).iterdir()):
            if path.suffix.lower() not in (".jpg", ".jpeg", ".png") or is_of_macos(path.name):
                continue  # Thumbs.db and the like
            match = pattern.match(path.name)
            if match is None:
                raise DataError(f"{title}: the name of {path} has no identity and camera")
            pid, camid = int(match["pid"]), int(match["camid"])
            if pid >= 0:
                records.append(ImageRecord(path, f"{folder}/{path.name}", pid, camid, split))
    return records
