"""Read and decode every image of a dataset once, before anything is written."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from data_shards.building.parallel import Cluster, parallel_map
from data_shards.errors import DataError, ObjectMissing
from data_shards.manifest import LeftOut, sha256
from data_shards.progress import Progress, silent
from data_shards.records import ImageRecord

T = TypeVar("T")
R = TypeVar("R")

CHUNK = 64  # images in a task, and the most that a process holds at a time
THREADS = 8  # of a process that reads objects: most of the time is waiting


@dataclass(frozen=True, slots=True)
class ScannedImage:
    """A record with what was found in its file."""

    record: ImageRecord
    size: int  # bytes of the file
    sha256: str  # of the file, in hex; empty if it was checked otherwise
    width: int  # pixels
    height: int  # pixels


def scan(
    records: Sequence[ImageRecord],
    jobs: int,
    progress: Progress = silent,
    cluster: Cluster | None = None,
) -> tuple[list[ScannedImage], list[LeftOut]]:
    """Decode all images in full; return the readable and the unreadable ones, both in order."""
    chunks = [records[i : i + CHUNK] for i in range(0, len(records), CHUNK)]
    sizes, report = [len(chunk) for chunk in chunks], partial(progress, "scanning")
    scanned = parallel_map(_scan_chunk, chunks, jobs, sizes, report, cluster)
    results = [result for chunk in scanned for result in chunk]
    good = [result for result in results if isinstance(result, ScannedImage)]
    return good, [result for result in results if isinstance(result, LeftOut)]


def for_each(function: Callable[[T], R], items: Sequence[T], *, local: bool) -> Iterator[R]:
    """Yield the results in order; what is not on this machine is read by several threads."""
    if local:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(items), CHUNK):
            yield from pool.map(function, items[start : start + CHUNK])


def scan_bytes(record: ImageRecord, data: bytes) -> ScannedImage | LeftOut:
    """Decode an image in full."""
    from data_shards.loading.decode import decode  # imports OpenCV, which --help does not need

    if not data:
        return LeftOut(path=record.relative, reason="it is empty")
    try:
        height, width = decode(data).shape[:2]
    except DataError as error:
        return LeftOut(path=record.relative, reason=str(error))
    return ScannedImage(record, len(data), sha256(data), width, height)


def _scan_chunk(records: Sequence[ImageRecord]) -> list[ScannedImage | LeftOut]:
    local = all(isinstance(record.path, Path) for record in records)
    return list(for_each(_scan_image, records, local=local))


def _scan_image(record: ImageRecord) -> ScannedImage | LeftOut:
    try:
        return scan_bytes(record, record.path.read_bytes())
    except ObjectMissing as error:
        return LeftOut(path=record.relative, reason=str(error))
    except OSError as error:
        return LeftOut(path=record.relative, reason=error.strerror or str(error))
