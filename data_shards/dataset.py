"""A sharded dataset, opened for reading."""

import contextlib
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

import numpy as np

from data_shards.cache import ShardCache
from data_shards.errors import ConfigError, DataError, ObjectMissing
from data_shards.index import Index, open_splits
from data_shards.manifest import MANIFEST_NAME, Manifest, version_key
from data_shards.records import EVALUATED, NO_CAMERA
from data_shards.storage import Storage, open_storage

NodeCache = tuple[Path, int]
"""The folder of a node's cache, and its largest size in bytes."""


def open_manifest(url: str, digest: str | None = None) -> tuple[Storage, Manifest]:
    """The storage and the manifest of a dataset; `Dataset.open` says the rest."""
    storage = open_storage(url)
    try:
        manifest = Manifest.from_json(storage.read(MANIFEST_NAME))
        if digest not in (None, manifest.digest):
            with contextlib.suppress(ObjectMissing):
                manifest = Manifest.from_json(storage.read(version_key(digest)))
    except ObjectMissing as error:
        raise _no_dataset(url, error) from None
    return storage, manifest


def _no_dataset(url: str, error: ObjectMissing) -> DataError:
    return DataError(f"no dataset at {url}: {error}. Make one with `python -m data_shards build`")


@dataclass(frozen=True, eq=False)
class Dataset:
    """The manifest and the index of a sharded dataset, both checked."""

    url: str
    storage: Storage  # reads its shards; their names in the manifest are its keys
    manifest: Manifest
    _index: dict[str, Index] = field(repr=False)

    @classmethod
    def open(cls, url: str, digest: str | None = None, cache: NodeCache | None = None) -> Self:
        """Read and check the manifest and the index at `url`.

        Args:
            url: where the dataset is.
            digest: of the version to open, if it is still there; by default the newest.
            cache: of the node, in which processes share the index if it is large.

        Raises:
            DataError: there is no dataset, or it is damaged.
            StorageError: the storage cannot be reached or denies access.
        """
        storage, manifest = open_manifest(url, digest)
        shared = None if cache is None else ShardCache(storage, *cache)
        try:
            return cls(url, storage, manifest, open_splits(storage, manifest, shared))
        except ObjectMissing as error:
            raise _no_dataset(url, error) from None

    def index(self, split: str) -> Index:
        """The images of one of `SPLITS`, in shard order; empty if the dataset has none."""
        return self._index[split]

    @property
    def whole(self) -> Index:
        """The images of all splits, in shard order."""
        return Index.concatenated(list(self._index.values()))

    @property
    def merged(self) -> list[str]:
        """The names of the datasets that this one was merged from, or its own, in order."""
        return sorted({self.manifest.dataset_of(shard) for shard in self.manifest.shards})

    def origin(self, split: str) -> np.ndarray:
        """The dataset in `merged` that each image of a split comes from, (N,) int64."""
        number = {name: n for n, name in enumerate(self.merged)}
        names = map(self.manifest.dataset_of, self.manifest.shards)
        return np.array([number[name] for name in names])[self._index[split].shard]

    @property
    def digest(self) -> str:
        """The manifest's digest, which identifies the dataset."""
        return self.manifest.digest

    def read(self, index: Index, row: int) -> bytes:
        """The bytes of one image, by its row in one of the indices."""
        shard = self.manifest.shards[index.shard[row]]
        return self.storage.read_range(shard.name, int(index.offset[row]), int(index.size[row]))

    @property
    def identities(self) -> np.ndarray:
        """The pid of each training label, (C,) int64: `identities[label] == pid`."""
        train = self._index["train"]
        pid = np.empty(train.label.max(initial=-1) + 1, np.int64)
        pid[train.label] = train.pid
        return pid

    def evaluated(self, split: str) -> tuple[Index, Index]:
        """Query and gallery of "test" or "validation"; both are empty if the dataset has none."""
        query, gallery = (self._index[name] for name in EVALUATED[split])
        return query, gallery

    def choose_split(self, wanted: str) -> Literal["test", "validation"]:
        """What a training is measured on: "auto" is validation if the dataset has it, else test.

        Raises `ConfigError` if validation is wanted and the dataset has none.
        """
        has_validation = all(len(index) for index in self.evaluated("validation"))
        if wanted == "validation" and not has_validation:
            raise ConfigError(
                f"{self.url} has no validation split: build it with `python -m data_shards build"
                " --validation 0.1`, or measure on its test split"
            )
        return "validation" if has_validation and wanted != "test" else "test"

    def why_not_measurable(self, split: str = "test") -> str | None:
        """Why no query of a split has a match in its gallery; None if there is one."""
        query, gallery = map(_seen, self.evaluated(split))
        return why_not_measurable(query, gallery)


def _seen(index: Index) -> set[tuple[int, int]]:
    """The pids and camids of images, a part at a time: as Python's numbers they are large."""
    seen, step = set[tuple[int, int]](), 1 << 17
    for first in range(0, len(index), step):
        rows = slice(first, first + step)
        seen.update(zip(index.pid[rows].tolist(), index.camid[rows].tolist(), strict=True))
    return seen


def why_not_measurable(
    query: Collection[tuple[int, int]], gallery: Collection[tuple[int, int]]
) -> str | None:
    """Why a model cannot be measured on images of these pids and camids; None if it can.

    A match of a query is a gallery image of the same identity from another camera.
    """
    for split, images in (("query", query), ("gallery", gallery)):
        if not images:
            return f"there are no {split} images"
    cameras = defaultdict[int, set[int]](set)
    for pid, camid in gallery:
        cameras[pid].add(camid)
    shared = [(pid, camid) for pid, camid in query if pid in cameras]
    if not shared:
        return (
            "query and gallery share no identity; each query needs a gallery image of the same"
            " person from another camera"
        )
    if any(cameras[pid] != {camid} for pid, camid in shared):
        return None
    if any(camid >= NO_CAMERA for _, camid in query):
        return "no query has another image of the same person in the gallery"
    seen = {camid for _, camid in (*query, *gallery)}
    if len(seen) == 1:
        return (
            "all query and gallery images are from one camera; each query needs a"
            " gallery image of the same person from another camera"
        )
    return (
        "no query has a gallery image of the same person from another camera; give each camera its"
        " own camid"
    )
