"""A sharded dataset, opened for reading."""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from data_shards.errors import DataError, ObjectMissing
from data_shards.manifest import MANIFEST_NAME, Index, Manifest, split_of_rows
from data_shards.records import SPLITS
from data_shards.storage import Storage, open_storage


@dataclass(frozen=True, eq=False)
class Dataset:
    """The manifest and the index of a sharded dataset, both checked."""

    url: str
    storage: Storage  # reads its shards; their names in the manifest are its keys
    manifest: Manifest
    _index: dict[str, Index] = field(repr=False)

    @classmethod
    def open(cls, url: str) -> Self:
        """Read and check `manifest.json` and `index.parquet` at `url`.

        Raises:
            DataError: there is no dataset, or it is damaged.
            StorageError: the storage cannot be reached or denies access.
        """
        storage = open_storage(url)
        try:
            manifest = Manifest.from_json(storage.read(MANIFEST_NAME))
            data = storage.read(manifest.index.name, sha256=manifest.index.sha256)
        except ObjectMissing as error:
            raise DataError(
                f"no dataset at {url}: {error}. Make one with `python -m data_shards build`"
            ) from None
        index = Index.from_parquet(data, manifest)
        split = split_of_rows(index, manifest)
        parts = {name: index.select(split == i) for i, name in enumerate(SPLITS)}
        return cls(url, storage, manifest, parts)

    def index(self, split: str) -> Index:
        """The images of one of `SPLITS`, in shard order; empty if the dataset has none."""
        return self._index[split]

    @property
    def identities(self) -> np.ndarray:
        """The pid of each training label, (C,) int64: `identities[label] == pid`."""
        return np.unique(self._index["train"].pid)

    def why_not_measurable(self) -> str | None:
        """Why no query has a match in the gallery; None if there is one."""
        query, gallery = (self._index[split] for split in ("query", "gallery"))
        return why_not_measurable(
            set(zip(query.pid.tolist(), query.camid.tolist(), strict=True)),
            set(zip(gallery.pid.tolist(), gallery.camid.tolist(), strict=True)),
        )


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
    seen = {camid for _, camid in (*query, *gallery)}
    if len(seen) == 1:
        return (
            f"all query and gallery images are from one camera ({min(seen)}); each query needs a"
            " gallery image of the same person from another camera"
        )
    return (
        "no query has a gallery image of the same person from another camera; give each camera its"
        " own camid"
    )
