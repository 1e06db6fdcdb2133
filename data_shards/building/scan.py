"""Reading and decoding every image of a dataset once, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_shards.building.parallel import parallel_map
from data_shards.decode import decode
from data_shards.errors import DataError
from data_shards.manifest import LeftOut, sha256
from data_shards.progress import Progress
from data_shards.records import ImageRecord

CHUNK = 64  # images a task


@dataclass(frozen=True, slots=True)
class SurveyedImage:
    """A record whose image was read and decoded.

    Attributes:
        record: what the source says of it.
        size: bytes of the file.
        sha256: of the file, in hex.
        width: pixels.
        height: pixels.
    """

    record: ImageRecord
    size: int
    sha256: str
    width: int
    height: int


def survey(
    records: Sequence[ImageRecord], jobs: int, progress: Progress
) -> tuple[list[SurveyedImage], list[LeftOut]]:
    """Decode all images in full.

    Args:
        records: the images.
        jobs: processes.
        progress: called with ("decoding", images done, images in all).

    Returns:
        The readable ones and the others, both in the records' order.
    """
    chunks = [records[i : i + CHUNK] for i in range(0, len(records), CHUNK)]
    good, bad = list[SurveyedImage](), list[LeftOut]()
    progress("decoding", 0, len(records))
    for results in parallel_map(_survey_chunk, chunks, jobs):
        for result in results:
            (good if isinstance(result, SurveyedImage) else bad).append(result)  # type: ignore
        progress("decoding", len(good) + len(bad), len(records))
    return good, bad


def _survey_chunk(records: Sequence[ImageRecord]) -> list[SurveyedImage | LeftOut]:
    return [_survey_image(record) for record in records]


def _survey_image(record: ImageRecord) -> SurveyedImage | LeftOut:
    try:
        data = record.path.read_bytes()
        height, width = decode(data).shape[:2]
    except DataError as error:
        return LeftOut(path=record.relative, reason=str(error))
    except OSError as error:
        return LeftOut(path=record.relative, reason=error.strerror or str(error))
    return SurveyedImage(record, len(data), sha256(data), width, height)
