"""One image of a dataset before it is sharded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from data_shards.storage.object_path import Place

SPLITS: Final = ("train", "val", "query", "gallery", "validation_query", "validation_gallery")
EVALUATED: Final = {
    "test": ("query", "gallery"),
    "validation": ("validation_query", "validation_gallery"),
}
"""The query and the gallery of what a model can be measured on."""
SHARD_BYTES: Final = 256 << 20  # approximate size of a shard
NO_CAMERA: Final = 1 << 30
"""Camera numbers from here up mean that the camera is not known. Images of equal bytes share such a
number and no others do, so that an image of another number is another image."""


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image before it is sharded and what its dataset says about it."""

    path: Place  # the file on this machine, or the object
    relative: str  # its path inside the dataset's root, with forward slashes: the same everywhere
    pid: int  # identity, >= 0; train and test identities are numbered separately
    camid: int  # camera, >= 0; a source that does not know it gives NO_CAMERA
    split: str  # one of `SPLITS`
    person: str = ""  # the name that pid stands for, if the dataset has names and not numbers
    camera: str = ""  # the name that camid stands for

    @property
    def named(self) -> bool:
        """Whether pid or camid stands for a name, and so means nothing in another build."""
        return bool(self.person or self.camera)
