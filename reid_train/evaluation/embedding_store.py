"""Files of embeddings: written in parts, read by stretches, local or on S3.

A Parquet row is an image: `embedding` (a list of float32), `pid`, `camid`, `split` ("query",
"gallery", …) and, if known, `path`. A folder of parts is read in the order of their names. An
npz file holds `query_embedding`, `query_pid`, `query_camid`, and the same for the gallery. So
features of any other system can be measured.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_shards.errors import DataError, ObjectMissing, ReidError
from data_shards.storage import Storage, open_file, open_storage
from reid_train.evaluation.ground_truth import Labels
from reid_train.evaluation.similarity import checked_side

SUFFIX = ".parquet"
JOB = "job.json"  # in a folder of parts: of what they are, and how many
ROWS = 8192  # rows of a row group: what a reader holds at a time
_LABELS = ("pid", "camid", "split")


@dataclass(frozen=True)
class EmbeddingTable:
    """Embeddings of some images, in memory.

    Args:
        embedding: (N, D) float32.
        pid, camid: (N,) integers.
        split: (N,) strings.
        path: (N,) strings, or empty.
    """

    embedding: np.ndarray
    pid: np.ndarray
    camid: np.ndarray
    split: np.ndarray
    path: np.ndarray = field(default_factory=lambda: np.array([], dtype=str))


def part_key(number: int) -> str:
    """The name of a part in a folder of embeddings."""
    return f"part-{number:06d}{SUFFIX}"


def write_part(storage: Storage, key: str, table: EmbeddingTable) -> None:
    """Write embeddings as one Parquet file, whole or not at all.

    Raises `DataError` if an embedding is NaN or infinite: a file of those would be of no use.
    """
    embedding = checked_side("computed", table.embedding).embedding
    values = pa.FixedSizeListArray.from_arrays(pa.array(embedding.reshape(-1)), embedding.shape[1])
    columns = {
        "embedding": values,
        "pid": pa.array(table.pid, pa.int64()),
        "camid": pa.array(table.camid, pa.int32()),
        "split": pa.array(list(table.split), pa.string()),
    }
    if len(table.path):
        columns["path"] = pa.array(list(table.path), pa.string())
    sink = io.BytesIO()
    # Embeddings are noise to a compressor and to a dictionary.
    pq.write_table(
        pa.table(columns), sink, row_group_size=ROWS, compression="none", use_dictionary=False
    )
    storage.write(key, sink.getvalue())


class _Ranges(io.RawIOBase):
    """An object of a storage as a seekable file, read by ranges."""

    def __init__(self, storage: Storage, key: str) -> None:
        self._storage, self._key, self._size, self._at = storage, key, storage.size(key), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._size - self._at, 0)
        length = left if size is None or size < 0 else min(size, left)
        data = self._storage.read_range(self._key, self._at, length) if length else b""
        self._at += len(data)
        return data


@dataclass(frozen=True)
class Piece:
    """A row group of a part: what one worker reads at a time.

    Args:
        key: the part.
        group: number of the row group.
        first: number of its first row in the whole.
        rows: how many it has.
    """

    key: str
    group: int
    first: int
    rows: int


@dataclass(frozen=True)
class EmbeddingFiles:
    """Parquet embeddings that stay where they are; only labels are in memory.

    Args:
        url: what was opened.
        storage: where the parts are.
        dimensions: D.
        pieces: all row groups, in order.
        pid, camid, split: (N,) of all rows.
    """

    url: str
    storage: Storage
    dimensions: int
    pieces: tuple[Piece, ...]
    pid: np.ndarray
    camid: np.ndarray
    split: np.ndarray

    @classmethod
    def open(cls, url: str) -> EmbeddingFiles:
        """Read the labels of a Parquet file, or of all parts in a folder.

        Raises:
            DataError: no such file, missing columns, or parts of different dimensions.
        """
        storage, keys = _parts(url)
        pieces, labels, dimensions = [], [], 0
        first = 0
        for key in keys:
            file = _open_part(storage, key)
            width = _dimensions(file, f"{storage.url}/{key}")
            if dimensions and width and width != dimensions:
                raise DataError(
                    f"{storage.url}/{key} has embeddings of {width} dimensions, the parts before "
                    f"it of {dimensions}: were they written by different models?"
                )
            dimensions = dimensions or width
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                pieces.append(Piece(key, group, first, rows))
                first += rows
            with _readable(f"{storage.url}/{key}"):
                labels.append(file.read(columns=list(_LABELS)))
        table = pa.concat_tables(labels, promote_options="permissive")
        for name in _LABELS:
            if table[name].null_count:
                raise DataError(f"{url}: column {name} has missing values")
        pid, camid = (_integers(table[name], f"{url}: column {name}") for name in ("pid", "camid"))
        split = table["split"].to_numpy()
        return cls(url, storage, dimensions, tuple(pieces), pid, camid, split)

    @property
    def labels(self) -> Labels:
        """Identities and cameras of query and gallery. Raises `DataError` if either is empty."""
        query, gallery = self.split == "query", self.split == "gallery"
        return Labels(self.pid[query], self.camid[query], self.pid[gallery], self.camid[gallery])

    def blocks(
        self, split: str, pieces: tuple[Piece, ...] | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """A split's embeddings by stretches: number of the first in the split, (n, D) float32.

        Raises:
            DataError: embeddings of another length, NaN or infinite; says which row.
        """
        before = np.concatenate([[0], np.cumsum(self.split == split)])
        for piece in self.pieces if pieces is None else pieces:
            wanted = self.split[piece.first : piece.first + piece.rows] == split
            if not wanted.any():
                continue
            file, done = _open_part(self.storage, piece.key), 0
            for batch in _batches(file, piece.group, f"{self.storage.url}/{piece.key}"):
                first = piece.first + done
                matrix = _matrix(batch.column(0), self.dimensions, f"{self.url}, row {first}")
                checked_side(f"{self.url}:", matrix, first)
                chosen = matrix[wanted[done : done + len(matrix)]]
                if len(chosen):
                    yield int(before[first]), chosen
                done += len(matrix)

    def stretches(
        self, split: str, first: int, stop: int, size: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """As `blocks`, from image `first` of the split up to `stop`, `size` of them at a time.

        Only the last may be shorter, so that where row groups end makes no difference.
        """
        touched = [
            piece
            for piece, (a, b) in zip(self.pieces, self.edges(split), strict=True)
            if max(a, first) < min(b, stop)
        ]
        at, filled = first, 0
        out = np.empty((min(size, stop - at), self.dimensions), np.float32)
        for start, block in self.blocks(split, tuple(touched)):
            rest = block[max(first - start, 0) : max(stop - start, 0)]
            while len(rest):
                taken = rest[: len(out) - filled]
                out[filled : filled + len(taken)] = taken
                filled, rest = filled + len(taken), rest[len(taken) :]
                if filled == len(out):
                    yield at, out
                    at, filled = at + filled, 0
                    out = np.empty((min(size, stop - at), self.dimensions), np.float32)

    def edges(self, split: str) -> list[tuple[int, int]]:
        """Each piece's images of a split: number of the first, and of the one past the last."""
        before = np.concatenate([[0], np.cumsum(self.split == split)])
        return [(int(before[p.first]), int(before[p.first + p.rows])) for p in self.pieces]

    def read(self, *splits: str) -> np.ndarray:
        """All embeddings of splits, one after another, (n, D) float32."""
        out = np.empty((np.count_nonzero(np.isin(self.split, splits)), self.dimensions), np.float32)
        start = 0
        for split in splits:
            for first, block in self.blocks(split):
                out[start + first : start + first + len(block)] = block
            start += np.count_nonzero(self.split == split)
        pa.default_memory_pool().release_unused()  # which else keeps some row groups' memory
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
    try:
        with np.load(io.BytesIO(storage.read(key)), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except ReidError:
        raise
    except Exception as error:  # what a damaged archive makes NumPy raise has no other base
        raise DataError(f"{url} cannot be read as npz ({error}): is it complete?") from error
    names = [
        f"{side}_{name}" for name in ("embedding", "pid", "camid") for side in ("query", "gallery")
    ]
    if missing := [name for name in names if name not in found]:
        raise DataError(f"{url} has no {', '.join(missing)}; it must have {', '.join(names)}")
    query, gallery, query_pid, gallery_pid, query_camid, gallery_camid = (
        found[name] for name in names
    )
    return query, gallery, Labels(query_pid, query_camid, gallery_pid, gallery_camid)


def _parts(url: str) -> tuple[Storage, list[str]]:
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
    if storage.exists(JOB):
        wanted = [part_key(number) for number in range(_parts_of_job(storage))]
        if missing := sorted(set(wanted) - set(keys)):
            raise DataError(
                f"{url} has {len(wanted) - len(missing)} of {len(wanted)} parts: embed again with "
                "the same command, which goes on with what is missing"
            )
        return storage, wanted
    return storage, keys


def _parts_of_job(storage: Storage) -> int:
    where = f"{storage.url}/{JOB}"
    try:
        return int(json.loads(storage.read(JOB))["parts"])
    except (ValueError, LookupError, TypeError):
        raise DataError(f"{where} does not say how many parts there are: embed again") from None


def _open_part(storage: Storage, key: str) -> pq.ParquetFile:
    where = f"{storage.url}/{key}"
    with _readable(where):
        file = pq.ParquetFile(pa.PythonFile(_Ranges(storage, key), mode="r"))
    names = file.schema_arrow.names
    if missing := [name for name in ("embedding", *_LABELS) if name not in names]:
        raise DataError(f"{where} has no column {', '.join(missing)}; it has {', '.join(names)}")
    return file


def _dimensions(file: pq.ParquetFile, where: str) -> int:
    kind = file.schema_arrow.field("embedding").type
    if pa.types.is_fixed_size_list(kind):
        return kind.list_size
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise DataError(f"{where}: column embedding must hold lists of float32, not {kind}")
    with _readable(where):
        for batch in file.iter_batches(1, columns=["embedding"]):
            return len(batch.column(0)[0])
    return 0


def _batches(file: pq.ParquetFile, group: int, where: str) -> Iterator[pa.RecordBatch]:
    batches = file.iter_batches(ROWS, [group], ["embedding"])
    while True:
        with _readable(where):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """Turn what Arrow says of damaged bytes into a `DataError`."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        raise DataError(f"{where} cannot be read as Parquet ({error}): is it complete?") from error


def _matrix(column: pa.Array, dimensions: int, where: str) -> np.ndarray:
    """Lists as (n, D) float32; rows are counted from `where` in an error."""
    lengths = pc.call_function("list_value_length", [column]).to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero(lengths != dimensions)
    if len(wrong):
        raise DataError(
            f"{where} + {wrong[0]}: an embedding of {lengths[wrong[0]]} dimensions "
            f"where others have {dimensions}"
        )
    values = column.flatten().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(values, np.float32).reshape(-1, dimensions)


def _integers(column: pa.ChunkedArray, what: str) -> np.ndarray:
    if not pa.types.is_integer(column.type):
        raise DataError(f"{what} must hold integers, not {column.type}")
    return column.to_numpy().astype(np.int64)
