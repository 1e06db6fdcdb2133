"""The index of a dataset, `index.parquet`: one row per image, so that any can be read by offset.

It is read one row group at a time, and checked in full on the way. Paths are most of it and seldom
needed: they stay in the file, and are read by row group when they are asked for. An index of
several row groups is kept as plain columns in the node's cache; all processes map that one file.
"""

import io
import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np

from data_shards.cache import ShardCache
from data_shards.errors import DataError, StorageError
from data_shards.manifest import INDEX_NAME, Manifest, ShardInfo, SplitInfo
from data_shards.records import NO_CAMERA, SPLITS
from data_shards.storage import LocalStorage, Storage
from data_shards.storage.atomic import disk_errors, file_sha256, require_sha256

if TYPE_CHECKING:
    import pyarrow.parquet as pq

log = logging.getLogger(__name__)

COLUMNS = {"shard": "int32", "offset": "int64", "size": "int64", "pid": "int64", "label": "int64"}
COLUMNS |= {"camid": "int32", "width": "int32", "height": "int32", "path": "string"}
"""The type of each column, as Arrow names it."""

_NUMBERS = {name: np.dtype(kind) for name, kind in COLUMNS.items() if kind != "string"}
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
    path: "np.ndarray | Paths"  # object (str), path of the image in its source dataset

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
        file, places = _IndexFile(lambda: io.BytesIO(data)), _Places.in_file_order(manifest.shards)
        columns = file.read(manifest.shards, places)
        return cls(**columns, path=Paths(file, places, range(places.images)))


class Paths:
    """Paths of images that are read from the index when they are asked for.

    It is used as an array of strings; other processes get the strings.
    """

    def __init__(self, file: "_IndexFile", places: "_Places", rows: range | np.ndarray) -> None:
        self._file, self._places, self._rows = file, places, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, chosen: Any) -> Any:
        if isinstance(chosen, int | np.integer):
            return self._read(np.array([self._rows[int(chosen)]]))[0]
        if isinstance(chosen, slice) or not isinstance(self._rows, range):
            return Paths(self._file, self._places, self._rows[chosen])
        chosen = np.asarray(chosen)
        rows = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        return Paths(self._file, self._places, self._rows.start + rows)

    def __iter__(self) -> Iterator[str]:
        return iter(np.asarray(self))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._read(np.asarray(self._rows, np.int64))

    def __eq__(self, other: object) -> Any:
        return np.asarray(self) == other

    def __reduce__(self) -> tuple[Any, ...]:
        return np.asarray, (np.asarray(self),)

    def _read(self, rows: np.ndarray) -> np.ndarray:
        return self._file.paths(self._places.in_file(rows))


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
    places, columns = _Places.in_split_order(manifest.shards), None
    size = places.images * sum(kind.itemsize for kind in _NUMBERS.values())
    if cache is not None and size + manifest.index.bytes > cache.max_bytes:
        cache = None
    if cache is not None and places.images > _ROW_GROUP:
        file = _IndexFile(partial(_open_parquet, storage, manifest, cache))
        try:
            columns = _mapped(file, manifest, places, cache)
        except StorageError as error:
            log.warning("the index is read into memory, because it cannot be cached: %s", error)
    if columns is None:
        file = _IndexFile(partial(_open_parquet, storage, manifest, None))
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


