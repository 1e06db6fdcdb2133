"""Read a sharded dataset back in full and compare it with its manifest and index."""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data_shards.building.parallel import cores, parallel_map
from data_shards.dataset import Dataset
from data_shards.errors import DataError, ObjectMissing
from data_shards.manifest import Index, ShardInfo
from data_shards.progress import Progress, silent
from data_shards.storage import Storage


@dataclass(frozen=True)
class _Task:
    shard: ShardInfo
    dataset: str
    rows: Index


def verify(
    url: str,
    *,
    decode_images: bool = False,
    jobs: int | None = None,
    progress: Progress = silent,
) -> tuple[Dataset, list[str]]:
    """Check every shard's bytes and members, and its images if asked to.

    Args:
        url: where the dataset is.
        decode_images: decode each image too.
        jobs: processes; by default one per core.
        progress: called with the stage "verifying" and counts of images.

    Returns:
        The dataset, and one line for each problem in any of its shards.

    Raises:
        DataError: the manifest or the index itself is wrong.
        StorageError: the storage cannot be reached.
    """
    dataset = Dataset.open(url)
    tasks = []
    for position, shard in enumerate(dataset.manifest.shards):
        index = dataset.index(shard.split)
        rows = index.select(np.flatnonzero(index.shard == position))
        tasks.append(_Task(shard, dataset.manifest.name, rows))
    check = partial(_check_shard, dataset.storage, decode_images)
    problems, done, total = list[str](), 0, sum(len(task.rows) for task in tasks)
    progress("verifying", 0, total)
    for task, found in zip(tasks, parallel_map(check, tasks, jobs or cores()), strict=True):
        problems += found
        done += len(task.rows)
        progress("verifying", done, total)
    return dataset, problems


def _check_shard(storage: Storage, decode_images: bool, task: _Task) -> list[str]:
    shard = task.shard
    try:
        size = storage.size(shard.name)
        if size != shard.bytes:
            kind = "truncated" if size < shard.bytes else "too long"
            return [f"{shard.name} is {kind}: {size:,} bytes, not {shard.bytes:,}"]
        with tempfile.TemporaryDirectory(prefix="data-shards-") as folder:
            path = Path(folder, "shard.tar")
            storage.download(shard.name, path, sha256=shard.sha256)
            return [f"{shard.name}: {problem}" for problem in _problems(path, task, decode_images)]
    except ObjectMissing:
        return [f"{shard.name} is missing"]
    except DataError as error:
        return [str(error)]


def _problems(path: Path, task: _Task, decode_images: bool) -> Iterator[str]:
    """Compare a tar with the index: the same images at the same places, described the same."""
    rows = task.rows
    try:
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
    except tarfile.TarError as error:
        yield f"not a tar file: {error}"
        return
    if len(members) != 2 * len(rows):
        yield f"{len(members):,} members, not two for each of its {len(rows):,} images"
        return
    with path.open("rb") as file:
        for row in range(len(rows)):
            image, description = members[2 * row], members[2 * row + 1]
            if (image.offset_data, image.size) != (rows.offset[row], rows.size[row]):
                yield f"{image.name} is not where the index has it"
                continue
            file.seek(image.offset_data)
            data = file.read(image.size)
            file.seek(description.offset_data)
            if _parsed(file.read(description.size)) != _expected(task, row):
                yield f"{description.name} does not agree with the index"
            if decode_images:
                yield from _undecodable(data, image.name, rows, row)


def _parsed(data: bytes) -> object:
    try:
        return json.loads(data)
    except ValueError:
        return None


def _expected(task: _Task, row: int) -> dict[str, int | str]:
    rows = task.rows
    numbers = {c: int(getattr(rows, c)[row]) for c in ("pid", "label", "camid", "width", "height")}
    texts = {"dataset": task.dataset, "split": task.shard.split, "path": str(rows.path[row])}
    return numbers | texts


def _undecodable(data: bytes, name: str, rows: Index, row: int) -> Iterator[str]:
    from data_shards.decode import decode  # imports OpenCV, which --help does not need

    try:
        height, width = decode(data).shape[:2]
    except DataError as error:
        yield f"{name}: {error}"
        return
    if (width, height) != (rows.width[row], rows.height[row]):
        yield f"{name} is {width} × {height} pixels, which does not agree with the index"
