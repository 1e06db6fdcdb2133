"""Files of embeddings: written in parts, read in blocks, local or on S3.

A Parquet row is an image: `embedding` (a list of float32), `pid`, `camid`, `split` ("query",
"gallery", …) and, if known, `path`. A folder of parts is read in the order of their names. An npz
file holds `query_embedding`, `query_pid`, `query_camid`, and the same for the gallery. So features
of any other system can be measured.
"""

import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import types

from data_shards.errors import DataError, ObjectMissing
from data_shards.records import EVALUATED
from data_shards.storage import Storage, open_file, open_storage
from reid_train.evaluation.ground_truth import Labels
from reid_train.evaluation.similarity import check_features, check_shapes

SUFFIX = ".parquet"
JOB = "job.json"  # in a folder of parts: what they were made from, and how many there are
ROWS = 8192  # rows of a row group, which a reader holds at a time
_LABELS = ("pid", "camid", "split")


@dataclass(frozen=True)
class EmbeddingTable:
    """Embeddings of N images, in memory."""

    embedding: np.ndarray  # (N, D) float32
    pid: np.ndarray  # (N,) integers
    camid: np.ndarray
    split: np.ndarray  # (N,) strings
    path: np.ndarray | None = None  # (N,) strings, if known


def part_key(number: int) -> str:
    """The name of a part in a folder of embeddings."""
    return f"part-{number:06d}{SUFFIX}"


def write_part(storage: Storage, key: str, table: EmbeddingTable) -> None:
    """Write embeddings as one Parquet file, whole or not at all.

    Raises `DataError` if an embedding is NaN or infinite: such a file cannot be measured.
    """
    embedding = check_features("computed", table.embedding).embedding
    columns = {
        "embedding": pa.FixedSizeListArray.from_arrays(embedding.reshape(-1), embedding.shape[1]),
        "pid": pa.array(table.pid, pa.int64()),
        "camid": pa.array(table.camid, pa.int32()),
        "split": pa.array(list(table.split), pa.string()),
    }
    if table.path is not None:
        columns["path"] = pa.array(list(table.path), pa.string())
    sink = io.BytesIO()
    # Compression and dictionaries do not make embeddings smaller.
    options = {"row_group_size": ROWS, "compression": "none", "use_dictionary": False}
    pq.write_table(pa.table(columns), sink, **options)
    storage.write(key, sink.getvalue())


class _Ranges(io.RawIOBase):
    """An object of a storage as a seekable file, read by ranges."""

    def __init__(self, storage: Storage, key: str) -> None:
        self._storage, self._key, self._size, self._at = storage, key, storage.size(key), 0

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._size - self._at, 0)
        length = left if size is None or size < 0 else min(size, left)
        data = self._storage.read_range(self._key, self._at, length) if length else b""
        self._at += len(data)
        return data


class RowGroup(NamedTuple):
    """What a task reads at a time: a row group of a part, and its rows among those of all parts."""

    key: str
    number: int
    rows: range


