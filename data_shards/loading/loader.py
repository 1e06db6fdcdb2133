"""Load planned rows as decoded batches, in worker processes.

A worker makes whole batches: it reads each image by offset from the cached shard and decodes it
into shared memory, so that uint8 pixels leave it without a copy. The order is that of the plan for
any number of workers. Flipping, cropping, erasing and normalising happen later, on the device
(`on_device.py` copies batches there).
"""

import os
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np
import torch
from torch.utils.data import DataLoader

from data_shards.cache import ShardCache
from data_shards.dataset import Dataset
from data_shards.errors import ConfigError, DataError, ReidError, StorageError
from data_shards.index import Index
from data_shards.loading.decode import decode_into
from data_shards.manifest import ShardInfo
from data_shards.storage.atomic import disk_errors

AHEAD = 2  # batches queued for each worker
_NO_PATHS = np.empty(0, object)  # workers need no paths, and reading them takes time
HELD = 4  # batches that the consumer may hold, including the one being handed over


@dataclass(frozen=True)
class Batch:
    """Resized images, otherwise as stored, with their entries in the index."""

    image: torch.Tensor  # (B, H, W, 3) uint8, RGB
    label: torch.Tensor  # (B,) int64, training label, -1 outside train
    row: torch.Tensor  # (B,) int64, row in the split's index


