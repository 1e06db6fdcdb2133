"""The index of a dataset: one row per image, so that any image can be read by its offset.

An index of several row groups is kept as plain columns in the node's cache, made by the first
process. All processes map that one file.
"""

import io
import logging
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from data_shards.cache import ShardCache
from data_shards.errors import StorageError
from data_shards.index_file import COLUMNS, NUMBERS, IndexFile, Paths, Places
from data_shards.manifest import Manifest, ShardInfo, SplitInfo
from data_shards.records import NO_CAMERA, SPLITS
from data_shards.storage import LocalStorage, Storage
from data_shards.storage.atomic import disk_errors, file_sha256, require_sha256

log = logging.getLogger(__name__)

_ROW_GROUP = 1 << 17  # rows
_LAYOUT = 1  # of a file of columns in a cache: part of its name


@dataclass(frozen=True, eq=False)
class Index:
    """Images in shard order, one row each, as columns of length N."""

    shard: np.ndarray  # int32, a position in `manifest.shards`
    offset: np.ndarray  # int64, bytes from the start of the shard to the encoded image
    size: np.ndarray  # int64, bytes of the encoded image
    pid: np.ndarray  # int64
    label: np.ndarray  # int64, 0..C-1 by ascending pid in train; -1 elsewhere
    camid: np.ndarray  # int32
    width: np.ndarray  # int32, pixels
    height: np.ndarray  # int32, pixels
    path: np.ndarray | Paths  # object (str), path of the image in its source dataset

    def __len__(self) -> int:
        return len(self.shard)

    def select(self, rows: np.ndarray | slice) -> Self:
        """Select rows by a boolean mask, by integer positions, or by a slice, without a copy."""
        return type(self)(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @classmethod
    def concatenated(cls, parts: Sequence[Self]) -> Self:
        """The rows of several indices, in shard order."""
        columns = {f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)}
        return cls(**columns).select(np.argsort(columns["shard"], kind="stable"))

    @classmethod
    def from_columns(cls, columns: dict[str, Any]) -> Self:
        """Build an index from one sequence per column, cast to the column's type."""
        kinds = {name: object if kind == "string" else kind for name, kind in COLUMNS.items()}
        return cls(**{name: np.asarray(columns[name], kind) for name, kind in kinds.items()})

    def to_parquet(self) -> bytes:
        """The bytes of `index.parquet`; the same rows give the same bytes."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = [pa.array(np.asarray(getattr(self, n)), kind) for n, kind in COLUMNS.items()]
        sink = io.BytesIO()
        table = pa.table(columns, list(COLUMNS))
        pq.write_table(table, sink, compression="zstd", row_group_size=_ROW_GROUP)
        return sink.getvalue()

    @classmethod
    def from_parquet(cls, data: bytes, manifest: Manifest) -> Self:
        """Read `index.parquet`; a `DataError` if it is damaged or disagrees with the manifest."""
        file, places = IndexFile(lambda: io.BytesIO(data)), Places.in_file_order(manifest.shards)
        columns = file.read(manifest.shards, places)
        return cls(**columns, path=Paths(file, places, range(places.images)))


def open_splits(storage: Storage, manifest: Manifest, cache: ShardCache | None) -> dict[str, Index]:
    """Open the index of each of `SPLITS`.

    Args:
        storage: of the dataset.
        manifest: of its version.
        cache: of the node; without one, or if it is too small, the columns are in memory.

    Raises:
        DataError: the index is damaged or disagrees with the manifest.
        ObjectMissing: there is none.
        StorageError: the storage cannot be reached or denies access.
    """
    places, columns = Places.in_split_order(manifest.shards), None
    size = places.images * sum(kind.itemsize for kind in NUMBERS.values())
    if cache is not None and size + manifest.index.bytes > cache.max_bytes:
        cache = None
    if cache is not None and places.images > _ROW_GROUP:
        file = IndexFile(partial(_open_parquet, storage, manifest, cache))
        try:
            columns = _mapped(file, manifest, places, cache)
        except StorageError as error:
            log.warning("the index is read into memory, because it cannot be cached: %s", error)
    if columns is None:
        file = IndexFile(partial(_open_parquet, storage, manifest, None))
        columns = file.read(manifest.shards, places)
    path = Paths(file, places, range(places.images))
    whole, ends = Index(**columns, path=path), np.cumsum(places.of_splits)
    return {
        name: whole.select(slice(int(end - images), int(end)))
        for name, images, end in zip(SPLITS, places.of_splits, ends, strict=True)
    }


def split_of_rows(index: Index, shards: Sequence[ShardInfo]) -> np.ndarray:
    """The split of each row, (N,) int8, as a position in `SPLITS`."""
    of_shard = np.array([SPLITS.index(shard.split) for shard in shards], np.int8)
    return of_shard[index.shard]


def count_splits(index: Index, shards: Sequence[ShardInfo]) -> dict[Any, SplitInfo]:
    """The manifest's counts of each split that has images."""
    split, counts = split_of_rows(index, shards), {}
    for number, name in enumerate(SPLITS):
        if (rows := split == number).any():
            camid = index.camid[rows]
            counts[name] = SplitInfo(
                images=int(rows.sum()),
                identities=len(np.unique(index.pid[rows])),
                cameras=len(np.unique(camid[camid < NO_CAMERA])),
            )
    return counts


def _open_parquet(storage: Storage, manifest: Manifest, cache: ShardCache | None) -> IO[bytes]:
    """Open `index.parquet`, the digest of which is checked."""
    info = manifest.index
    if isinstance(storage, LocalStorage):
        path = storage.root / info.name
        with disk_errors(path):
            require_sha256(str(path), file_sha256(path), info.sha256)
            return path.open("rb")
    if cache is None:
        return io.BytesIO(storage.read(info.name, sha256=info.sha256))
    return os.fdopen(cache.open(info), "rb")


def _mapped(
    file: IndexFile, manifest: Manifest, places: Places, cache: ShardCache
) -> dict[str, np.ndarray]:
    """The columns in a file that all processes of the node map."""
    kinds = sorted(NUMBERS.items(), key=lambda item: -item[1].itemsize)  # so that all are aligned
    ends = np.cumsum([kind.itemsize * places.images for _, kind in kinds]).tolist()

    def views(memory: mmap.mmap) -> dict[str, np.ndarray]:
        starts = zip(kinds, [0, *ends], strict=False)
        return {
            name: np.frombuffer(memory, kind, places.images, start)
            for (name, kind), start in starts
        }

    def make(path: Path) -> None:
        with path.open("w+b") as out:
            os.posix_fallocate(out.fileno(), 0, ends[-1])  # else a full disk would be a signal
            file.copy_to(views(mmap.mmap(out.fileno(), ends[-1])), manifest.shards, places)

    name = f"{manifest.digest}-{_LAYOUT}.columns"
    descriptor = cache.open_made(name, ends[-1], make)
    try:
        return views(mmap.mmap(descriptor, ends[-1], access=mmap.ACCESS_READ))
    finally:
        os.close(descriptor)
