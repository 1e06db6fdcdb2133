"""The gallery that `search` ranks: shards, a folder of images, or embeddings that are there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from data_shards.building.parallel import cores
from data_shards.cache import ShardCache
from data_shards.dataset import Dataset
from data_shards.errors import ConfigError, DataError
from data_shards.images import ImageFolder, open_images, warn_left_out
from data_shards.index_file import Paths
from data_shards.loading.decode import decode
from data_shards.loading.loader import Batch, split_batches
from data_shards.manifest import LeftOut, Names
from data_shards.progress import Progress, silent
from data_shards.records import NO_CAMERA
from data_shards.storage import open_storage
from reid_train.commands.runtime import Runtime
from reid_train.config import LOADERS, LoaderConfig
from reid_train.evaluation.embedding_store import JOB, ROWS, SUFFIX, EmbeddingFiles


class Block(NamedTuple):
    """Some rows of a gallery, and their embeddings."""

    rows: np.ndarray  # (n,) int64
    embedding: np.ndarray  # (n, D) float32


@dataclass(frozen=True)
class Gallery:
    """One split of a dataset, a folder of images, or a split of embeddings.

    `pictures` has the images of a gallery of embeddings, if a person gave them.
    """

    source: Dataset | ImageFolder | EmbeddingFiles
    split: str
    path: np.ndarray | Paths  # (G,) strings; empty ones where not known
    camid: np.ndarray  # (G,) integers; from `NO_CAMERA` up they are not known
    pid: np.ndarray  # (G,) integers; negative where not known
    pictures: Dataset | ImageFolder | None = None

    def __len__(self) -> int:
        return len(self.path)

    @property
    def names(self) -> Names:
        """The names of people and cameras, as far as a dataset has them."""
        images = self.pictures if isinstance(self.source, EmbeddingFiles) else self.source
        return (isinstance(images, Dataset) and images.manifest.names) or Names()

    def picture(self, row: int) -> np.ndarray | None:
        """An image, (H, W, 3) uint8; None for embeddings whose images are not at hand."""
        if isinstance(self.source, EmbeddingFiles):
            return None if self.pictures is None else _find(self.pictures, self.path[row])
        return _read(self.source, self.split, row)


def gallery_of(dataset: Dataset, split: str) -> Gallery:
    """One split of a dataset."""
    index = dataset.index(split)
    return Gallery(dataset, split, index.path, index.camid, index.pid)


def open_gallery(url: str, split: str, images: str | None = None) -> Gallery:
    """Open what is at `url`; of a gallery of embeddings, `images` is where their images are.

    Raises:
        DataError: there is nothing to search, or no image in this split.
    """
    if _has_embeddings(url):
        files = EmbeddingFiles.open(url)
        rows = np.flatnonzero(files.split == split)
        path = files.paths()
        pictures = open_images(images) if images else None
        gallery = Gallery(files, split, path[rows], files.camid[rows], files.pid[rows], pictures)
    elif images is not None:
        raise ConfigError("--images goes with a gallery of embeddings: this one has its images")
    elif isinstance(source := open_images(url), Dataset):
        gallery = gallery_of(source, split)
    else:
        count = len(source.path)
        unknown = np.full(count, NO_CAMERA), np.full(count, -1)
        gallery = Gallery(source, split, source.path, *unknown)
    if not len(gallery):
        raise DataError(f"{url} has no images in its split {split}: choose another with --split")
    return gallery


def blocks(
    gallery: Gallery, runtime: Runtime, loader: LoaderConfig, progress: Progress = silent
) -> Iterator[Block]:
    """Yield the gallery's embeddings: those that are there, or made now.

    Unreadable images of a folder are left out, and named in a warning.

    Raises:
        DataError: the embeddings are another model's.
    """
    source, total = gallery.source, len(gallery)
    if isinstance(source, EmbeddingFiles):
        _check_model(source, runtime)
        for first, embedding in source.blocks(gallery.split, 0, total, ROWS):
            yield Block(np.arange(first, first + len(embedding)), embedding)
            progress("reading embeddings", first + len(embedding), total)
        return
    left_out: list[LeftOut] = []
    done = 0
    for rows, embedding in _embedded(_batches(gallery, runtime, loader, left_out), runtime):
        done += len(rows)
        progress("embedding", done + len(left_out), total)
        yield Block(rows, embedding)
    progress("embedding", total, total)
    if isinstance(source, ImageFolder):
        warn_left_out(source, left_out)
    if not done:
        raise DataError(f"none of the {total:,} images at {source.url} can be read")


def _has_embeddings(url: str) -> bool:
    if url.endswith(".npz"):
        raise ConfigError(f"{url}: a gallery of embeddings is a Parquet file or a folder of parts")
    return url.endswith(SUFFIX) or next(open_storage(url).list("part-"), None) is not None


def _batches(
    gallery: Gallery, runtime: Runtime, loader: LoaderConfig, left_out: list[LeftOut]
) -> Iterator[Batch]:
    source = gallery.source
    size: dict[str, Any] = {
        "batch": runtime.batch,
        "height": runtime.height,
        "width": runtime.width,
    }
    if isinstance(source, ImageFolder):
        return source.batches(range(len(gallery)), left_out, **size)
    assert isinstance(source, Dataset)
    cache = ShardCache(source.storage, *loader.node_cache)
    # No Ray, whose nodes' cores the default would divide.
    workers = min(cores(), LOADERS) if loader.workers is None else loader.workers
    return split_batches(source, cache, gallery.split, None, workers=workers, **size)


def _embedded(batches: Iterable[Batch], runtime: Runtime) -> Iterator[Block]:
    """Embeddings of batches, at least ROWS images at a time: ranking a few costs as much."""
    rows, parts, waiting = [], [], 0
    for batch in batches:
        rows.append(batch.row.numpy())
        parts.append(runtime(batch.image.numpy()))
        waiting += len(rows[-1])
        if waiting >= ROWS:
            yield Block(np.concatenate(rows), np.concatenate(parts))
            rows, parts, waiting = [], [], 0
    if waiting:
        yield Block(np.concatenate(rows), np.concatenate(parts))


def _check_model(files: EmbeddingFiles, runtime: Runtime) -> None:
    """Raise `DataError` for embeddings of another model, as far as they tell."""
    if files.dimensions != runtime.embedding_size:
        raise DataError(
            f"{files.url} has embeddings of {files.dimensions:,} dimensions, and this model gives "
            f"{runtime.embedding_size:,}: embed the gallery again with this model"
        )
    if files.storage.exists(JOB):
        weights = json.loads(files.storage.read(JOB)).get("weights")
        if weights not in (None, runtime.weights):
            raise DataError(
                f"{files.url} has embeddings of another model: embed the gallery again with this "
                "one"
            )


def _read(images: Dataset | ImageFolder, split: str, row: int) -> np.ndarray:
    if isinstance(images, ImageFolder):
        return decode(images.read(row))
    return decode(images.read(images.index(split), row))


def _find(images: Dataset | ImageFolder, path: str) -> np.ndarray | None:
    """The image of a path; None if it is not there."""
    splits = ("",) if isinstance(images, ImageFolder) else images.manifest.splits
    for split in splits:
        paths = images.path if isinstance(images, ImageFolder) else images.index(split).path
        if len(rows := np.flatnonzero(paths == path)):
            return _read(images, split, int(rows[0]))
    return None