def train_batches(
    dataset: Dataset,
    cache: ShardCache,
    rows: np.ndarray,
    *,
    start: int = 0,
    height: int,
    width: int,
    workers: int,
    decoders: "Decoders | None" = None,
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
        decoders: worker processes that are there already, for images of this size.

    Yields:
        S - start batches of B images.

    Raises:
        ConfigError: the cache is too small for one step, or `start` is out of range.
        DataError: an image or a shard is damaged.
        StorageError: the storage or the cache's disk failed.
    """
    if not 0 <= start <= len(rows):
        raise ConfigError(f"cannot start at step {start}: the epoch has {len(rows)}")
    steps = list(rows[start:])
    return _batches(dataset, cache, "train", steps, (height, width), workers, decoders)


def split_batches(
    dataset: Dataset,
    cache: ShardCache,
    split: str,
    rows: np.ndarray | None = None,
    *,
    rank: int = 0,
    world: int = 1,
    batch: int,
    height: int,
    width: int,
    workers: int,
    decoders: "Decoders | None" = None,
) -> Iterator[Batch]:
    """Yield one rank's images of a split, each exactly once over all ranks, in index order.

    Args:
        dataset, cache, height, width, workers, decoders: as in `train_batches`.
        split: one of `SPLITS`.
        rows: (n,) rows of the split's index; by default all.
        rank: 0..world-1; each rank gets a contiguous range of rows.
        world: number of ranks.
        batch: B, images in a batch; the last batch is smaller if need be, without padding.

    Yields:
        Batches of at most B images; no batch if the rank's range is empty.
    """
    if batch < 1 or not 0 <= rank < world:
        raise ConfigError(f"cannot make batches of {batch} for rank {rank} of {world}")
    rows = np.arange(len(dataset.index(split))) if rows is None else rows
    mine = rows[len(rows) * rank // world : len(rows) * (rank + 1) // world]
    steps = [mine[i : i + batch] for i in range(0, len(mine), batch)]
    return _batches(dataset, cache, split, steps, (height, width), workers, decoders)


def _batches(
    dataset: Dataset,
    cache: ShardCache,
    split: str,
    steps: list[np.ndarray],
    size: tuple[int, int],
    workers: int,
    decoders: "Decoders | None",
) -> Iterator[Batch]:
    index, shards = dataset.index(split), dataset.manifest.shards
    ahead = repeat(None) if cache.in_place else _ahead(index, shards, steps, cache.max_bytes)
    kept, most = decoders is not None, max(map(len, steps), default=0)
    if decoders is None:
        decoders = Decoders(cache, shards, most, *size, workers=min(workers, len(steps)))
    # Forks the workers, if they are new; fork before starting a thread.
    bare = (replace(index.select(rows), path=_NO_PATHS) for rows in steps)
    made = decoders.start(bare)
    try:
        for rows, wanted in zip(steps, ahead, strict=False):
            if wanted is not None:
                cache.prefetch(wanted)
            result = next(made)
            if isinstance(result, _Unreadable):
                position, what = result.args
                raise DataError(f"{index.path[rows[position]]} {what}")
            if isinstance(result, ReidError):
                raise result
            numbers = (torch.from_numpy(c.astype(np.int64)) for c in (index.label[rows], rows))
            yield Batch(decoders.slots.lend(result, len(rows)), *numbers)
    finally:
        cache.prefetch(())
        del made
        if not kept:
            decoders.close()


class Decoders:
    """Worker processes that decode batches, kept from one epoch or split to the next.

    They serve one iterator of batches at a time, and end with `close`.

    Args:
        cache: of the dataset's shards.
        shards: all shards of the dataset.
        batch: most images of a batch.
        height, width: size of the images, pixels.
        workers: worker processes, at most one for each core; 0 decodes in this process.
    """

    def __init__(
        self,
        cache: ShardCache,
        shards: Sequence[ShardInfo],
        batch: int,
        height: int,
        width: int,
        *,
        workers: int,
    ) -> None:
        self.workers = min(workers, os.cpu_count() or 1)
        memory = (AHEAD * self.workers + HELD, batch, height, width, 3)
        self.slots = _Slots(memory, shared=self.workers > 0)
        self._images: Iterator[Index] = iter(())
        self._loader = DataLoader(
            _Decoder(cache, tuple(shards), self.slots.memory),  # pyright: ignore[reportArgumentType]
            batch_size=None,
            sampler=self,  # pyright: ignore[reportArgumentType]
            num_workers=self.workers,
            prefetch_factor=AHEAD if self.workers else None,
            persistent_workers=self.workers > 0,
            generator=torch.Generator(),  # the default one would advance the training's
        )

    def start(self, images: Iterator[Index]) -> Iterator[int | torch.Tensor | ReidError]:
        """Decode batches of images, in order; what an earlier iterator left over is dropped."""
        self._images = images
        return iter(self._loader)

    def close(self) -> None:
        """End the workers now: the traceback of an error would keep them alive."""
        del self._loader

    def __iter__(self) -> Iterator[tuple[Index, int | None]]:
        """Yield what the workers are sent: images, and a slot for them."""
        self.slots.reclaim()  # by now no worker has a job of an earlier iterator
        return ((images, self.slots.take()) for images in self._images)


def _ahead(
    index: Index, shards: Sequence[ShardInfo], steps: list[np.ndarray], room: int
) -> Iterator[list[ShardInfo] | None]:
    """Yield the shards to keep on disk at each step: those of the next steps, as many as fit.

    They are in the order of first use; None stands for those of the step before, or fewer.
    """
    needs = [np.unique(index.shard[rows]).tolist() for rows in steps]
    most = max((sum(shards[i].bytes for i in need) for need in needs), default=0)
    if most > room:
        raise ConfigError(
            f"--loader.cache-bytes is {room:,}, but one step reads shards of {most:,} bytes:"
            " increase it, or lower --batch.window"
        )
    uses, end = Counter[int](), 0  # of each shard in the steps up to `end`, in order of first use
    for step in range(len(needs)):
        before = end
        while end < len(needs):
            added = sum(shards[i].bytes for i in needs[end] if i not in uses)
            if added > room:
                break
            room -= added
            uses.update(needs[end])
            end += 1
        yield [shards[i] for i in uses] if end > before else None
        uses.subtract(needs[step])
        for shard in [i for i in needs[step] if not uses[i]]:
            del uses[shard]
            room += shards[shard].bytes


class _Slots:
    """Memory for batches; a slot is reused as soon as its last batch is no longer referenced.

    Fresh memory for every batch would cost the workers as much time as decoding.
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
        self._filling: set[int] = set()

    def take(self) -> int | None:
        """Take a slot to fill; None while the consumer holds too many batches."""
        if not self.free:
            return None
        self._filling.add(slot := self.free.pop())
        return slot

    def reclaim(self) -> None:
        """Free the slots that were taken and never lent."""
        self.free += self._filling
        self._filling.clear()

    def lend(self, made: int | torch.Tensor, images: int) -> torch.Tensor:
        """The batch in a slot. The slot is free again when all views of the tensor are gone."""
        if isinstance(made, torch.Tensor):
            return made
        self._filling.discard(made)
        array = self.memory[made, :images].numpy()
        weakref.finalize(array, self.free.append, made).atexit = False
        return torch.from_numpy(array)


class _Unreadable(DataError):
    """An image that cannot be decoded, by its position in the batch, and why."""


@dataclass(frozen=True)
class _Decoder:
    """Decodes batches into slots, or into a tensor if it is given none; runs in the workers."""

    cache: ShardCache
    shards: tuple[ShardInfo, ...]
    memory: torch.Tensor

    def __getitem__(self, job: tuple[Index, int | None]) -> int | torch.Tensor | ReidError:
        images, slot = job
        cache = self.cache
        if self.memory.is_shared():  # in a worker process
            # Not the forked cache: another thread may have held its lock at the fork.
            cache = ShardCache(cache.storage, cache.folder, cache.max_bytes)
        if slot is None:
            out = torch.empty((len(images), *self.memory.shape[2:]), dtype=torch.uint8)
        else:
            out = self.memory[slot, : len(images)]
        try:
            with disk_errors(cache.folder):
                self._decode(images, cache, out.numpy())
        except ReidError as error:
            # Returned, because torch wraps what a worker raises in another message.
            return error
        return out if slot is None else slot

    def _decode(self, images: Index, cache: ShardCache, pixels: np.ndarray) -> None:
        files = dict[int, int]()
        try:
            for position in np.unique(images.shard).tolist():
                files[position] = cache.open(self.shards[position])
            for i, position in enumerate(images.shard.tolist()):
                shard, place = self.shards[position], (images.size[i], images.offset[i])
                try:
                    try:
                        _decode_at(files[position], *place, pixels[i])
                    except DataError:
                        another = cache.reopen(shard, files[position])
                        if another is None:
                            raise
                        os.close(files[position])
                        files[position] = another
                        _decode_at(another, *place, pixels[i])
                except DataError as error:
                    raise _Unreadable(
                        i,
                        f"(byte {images.offset[i]} of {shard.name} in {cache.storage.url}):"
                        f" {error}; see `python -m data_shards verify`",
                    ) from None
        finally:
            for file in files.values():
                os.close(file)


def _decode_at(file: int, size: int, offset: int, out: np.ndarray) -> None:
    data = os.pread(file, size, offset)
    if len(data) != size:
        raise DataError("the shard ends inside it")
    decode_into(data, out)
