"""`index.parquet`, read one row group at a time and checked on the way.

Paths are most of an index, and seldom needed: they stay in the file until they are asked for.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np

from data_shards.errors import DataError
from data_shards.manifest import INDEX_NAME, ShardInfo
from data_shards.records import SPLITS

if TYPE_CHECKING:
    import pyarrow.parquet as pq

COLUMNS = {"shard": "int32", "offset": "int64", "size": "int64", "pid": "int64", "label": "int64"}
COLUMNS |= {"camid": "int32", "width": "int32", "height": "int32", "path": "string"}
"""The type of each column, as Arrow names it."""

NUMBERS = {name: np.dtype(kind) for name, kind in COLUMNS.items() if kind != "string"}


@dataclass(frozen=True)
class Places:
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
        amount = np.array([shard.images for shard in shards], np.int64)
        of_splits = np.zeros(len(SPLITS), int)
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


class IndexFile:
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

    def read(self, shards: Sequence[ShardInfo], places: Places) -> dict[str, np.ndarray]:
        """All columns of numbers, checked, in memory."""
        with self._lock, _parquet_errors():
            if self._opened().metadata.num_rows != places.images:
                raise _invalid(_WRONG_AMOUNT)
        columns = {name: np.empty(places.images, kind) for name, kind in NUMBERS.items()}
        self.copy_to(columns, shards, places)
        return columns

    def copy_to(
        self, columns: dict[str, np.ndarray], shards: Sequence[ShardInfo], places: Places
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
                table = file.read_row_group(number, columns=list(NUMBERS))
                paths = file.metadata.row_group(number).column(len(NUMBERS)).statistics
                if any(c.null_count for c in (*table.columns, *([paths] if paths else ()))):
                    raise DataError(f"{INDEX_NAME} has empty cells")
                rows = {name: table[name].to_numpy() for name in NUMBERS}
                check.rows(rows)
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

    def rows(self, part: Mapping[str, np.ndarray]) -> None:
        """Check the next rows."""
        shard, offset, size = part["shard"], part["offset"], part["size"]
        if not len(shard):
            return
        _require(bool(((shard >= 0) & (shard < len(self._bytes))).all()), "a row names no shard")
        before = np.concatenate([[self._last[0]], shard[:-1]])
        _require(bool((shard >= before).all()), "its rows are not in shard order")
        number = np.arange(self._done, self._done + len(shard))
        due = np.searchsorted(self._first, number, "right") - 1
        _require(bool((shard == due).all()), _WRONG_AMOUNT)
        capacity = self._bytes[shard]
        # `size <= capacity` first, so that the sum below cannot overflow.
        fits = (offset >= 0) & (size > 0) & (size <= capacity) & (offset <= capacity - size)
        _require(bool(fits.all()), "an image lies outside its shard")
        end = np.concatenate([[self._last[1]], offset[:-1] + size[:-1]])
        _require(bool(((offset >= end) | (shard != before)).all()), "two images overlap")
        seen = (part["width"] > 0) & (part["height"] > 0)
        _require(bool(seen.all()), "an image has no pixels")
        known = (part["pid"] >= 0) & (part["camid"] >= 0)
        _require(bool(known.all()), "a pid or camid is negative")
        train = self._train[shard]
        _require(bool((part["label"][~train] == -1).all()), "an image outside train has a label")
        pid, label = part["pid"][train], part["label"][train]
        # Images of an identity are neighbours: one of them stands for those that are the same.
        new = np.ones(len(pid), bool)
        new[1:] = (pid[1:] != pid[:-1]) | (label[1:] != label[:-1])
        self._pids.append(pid[new])
        self._labels.append(label[new])
        self._done += len(shard)
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


class Paths:
    """Paths of images that are read from the index when they are asked for.

    It is used as an array of strings; other processes get the strings.
    """

    def __init__(self, file: IndexFile, places: Places, rows: range | np.ndarray) -> None:
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