@dataclass(frozen=True)
class _Places:
    """Where each shard's rows are: in the file by shard, in the columns by `order`."""

    order: np.ndarray  # (S,) shards in the order of the columns
    first: np.ndarray  # (S,) each shard's first row in the file
    target: np.ndarray  # (S,) the same in the columns
    amount: np.ndarray  # (S,) its images
    of_splits: np.ndarray  # (6,) images of each split

    @classmethod
    def in_file_order(cls, shards: Sequence[ShardInfo]) -> Self:
        return cls._make(shards, np.arange(len(shards)))

    @classmethod
    def in_split_order(cls, shards: Sequence[ShardInfo]) -> Self:
        """So that the rows of a split are contiguous."""
        split = [SPLITS.index(shard.split) for shard in shards]
        return cls._make(shards, np.argsort(split, kind="stable"))

    @classmethod
    def _make(cls, shards: Sequence[ShardInfo], order: np.ndarray) -> Self:
        amount, of_splits = (
            np.array([s.images for s in shards], np.int64),
            np.zeros(len(SPLITS), int),
        )
        np.add.at(of_splits, [SPLITS.index(shard.split) for shard in shards], amount)
        target = np.empty_like(amount)
        target[order] = np.cumsum(amount[order]) - amount[order]
        return cls(order, np.cumsum(amount) - amount, target, amount, of_splits)

    @property
    def images(self) -> int:
        return int(self.amount.sum())

    def in_file(self, rows: np.ndarray) -> np.ndarray:
        """The rows of the file that are these rows of the columns."""
        shard = self.order[np.searchsorted(self.target[self.order], rows, "right") - 1]
        return rows - self.target[shard] + self.first[shard]

    def copies(self, begin: int, end: int) -> Iterator[tuple[slice, slice]]:
        """Yield slices of rows [begin, end) of the file, from `begin`, and of the columns."""
        last = np.searchsorted(self.first, end, "left")
        for shard in range(int(np.searchsorted(self.first, begin, "right")) - 1, int(last)):
            first, target = int(self.first[shard]), int(self.target[shard])
            a, b = max(begin, first), min(end, first + int(self.amount[shard]))
            yield slice(a - begin, b - begin), slice(target + a - first, target + b - first)


class _IndexFile:
    """`index.parquet`, opened when it is first read. Threads can share it."""

    def __init__(self, open_stream: Callable[[], IO[bytes]]) -> None:
        self._open, self._file = open_stream, None
        self._lock = threading.Lock()
        self._group: tuple[int, Any] = -1, None  # the paths that were read last

    def paths(self, rows: np.ndarray) -> np.ndarray:
        """The paths in rows of the file, (n,) object."""
        found = np.empty(len(rows), object)
        with self._lock, _parquet_errors():
            starts = self._starts()
            group = np.searchsorted(starts, rows, "right") - 1
            for number in np.unique(group).tolist():
                if self._group[0] != number:
                    column = self._opened().read_row_group(number, columns=["path"])["path"]
                    if column.null_count:
                        raise DataError(f"{INDEX_NAME} has empty cells")
                    self._group = number, column
                here = group == number
                taken = self._group[1].take(rows[here] - starts[number])
                found[here] = taken.to_numpy(zero_copy_only=False)
        return found

    def read(self, shards: Sequence[ShardInfo], places: _Places) -> dict[str, np.ndarray]:
        """All columns of numbers, checked, in memory."""
        with self._lock, _parquet_errors():
            if self._opened().metadata.num_rows != places.images:
                raise _invalid(_WRONG_AMOUNT)
        columns = {name: np.empty(places.images, kind) for name, kind in _NUMBERS.items()}
        self.copy_to(columns, shards, places)
        return columns

    def copy_to(
        self, columns: dict[str, np.ndarray], shards: Sequence[ShardInfo], places: _Places
    ) -> None:
        """Check all rows, and write their numbers to `columns`."""
        with self._lock, _parquet_errors():
            file = self._opened()
            schema, row, check = file.schema_arrow, 0, _Check(shards)
            if [(field.name, str(field.type)) for field in schema] != list(COLUMNS.items()):
                raise DataError(
                    f"{INDEX_NAME} has columns {schema.names}, not {list(COLUMNS)}: was it"
                    " written by another version?"
                )
            for number in range(file.num_row_groups):
                table = file.read_row_group(number, columns=list(_NUMBERS))
                paths = file.metadata.row_group(number).column(len(_NUMBERS)).statistics
                if any(c.null_count for c in (*table.columns, *([paths] if paths else ()))):
                    raise DataError(f"{INDEX_NAME} has empty cells")
                rows = {name: table[name].to_numpy() for name in _NUMBERS}
                check.rows(Index(**rows, path=np.empty(0, object)))
                for source, target in places.copies(row, row + len(table)):
                    for name, column in columns.items():
                        column[target] = rows[name][source]
                row += len(table)
            check.end()

    def _opened(self) -> "pq.ParquetFile":
        if self._file is None:
            import pyarrow.parquet as pq

            stream = self._open()
            self._file = pq.ParquetFile(stream)
        return self._file

    def _starts(self) -> np.ndarray:
        metadata = self._opened().metadata
        sizes = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
        return np.cumsum([0, *sizes])[:-1]


