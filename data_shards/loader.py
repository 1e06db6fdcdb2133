"""Load planned rows as decoded batches, in worker processes.

A worker makes whole batches: it reads each image by offset from the cached shard and decodes it
into shared memory, so that uint8 pixels leave it without a copy. The order is that of the plan for
any number of workers. Flipping, cropping, erasing and normalising happen later, on the device.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader

from data_shards.cache import CacheStats, ShardCache
from data_shards.dataset import Dataset
from data_shards.decode import decode_into
from data_shards.errors import ConfigError, DataError, ReidError, StorageError
from data_shards.manifest import Index, ShardInfo
from data_shards.storage.atomic import disk_errors

AHEAD = 2  # batches queued for each worker
HELD = 4  # batches that the consumer may hold, including the one being handed over


@dataclass(frozen=True)
class Batch:
    """Resized images, otherwise as stored, with their entries in the index.

    Attributes:
        image: (B, H, W, 3) uint8, RGB.
        label: (B,) int64, training label, -1 outside train.
        pid: (B,) int64, identity.
        camid: (B,) int64, camera.
        row: (B,) int64, row in the split's index.
    """

    image: torch.Tensor
    label: torch.Tensor
    pid: torch.Tensor
    camid: torch.Tensor
    row: torch.Tensor

    def image_on(self, device: torch.device) -> torch.Tensor:
        """The images on a device; copied to a GPU from pinned memory, without waiting."""
        image = self.image.pin_memory() if device.type == "cuda" else self.image
        return image.to(device, non_blocking=True)


def train_batches(
    dataset: Dataset,
    cache: ShardCache,
    rows: np.ndarray,
    *,
    start: int = 0,
    height: int,
    width: int,
    workers: int,
) -> Iterator[Batch]:
    """Yield the batches of a plan, or of one rank's slice of it, from step `start` on.

    Args:
        dataset: its train split is read.
        cache: of the dataset's shards.
        rows: (S, B) int64 rows of `dataset.index("train")`.
        start: the first step to yield; those before it are not read.
        height: H, pixels.
        width: W, pixels.
        workers: worker processes; 0 decodes in this one.

    Yields:
        S - start batches of B images.

    Raises:
        ConfigError: the cache is too small for one step, or `start` is out of range.
        DataError: an image or a shard is damaged.
        StorageError: the storage or the cache's disk failed.
    """
    if not 0 <= start <= len(rows):
        raise ConfigError(f"cannot start at step {start}: the epoch has {len(rows)}")
    return _batches(dataset, cache, "train", list(rows[start:]), (height, width), workers)


def split_batches(
    dataset: Dataset,
    cache: ShardCache,
    split: str,
    *,
    rank: int = 0,
    world: int = 1,
    batch: int,
    height: int,
    width: int,
    workers: int,
) -> Iterator[Batch]:
    """Yield one rank's images of a split, each exactly once over all ranks, in index order.

    Args:
        dataset: to read from.
        cache: of the dataset's shards.
        split: one of `SPLITS`.
        rank: 0..world-1; each rank gets a contiguous range of rows.
        world: number of ranks.
        batch: B, images in a batch; the last batch is smaller if need be, without padding.
        height: H, pixels.
        width: W, pixels.
        workers: worker processes; 0 decodes in this one.

    Yields:
        Batches of at most B images; no batch if the rank's range is empty.

    Raises:
        ConfigError, DataError, StorageError: as `train_batches` does.
    """
    if batch < 1 or not 0 <= rank < world:
        raise ConfigError(f"cannot make batches of {batch} for rank {rank} of {world}")
    total = len(dataset.index(split))
    rows = np.arange(total * rank // world, total * (rank + 1) // world)
    return row_batches(
        dataset, cache, split, rows, batch=batch, height=height, width=width, workers=workers
    )


def row_batches(
    dataset: Dataset,
    cache: ShardCache,
    split: str,
    rows: np.ndarray,
    *,
    batch: int,
    height: int,
    width: int,
    workers: int,
) -> Iterator[Batch]:
    """Yield the given (n,) rows of a split's index, in their order; else like `split_batches`."""
    steps = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    return _batches(dataset, cache, split, steps, (height, width), workers)


def _batches(
    dataset: Dataset,
    cache: ShardCache,
    split: str,
    steps: list[np.ndarray],
    size: tuple[int, int],
    workers: int,
) -> Iterator[Batch]:
    index, shards = dataset.index(split), dataset.manifest.shards
    ahead = None if cache.in_place else Lookahead(index, shards, steps, cache.max_bytes)
    workers = min(workers, len(steps), os.cpu_count() or 1)
    count, most = min(AHEAD * workers + HELD, len(steps)), max(map(len, steps), default=0)
    slots = _Slots((count, most, *size, 3), shared=workers > 0)
    loader = DataLoader(
        _Decoder(cache, shards, slots.memory),  # pyright: ignore[reportArgumentType]
        batch_size=None,
        sampler=(_Job.of(index, rows, slots.take()) for rows in steps),  # pyright: ignore[reportArgumentType]
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        generator=torch.Generator(),  # the default one would advance the training's
    )
    made = iter(loader)  # forks the workers; fork before starting a thread
    try:
        for step, rows in enumerate(steps):
            if ahead is not None and (wanted := ahead.advance(step)) is not None:
                cache.prefetch(wanted)
            result = next(made)
            if isinstance(result, ReidError):
                raise result
            image = slots.lend(result.image, len(rows))
            if workers:
                cache.stats.add(result.stats)
            label, pid, camid = (_int64(c[rows]) for c in (index.label, index.pid, index.camid))
            yield Batch(image, label, pid, camid, _int64(rows))
    finally:
        cache.prefetch(())
        del made  # ends the workers now: the traceback of an error would keep them alive


