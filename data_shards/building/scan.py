"""Read and decode every image of a dataset once, before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from data_shards.building.parallel import parallel_map
from data_shards.errors import DataError
from data_shards.manifest import LeftOut, sha256
from data_shards.progress import Progress, silent
from data_shards.records import ImageRecord

CHUNK = 64  # images in a task


@dataclass(frozen=True, slots=True)
class ScannedImage:
    """A record with what was found in its file."""

    record: ImageRecord
    size: int  # bytes of the file
    sha256: str  # of the file, in hex
    width: int  # pixels
    height: int  # pixels


def scan(
    records: Sequence[ImageRecord], jobs: int, progress: Progress = silent
) -> tuple[list[ScannedImage], list[LeftOut]]:
    """Decode all images in full; return the readable and the unreadable ones, both in order."""
    chunks = [records[i : i + CHUNK] for i in range(0, len(records), CHUNK)]
    sizes, report = [len(chunk) for chunk in chunks], partial(progress, "scanning")
    scanned = parallel_map(_scan_chunk, chunks, jobs, sizes, report)
    results = [result for chunk in scanned for result in chunk]
    good = [result for result in results if isinstance(result, ScannedImage)]
    return good, [result for result in results if isinstance(result, LeftOut)]


def _scan_chunk(records: Sequence[ImageRecord]) -> list[ScannedImage | LeftOut]:
    return [_scan_image(record) for record in records]


def _scan_image(record: ImageRecord) -> ScannedImage | LeftOut:
    from data_shards.decode import decode  # imports OpenCV, which --help does not need

    try:
        data = record.path.read_bytes()
        height, width = decode(data).shape[:2]
    except DataError as error:
        return LeftOut(path=record.relative, reason=str(error))
    except OSError as error:
        return LeftOut(path=record.relative, reason=error.strerror or str(error))
    return ScannedImage(record, len(data), sha256(data), width, height)