@dataclass(frozen=True)
class EmbeddingFiles:
    """Parquet embeddings that stay where they are; only labels are in memory."""

    url: str
    storage: Storage
    dimensions: int
    groups: tuple[RowGroup, ...]  # all, in order
    pid: np.ndarray  # (N,) of all rows
    camid: np.ndarray
    split: np.ndarray

    @classmethod
    def open(cls, url: str, evaluated: str = "test") -> Self:
        """Read the labels of a Parquet file, or of all parts in a folder.

        `evaluated` is a key of `EVALUATED`: of "validation" the splits `validation_query` and
        `validation_gallery` become the query and the gallery.
        Raises `DataError` for no file, missing columns, or parts of different dimensions.
        """
        storage, keys = _parts(url)
        groups, labels, dimensions, first = [], [], 0, 0
        for key in keys:
            where = f"{storage.url}/{key}"
            file = _open_part(storage, key)
            width = _dimensions(file, where)
            if dimensions and width and width != dimensions:
                raise DataError(
                    f"{where} has embeddings of {width} dimensions, the parts before it of "
                    f"{dimensions}: were they written by different models?"
                )
            dimensions = dimensions or width
            for number in range(file.num_row_groups):
                stop = first + file.metadata.row_group(number).num_rows
                groups.append(RowGroup(key, number, range(first, stop)))
                first = stop
            with _readable(where):
                labels.append(file.read(columns=list(_LABELS)))
        with _readable(url):
            table = pa.concat_tables(labels, promote_options="permissive")
        pid, camid, split = (_label_column(table, name, url) for name in _LABELS)
        if evaluated != "test":
            names = dict(zip(EVALUATED[evaluated], EVALUATED["test"], strict=True))
            split = np.array([names.get(name, "") for name in split], object)
        return cls(url, storage, dimensions, tuple(groups), pid, camid, split)

    @property
    def labels(self) -> Labels:
        """Identities and cameras of query and gallery. Raises `DataError` if either is empty."""
        query, gallery = self.split == "query", self.split == "gallery"
        return Labels(self.pid[query], self.camid[query], self.pid[gallery], self.camid[gallery])

    def paths(self) -> np.ndarray:
        """The path of every row, (N,) strings; empty ones where a part has no paths."""
        found = []
        for key in dict.fromkeys(group.key for group in self.groups):
            file = _open_part(self.storage, key)
            with _readable(f"{self.storage.url}/{key}"):
                if "path" in file.schema_arrow.names:
                    column = file.read(columns=["path"])["path"].cast(pa.string()).fill_null("")
                    found.append(column.to_numpy())
                else:
                    found.append(np.full(file.metadata.num_rows, "", object))
        return np.concatenate(found) if found else np.empty(0, object)

    def edges(self, split: str) -> list[range]:
        """Each row group's images of a split, as a range of numbers in the split."""
        before = np.concatenate([[0], np.cumsum(self.split == split)]).tolist()
        return [range(before[rows.start], before[rows.stop]) for _, _, rows in self.groups]

    def blocks(
        self, split: str, first: int, stop: int, size: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """A split's images from `first` up to `stop`, `size` at a time wherever row groups end.

        Yields the number of the first image in the split, and (n, D) float32; raises `DataError`
        that says which row has another length, NaN or infinite values.
        """
        at, filled = first, 0
        out = np.empty((min(size, stop - at), self.dimensions), np.float32)
        for group, images in zip(self.groups, self.edges(split), strict=True):
            start = images.start
            if max(start, first) >= min(images.stop, stop):
                continue
            for rows in self._rows(split, group):
                rest = rows[max(first - start, 0) : max(stop - start, 0)]
                start += len(rows)
                while len(rest):
                    taken = rest[: len(out) - filled]
                    out[filled : filled + len(taken)] = taken
                    filled, rest = filled + len(taken), rest[len(taken) :]
                    if filled == len(out):
                        yield at, out
                        at, filled = at + filled, 0
                        out = np.empty((min(size, stop - at), self.dimensions), np.float32)

    def _rows(self, split: str, group: RowGroup) -> Iterator[np.ndarray]:
        """A row group's embeddings of a split, at most ROWS at a time."""
        file, first = _open_part(self.storage, group.key), group.rows.start
        with _readable(f"{self.storage.url}/{group.key}"):
            for batch in file.iter_batches(ROWS, [group.number], ["embedding"]):
                matrix = _matrix(batch.column(0), self.dimensions, f"{self.url}, row {first}")
                check_features(f"{self.url}:", matrix, first, len(self.pid))
                yield matrix[self.split[first : first + len(matrix)] == split]
                first += len(matrix)

    def read(self, *splits: str) -> np.ndarray:
        """All embeddings of splits, one after another, (n, D) float32."""
        counts = [int(np.count_nonzero(self.split == split)) for split in splits]
        out, start = np.empty((sum(counts), self.dimensions), np.float32), 0
        for split, count in zip(splits, counts, strict=True):
            for first, block in self.blocks(split, 0, count, ROWS):
                out[start + first : start + first + len(block)] = block
            start += count
        pa.default_memory_pool().release_unused()  # it would keep some row groups' memory
        return out


def read_embeddings(url: str) -> tuple[np.ndarray, np.ndarray, Labels]:
    """Query and gallery embeddings and their labels, of a Parquet file, a folder of parts, or npz.

    Raises:
        DataError: anything about the file is wrong; the message says what and where.
    """
    if not url.endswith(".npz"):
        files = EmbeddingFiles.open(url)
        labels = files.labels
        return files.read("query"), files.read("gallery"), labels
    storage, key = open_file(url)
    content = io.BytesIO(storage.read(key))
    if not zipfile.is_zipfile(content):
        raise DataError(f"{url} cannot be read as npz (it is not a zip archive): is it complete?")
    try:
        with np.load(content, allow_pickle=False) as arrays:
            found = dict(arrays)
    except Exception as error:  # a damaged archive makes NumPy raise errors without a common base
        raise DataError(f"{url} cannot be read as npz ({error}): is it complete?") from error
    kinds = "embedding", "pid", "camid"
    names = [f"{split}_{kind}" for kind in kinds for split in ("query", "gallery")]
    if missing := [name for name in names if name not in found]:
        raise DataError(f"{url} has no {', '.join(missing)}; it must have {', '.join(names)}")
    query, gallery, query_pid, gallery_pid, query_camid, gallery_camid = (
        found[name] for name in names
    )
    try:
        labels = Labels(query_pid, query_camid, gallery_pid, gallery_camid)
        return *check_shapes(query, gallery, labels), labels
    except DataError as error:
        raise DataError(f"{url}: {error}") from None


def _parts(url: str) -> tuple[Storage, list[str]]:
    """The storage and the names of a Parquet file, or of the parts in a folder."""
    if url.endswith(SUFFIX):
        storage, key = open_file(url)
        if storage.exists(key):
            return storage, [key]
    storage = open_storage(url)
    keys = [key for key, _ in storage.list() if key.endswith(SUFFIX) and "/" not in key]
    if not keys and url.endswith(SUFFIX):
        raise ObjectMissing(f"there is no file {url}")
    if not keys:
        raise DataError(f"no embeddings at {url}: expected a {SUFFIX} or .npz file, or a folder")
    if not storage.exists(JOB):
        return storage, keys
    try:
        wanted = [part_key(n) for n in range(int(json.loads(storage.read(JOB))["parts"]))]
    except (ValueError, LookupError, TypeError):
        where = f"{storage.url}/{JOB}"
        raise DataError(f"{where} does not have the number of parts: embed again") from None
    if missing := set(wanted) - set(keys):
        raise DataError(
            f"{url} has {len(wanted) - len(missing)} of {len(wanted)} parts: run `embed` again "
            "with the same settings to add the missing ones"
        )
    return storage, wanted


def _open_part(storage: Storage, key: str) -> pq.ParquetFile:
    where = f"{storage.url}/{key}"
    with _readable(where):
        file = pq.ParquetFile(pa.PythonFile(_Ranges(storage, key), mode="r"))
    names = file.schema_arrow.names
    if missing := [name for name in ("embedding", *_LABELS) if names.count(name) != 1]:
        raise DataError(
            f"{where} must have one column {', one '.join(missing)}; it has {', '.join(names)}"
        )
    return file


def _dimensions(file: pq.ParquetFile, where: str) -> int:
    """D of a part's embeddings; 0 if it has no rows."""
    kind = file.schema_arrow.field("embedding").type
    fixed = types.is_fixed_size_list(kind)
    lists = fixed or types.is_list(kind) or types.is_large_list(kind)
    if not lists or not (types.is_floating(kind.value_type) or types.is_integer(kind.value_type)):
        raise DataError(f"{where}: column embedding must hold lists of float32, not {kind}")
    if fixed:
        width = kind.list_size
    else:
        with _readable(where):
            batch = next(file.iter_batches(1, columns=["embedding"]), None)
        if batch is None:
            return 0
        width = len(batch.column(0)[0].as_py() or [])
    if width == 0:
        raise DataError(f"{where}: the first embedding is empty; it must have numbers")
    return width


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """Turn Arrow's errors of damaged files into a `DataError`."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        raise DataError(f"{where} cannot be read as Parquet ({error}): is it complete?") from error


def _matrix(column: pa.Array, dimensions: int, where: str) -> np.ndarray:
    """Lists as (n, D) float32; an error counts rows from `where`."""
    lengths = pc.call_function("list_value_length", [column]).fill_null(0).to_numpy()
    wrong = np.flatnonzero(lengths != dimensions)
    if len(wrong):
        raise DataError(
            f"{where} + {wrong[0]}: an embedding of {lengths[wrong[0]]} dimensions, "
            f"but others have {dimensions}"
        )
    values = column.flatten().to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, np.float32).reshape(-1, dimensions)


def _label_column(table: pa.Table, name: str, url: str) -> np.ndarray:
    """A column of labels, checked."""
    column = table[name]
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.null_count:
        raise DataError(f"{url}: column {name} has missing values")
    kind = column.type
    text = types.is_string(kind) or types.is_large_string(kind)
    if not (text if name == "split" else types.is_integer(kind)):
        wanted = "strings" if name == "split" else "integers"
        raise DataError(f"{url}: column {name} must hold {wanted}, not {kind}")
    return column.to_numpy()
