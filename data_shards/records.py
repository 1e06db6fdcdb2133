"""One image of a dataset before it is sharded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

SPLITS: Final = ("train", "val", "query", "gallery")
SHARD_BYTES: Final = 256 << 20  # approximate size of a shard


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image on disk and what its dataset says about it."""

    path: Path  # the file on this machine
    relative: str  # its path inside the dataset's root, with forward slashes: the same everywhere
    pid: int  # identity, >= 0; train and test identities are numbered separately
    camid: int  # camera, >= 0
    split: str  # one of `SPLITS`