def _int64(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64))


def _as_it_is(value: object) -> object:
    return value


class _Slots:
    """Memory for batches; a slot is reused as soon as its last batch is no longer referenced.

    Fresh memory for every batch would cost the workers as much time as decoding: the system has to
    find, clear and map each page.
    """

    def __init__(self, shape: tuple[int, ...], *, shared: bool) -> None:
        self.memory = torch.empty(shape, dtype=torch.uint8)
        if shared:
            try:
                self.memory.share_memory_()
            except RuntimeError as error:
                raise StorageError(
                    f"cannot get {self.memory.nbytes:,} bytes of shared memory for batches"
                    f" ({error}): enlarge /dev/shm (in a container: --shm-size), or lower"
                    " --loader.workers"
                ) from None
        self.free = list(range(len(self.memory)))

    def take(self) -> int | None:
        """Take a slot to fill; None while the consumer holds too many batches."""
        return self.free.pop() if self.free else None

    def lend(self, made: int | torch.Tensor, images: int) -> torch.Tensor:
        """The batch in a slot. The slot is free again when all views of the tensor are gone."""
        if isinstance(made, torch.Tensor):
            return made
        array = self.memory[made, :images].numpy()
        weakref.finalize(array, self.free.append, made).atexit = False
        return torch.from_numpy(array)


@dataclass(frozen=True)
class _Job:
    """What a worker needs to make a batch, so that it needs no index."""

    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    path: np.ndarray
    slot: int | None

    @classmethod
    def of(cls, index: Index, rows: np.ndarray, slot: int | None) -> _Job:
        columns = (index.shard, index.offset, index.size, index.path)
        return cls(*(column[rows] for column in columns), slot=slot)


@dataclass(frozen=True)
class _Made:
    """A worker's answer: the slot that it filled, or a tensor if it was given no slot."""

    image: int | torch.Tensor
    stats: CacheStats


class _Decoder:
    """Decodes batches; runs in the workers."""

    def __init__(
        self, cache: ShardCache, shards: tuple[ShardInfo, ...], memory: torch.Tensor
    ) -> None:
        self.cache = cache
        self.shards = shards
        self.memory = memory

    def __getitem__(self, job: _Job) -> _Made | ReidError:
        if self.memory.is_shared():  # in a worker process
            # Not the forked cache: another thread may have held its lock at the fork.
            cache = ShardCache(self.cache.storage, self.cache.folder, self.cache.max_bytes)
        else:
            cache = self.cache
        if job.slot is None:
            image = torch.empty((len(job.shard), *self.memory.shape[2:]), dtype=torch.uint8)
        else:
            image = self.memory[job.slot, : len(job.shard)]
        try:
            with disk_errors(cache.folder):
                self._decode(job, cache, image.numpy())
        except ReidError as error:
            # Returned, because torch wraps what a worker raises in another message.
            return error
        return _Made(image if job.slot is None else job.slot, cache.stats)

    def _decode(self, job: _Job, cache: ShardCache, pixels: np.ndarray) -> None:
        files = dict[int, int]()
        try:
            for position in np.unique(job.shard).tolist():
                files[position] = cache.open(self.shards[position])
            for i, position in enumerate(job.shard.tolist()):
                try:
                    self._decode_one(job, i, cache, files, pixels[i])
                except DataError as error:
                    raise DataError(
                        f"{job.path[i]} (byte {job.offset[i]} of {self.shards[position].name} in"
                        f" {cache.storage.url}): {error}; see `python -m data_shards verify`"
                    ) from None
        finally:
            for file in files.values():
                os.close(file)

    def _decode_one(
        self, job: _Job, i: int, cache: ShardCache, files: dict[int, int], out: np.ndarray
    ) -> None:
        position = int(job.shard[i])
        try:
            decode_into(self._read(files[position], job, i), out)
        except DataError:
            another = cache.reopen(self.shards[position], files[position])
            if another is None:
                raise
            os.close(files[position])
            files[position] = another
            decode_into(self._read(another, job, i), out)

    def _read(self, file: int, job: _Job, i: int) -> bytes:
        data = os.pread(file, job.size[i], job.offset[i])
        if len(data) != job.size[i]:
            raise DataError("the shard ends inside it")
        return data


class Lookahead:
    """Which shards to keep on disk: those of the next steps, as many steps as fit."""

    def __init__(
        self, index: Index, shards: Sequence[ShardInfo], steps: list[np.ndarray], room: int
    ) -> None:
        self.shards = shards
        self.needs = [np.unique(index.shard[rows]).tolist() for rows in steps]
        self.uses: dict[int, int] = {}  # of each shard in steps begin..end, in order of first use
        self.begin = self.end = 0
        self.room = room
        most = max((sum(shards[i].bytes for i in need) for need in self.needs), default=0)
        if most > room:
            raise ConfigError(
                f"--loader.cache-bytes is {room:,}, but one step reads shards of {most:,} bytes:"
                " increase it, or lower --batch.window"
            )

    def advance(self, step: int) -> list[ShardInfo] | None:
        """The shards from `step` on in order of first use; None if no step was added."""
        for shard in (i for need in self.needs[self.begin : step] for i in need):
            self.uses[shard] -= 1
            if not self.uses[shard]:
                del self.uses[shard]
                self.room += self.shards[shard].bytes
        self.begin = step
        before = self.end
        while self.end < len(self.needs):
            need = self.needs[self.end]
            new = [i for i in need if i not in self.uses]
            if (bytes_ := sum(self.shards[i].bytes for i in new)) > self.room:
                break
            self.room -= bytes_
            for shard in need:
                self.uses[shard] = self.uses.get(shard, 0) + 1
            self.end += 1
        return [self.shards[i] for i in self.uses] if self.end > before else None