class _Check:
    """Checks an index part by part, in memory that does not grow with its images.

    Args:
        shards: of the manifest.
    """

    def __init__(self, shards: Sequence[ShardInfo]) -> None:
        self._first = np.cumsum([0, *(shard.images for shard in shards)])
        self._bytes = np.array([shard.bytes for shard in shards], np.int64)
        self._train = np.array([shard.split == "train" for shard in shards])
        self._done, self._last = 0, (0, 0)  # rows; shard and end of the image before
        self._pids, self._labels = [np.empty(0, np.int64)], [np.empty(0, np.int64)]

    def rows(self, part: Index) -> None:
        """Check the next rows."""
        if not len(part):
            return
        shard, offset, size = part.shard, part.offset, part.size
        _require(bool(((shard >= 0) & (shard < len(self._bytes))).all()), "a row names no shard")
        before = np.concatenate([[self._last[0]], shard[:-1]])
        _require(bool((shard >= before).all()), "its rows are not in shard order")
        number = np.arange(self._done, self._done + len(part))
        due = np.searchsorted(self._first, number, "right") - 1
        _require(bool((shard == due).all()), _WRONG_AMOUNT)
        capacity = self._bytes[shard]
        # `size <= capacity` first, so that the sum below cannot overflow.
        fits = (offset >= 0) & (size > 0) & (size <= capacity) & (offset <= capacity - size)
        _require(bool(fits.all()), "an image lies outside its shard")
        end = np.concatenate([[self._last[1]], offset[:-1] + size[:-1]])
        _require(bool(((offset >= end) | (shard != before)).all()), "two images overlap")
        _require(bool(((part.width > 0) & (part.height > 0)).all()), "an image has no pixels")
        _require(bool(((part.pid >= 0) & (part.camid >= 0)).all()), "a pid or camid is negative")
        train = self._train[shard]
        _require(bool((part.label[~train] == -1).all()), "an image outside train has a label")
        pid, label = part.pid[train], part.label[train]
        # Images of an identity are neighbours: one of them stands for those that are the same.
        new = np.ones(len(pid), bool)
        new[1:] = (pid[1:] != pid[:-1]) | (label[1:] != label[:-1])
        self._pids.append(pid[new])
        self._labels.append(label[new])
        self._done += len(part)
        self._last = int(shard[-1]), int(offset[-1] + size[-1])

    def end(self) -> None:
        """Check what can be known after the last row."""
        _require(self._done == self._first[-1], _WRONG_AMOUNT)
        _, label = np.unique(np.concatenate(self._pids), return_inverse=True)
        same = label == np.concatenate(self._labels)
        _require(bool(same.all()), "labels do not follow the train pids")


_WRONG_AMOUNT = "a shard has more or fewer images than listed"


def _invalid(what: str) -> DataError:
    return DataError(f"{INDEX_NAME} is not valid: {what}; build the dataset again")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise _invalid(what)


@contextmanager
def _parquet_errors() -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{INDEX_NAME} is not readable Parquet: {error}") from None


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
    file: _IndexFile, manifest: Manifest, places: _Places, cache: ShardCache
) -> dict[str, np.ndarray]:
    """The columns in a file that all processes of the node map."""
    kinds = sorted(_NUMBERS.items(), key=lambda item: -item[1].itemsize)  # so that all are aligned
    ends = np.cumsum([kind.itemsize * places.images for _, kind in kinds]).tolist()

    def views(memory: mmap.mmap) -> dict[str, np.ndarray]:
        starts = zip(kinds, [0, *ends], strict=False)
        return {
            name: np.frombuffer(memory, kind, places.images, start)
            for (name, kind), start in starts
        }

    def make(path: Path) -> None:
        with path.open("w+b") as out:
            os.posix_fallocate(out.fileno(), 0, ends[-1])  # writing to a map cannot fail in order
            file.copy_to(views(mmap.mmap(out.fileno(), ends[-1])), manifest.shards, places)

    name = f"{manifest.digest}-{_LAYOUT}.columns"
    descriptor = cache.open_made(name, ends[-1], make)
    try:
        return views(mmap.mmap(descriptor, ends[-1], access=mmap.ACCESS_READ))
    finally:
        os.close(descriptor)
