"""One image of a dataset, before it is sharded."""

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
        path: where the file is on this machine.
        relative: its path inside the dataset's root, with forward slashes; the same on every
            machine, so it is what the shards and their order are made from.
        pid: identity, >= 0. Train and test identities are separate number spaces.
        camid: camera, >= 0.
        split: one of `SPLITS`.
    """

    path: Path
    relative: str
    pid: int
    camid: int
    split: str
