"""Read a sharded dataset back in full and compare it with its manifest and index."""

import json
import tarfile
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data_shards.building.parallel import cores, parallel_map
from data_shards.dataset import Dataset
from data_shards.errors import DataError, ObjectMissing
from data_shards.index import Index
from data_shards.manifest import Origin, ShardInfo
from data_shards.progress import Progress, silent
from data_shards.storage import Storage

Task = tuple[ShardInfo, Index]  # a shard and the images that it should hold


def verify(
    url: str, *, decode_images: bool = False, jobs: int | None = None, progress: Progress = silent
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
    tasks = list[Task]()
    for position, shard in enumerate(dataset.manifest.shards):
        index = dataset.index(shard.split)
        first, end = np.searchsorted(index.shard, [position, position + 1])
        tasks.append((shard, index.select(slice(first, end))))
    check = partial(_check_shard, dataset.storage, dataset.manifest.name, decode_images)
    counts, report = [len(rows) for _, rows in tasks], partial(progress, "verifying")
    problems = parallel_map(check, tasks, jobs or cores(), counts, report)
    return dataset, [problem for of_shard in problems for problem in of_shard]


def _check_shard(storage: Storage, dataset: str, decode_images: bool, task: Task) -> list[str]:
    shard, rows = task
    try:
        size = storage.size(shard.name)
        if size != shard.bytes:
            kind = "truncated" if size < shard.bytes else "too long"
            return [f"{shard.name} is {kind}: {size:,} bytes, not {shard.bytes:,}"]
        with tempfile.TemporaryDirectory(prefix="data-shards-") as folder:
            path = Path(folder, "shard.tar")
            storage.download(shard.name, path, sha256=shard.sha256)
            problems = _problems(path, rows, dataset, shard, decode_images)
            return [f"{shard.name}: {problem}" for problem in problems]
    except ObjectMissing:
        return [f"{shard.name} is missing"]
    except DataError as error:
        return [str(error)]


def _problems(
    path: Path, rows: Index, dataset: str, shard: ShardInfo, decode_images: bool
) -> Iterator[str]:
    """Compare a tar with the index: the same images at the same places, described the same."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
    except tarfile.TarError as error:
        yield f"not a tar file: {error}"
        return
    origin = shard.origin or Origin(dataset=dataset, pid=0, camid=0)
    constant = {"dataset": origin.dataset, "split": shard.split}
    if len(members) != 2 * len(rows):
        yield f"{len(members):,} members, not two for each of its {len(rows):,} images"
        return
    with path.open("rb") as file:
        for row in range(len(rows)):
            image, description = members[2 * row], members[2 * row + 1]
            if (image.offset_data, image.size) != (rows.offset[row], rows.size[row]):
                yield f"{image.name} is not where the index has it"
                continue
            numbers = ("pid", "label", "camid", "width", "height")
            expected = {name: int(getattr(rows, name)[row]) for name in numbers}
            expected["pid"] -= origin.pid
            expected["camid"] -= origin.camid
            file.seek(description.offset_data)
            try:
                found = json.loads(file.read(description.size))
            except ValueError:
                found = None
            if shard.origin is not None and isinstance(found, dict):
                found["label"] = expected["label"]  # that of an earlier version
            if found != expected | constant | {"path": str(rows.path[row])}:
                yield f"{description.name} does not agree with the index"
            if decode_images:
                file.seek(image.offset_data)
                size = (rows.width[row], rows.height[row])
                yield from _undecodable(file.read(image.size), image.name, size)


def _undecodable(data: bytes, name: str, size: tuple[int, int]) -> Iterator[str]:
    from data_shards.loading.decode import decode  # imports OpenCV, which --help does not need

    try:
        height, width = decode(data).shape[:2]
    except DataError as error:
        yield f"{name}: {error}"
        return
    if (width, height) != size:
        yield f"{name} is {width} × {height} pixels, which does not agree with the index"
