"""One image of a dataset before it is sharded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

SPLITS: Final = ("train", "val", "query", "gallery")
SHARD_BYTES: Final = 256 << 20
"""Approximate size of a shard."""


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image on disk and what its dataset says about it.

    Attributes:
        path: the file on this machine.
        relative: its path inside the dataset's root, with forward slashes. It is the same on every
            machine, so shards and their order depend on it and not on `path`.
        pid: identity, >= 0. Train and test identities are numbered separately.
        camid: camera, >= 0.
        split: one of `SPLITS`.
    """

    path: Path
    relative: str
    pid: int
    camid: int
    split: str
