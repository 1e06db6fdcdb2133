"""A sharded dataset, opened for reading."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from data_shards.errors import DataError, ObjectMissing
from data_shards.manifest import MANIFEST_NAME, Index, Manifest, split_of_rows
from data_shards.records import SPLITS
from data_shards.storage import Storage, open_storage


@dataclass(frozen=True, eq=False)
class Dataset:
    """The manifest and the index of a sharded dataset, both checked.

    Attributes:
        url: where it is.
        storage: what reads its shards; their names in the manifest are its keys.
        manifest: what it is made of.
    """

    url: str
    storage: Storage
    manifest: Manifest
    _index: dict[str, Index] = field(repr=False)

    @classmethod
    def open(cls, url: str) -> Dataset:
        """Read and check `manifest.json` and `index.parquet` at `url`.

        Raises:
            DataError: no dataset there, or a damaged one.
            StorageError: the storage cannot be reached or refuses.
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
        """One split's images, in shard order; empty where the dataset has none.

        Args:
            split: one of `SPLITS`.
        """
        return self._index[split]

    @property
    def identities(self) -> np.ndarray:
        """The pid of each training label, (C,) int64: `identities[label] == pid`."""
        return np.unique(self._index["train"].pid)
