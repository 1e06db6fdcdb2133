"""Images as they are in a folder or on S3: no shards and no table, only files."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Self

import numpy as np

from data_shards.dataset import Dataset, NodeCache
from data_shards.errors import DataError, ObjectMissing
from data_shards.manifest import MANIFEST_NAME, LeftOut
from data_shards.sources.folders import SUFFIXES
from data_shards.sources.layout import is_of_macos
from data_shards.storage import LocalStorage, Storage, expand_home, open_file, open_storage

if TYPE_CHECKING:
    from data_shards.loading.loader import Batch

logger = logging.getLogger(__name__)

NAMED = 5  # files that a warning names
THREADS = 8  # that read and decode: on S3 most of the time is waiting


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """All images below a folder or an s3:// prefix; identities and cameras are not known."""

    url: str
    storage: Storage
    path: np.ndarray  # (N,) strings, ascending: the keys in the storage, which name the images
    digest: str  # SHA-256 of the paths and sizes, in hex
    ignored: tuple[str, ...]  # `._name` and the like, which macOS writes beside images

    @classmethod
    def open(cls, url: str) -> Self:
        """List the images at `url`; no image is read.

        Raises:
            DataError: there is no such folder, no image in it, or a name that is not UTF-8.
        """
        storage, paths, ignored, others = open_storage(url), [], [], 0
        digest = hashlib.sha256()
        for key, size in storage.list():
            if PurePosixPath(key).suffix.lower() not in SUFFIXES:
                others += 1
            elif is_of_macos(key):
                ignored.append(key)
            else:
                paths.append(key)
                try:
                    digest.update(f"{key}\0{size}\n".encode())
                except UnicodeEncodeError:
                    raise DataError(
                        f"{key!r} under {url}: rename this file; its name is not UTF-8"
                    ) from None
        if not paths:
            if isinstance(storage, LocalStorage) and not storage.root.is_dir():
                raise DataError(f"no dataset at {url}: there is no such folder")
            others += len(ignored)
            if not others:
                raise DataError(f"no dataset at {url}: there are neither shards nor images")
            raise DataError(
                f"no dataset and no images at {url}: of its {others:,} files none is an image "
                f"({', '.join(f'*{suffix}' for suffix in SUFFIXES)})"
            )
        return cls(url, storage, np.array(paths, object), digest.hexdigest(), tuple(ignored))

    def read(self, row: int) -> bytes:
        """The bytes of an image."""
        return self.storage.read(self.path[row])

    def batches(
        self,
        rows: Sequence[int] | np.ndarray,
        left_out: list[LeftOut],
        *,
        batch: int,
        height: int,
        width: int,
    ) -> Iterator[Batch]:
        """Yield the images of rows, in order, resized to (height, width).

        Unreadable images are in no batch; they are added to `left_out`. The next batch is read
        while the consumer has one. Labels are −1: not known.
        """
        import torch

        from data_shards.loading.loader import Batch

        def collect(futures: dict[int, Future[np.ndarray | LeftOut]]) -> Batch | None:
            read = {row: future.result() for row, future in futures.items()}
            left_out.extend(image for image in read.values() if isinstance(image, LeftOut))
            good = {row: image for row, image in read.items() if isinstance(image, np.ndarray)}
            if not good:
                return None
            unknown, row = torch.full((len(good),), -1), torch.tensor(list(good))
            images = torch.from_numpy(np.stack(list(good.values())))
            return Batch(images, unknown, row)

        with ThreadPoolExecutor(THREADS) as pool:
            waiting = None
            for start in range(0, len(rows), batch):
                ahead = {
                    int(row): pool.submit(self._decode, int(row), height, width)
                    for row in rows[start : start + batch]
                }
                if waiting and (made := collect(waiting)):
                    yield made
                waiting = ahead
            if waiting and (made := collect(waiting)):
                yield made

    def _decode(self, row: int, height: int, width: int) -> np.ndarray | LeftOut:
        from data_shards.loading.decode import decode_into

        pixels = np.empty((height, width, 3), np.uint8)
        try:
            decode_into(self.read(row), pixels)
        except DataError as error:
            return LeftOut(path=self.path[row], reason=str(error))
        return pixels


def open_images(url: str, cache: NodeCache | None = None) -> Dataset | ImageFolder:
    """Open a sharded dataset, or else a folder of images; `cache` is that of `Dataset.open`.

    Raises:
        DataError: there is neither, or the dataset is damaged.
        StorageError: the storage cannot be reached or denies access.
    """
    if open_storage(url).exists(MANIFEST_NAME):
        return Dataset.open(url, cache=cache)
    return ImageFolder.open(url)


def require_images(url: str) -> None:
    """Raise what `open_images` raises if nothing is there; nothing large is read or listed."""
    storage = open_storage(url)
    if not storage.exists(MANIFEST_NAME) and next(iter(storage.list("")), None) is None:
        ImageFolder.open(url)


def warn_left_out(folder: ImageFolder, unreadable: Sequence[LeftOut]) -> None:
    """Name the files that are in no batch, in a warning."""
    reasons = [f"{image.path} ({image.reason})" for image in unreadable]
    one_many = ("unreadable image", "unreadable images"), ("file of macOS", "files of macOS")
    for names, words in zip((reasons, folder.ignored), one_many, strict=True):
        if names:
            what = words[len(names) > 1]
            more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
            first = "; ".join(names[:NAMED])
            logger.warning("%s: %d %s left out: %s%s", folder.url, len(names), what, first, more)


def read_photo(url: str) -> np.ndarray:
    """Read one image file, local or on S3: (H, W, 3) uint8, RGB.

    Raises:
        DataError: it is a folder, or not an image.
        ObjectMissing: there is no such file.
    """
    from data_shards.loading.decode import decode

    storage, key = open_file(url)
    if not key or ("://" not in url and os.path.isdir(expand_home(Path(url)))):
        raise DataError(f"{url} is a folder: give one image file")
    try:
        return decode(storage.read(key))
    except DataError as error:
        raise DataError(f"{url}: {error}") from None
    except ObjectMissing:
        raise ObjectMissing(f"there is no image {url}") from None
