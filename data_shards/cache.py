"""A node's cache of shards: one download for any number of processes, within a limit of bytes.

Processes coordinate through the cache's folder only. `<sha256>.tar` is a whole, checked shard; its
modification time is its last use. The process that holds the lock on `<sha256>.lock` may download
it; the length of the lock file is the space it has reserved. Names come from contents, so datasets
can share a folder. A dataset in a local folder is read in place. The cache also holds indices, as
they were downloaded and as columns that processes map (`index.py`).

A file is checked when it arrives, when a process first uses one that was there before, and when
an image in it cannot be read; a damaged one is downloaded or made again.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

from data_shards.errors import ConfigError, DataError, StorageError
from data_shards.manifest import FileInfo
from data_shards.storage import LocalStorage, Storage
from data_shards.storage.atomic import disk_errors, file_sha256

log = logging.getLogger(__name__)

_OPEN_ATTEMPTS = 3
_checked = set[Path]()  # files that this process, or the one it was forked from, has checked
KINDS = (".tar", ".parquet", ".columns")  # of files that count, and are removed to make room
_SEAL = 4  # bytes of the checksum at the end of a file that was made here
_POLL = 0.05  # seconds between checks for space that downloads of other processes have reserved


@dataclass(frozen=True)
class _File:
    """A file of the cache: its name there, its size, and how it is checked and made."""

    path: Path
    bytes: int
    what: str
    is_whole: Callable[[Path], bool]
    make: Callable[[Path], object]


class ShardCache:
    """Local files of a dataset's shards; the least recently used are removed first.

    Threads can share a cache. Each process makes its own over the same folder; unpickling does so.
    A removed shard stays readable where it is open.

    Args:
        storage: where the shards are, rooted at the dataset.
        folder: made when first needed; other datasets may share it.
        max_bytes: limit of all shards in `folder`, including those being downloaded.
    """

    def __init__(self, storage: Storage, folder: str | Path, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ConfigError(f"--loader.cache-bytes must be positive, not {max_bytes}")
        self.storage = storage
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self._mutex = threading.Lock()
        self._wanted: list[FileInfo] = []
        self._waiting: list[FileInfo] = []
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardCache, (self.storage, self.folder, self.max_bytes)

    @property
    def in_place(self) -> bool:
        """Whether shards are read from the dataset's own folder, without a copy."""
        return isinstance(self.storage, LocalStorage)

    def path(self, shard: FileInfo) -> Path:
        """The shard's local file, downloaded if necessary. To read it, prefer `open`.

        Raises:
            ConfigError: the shard is larger than the whole cache.
            DataError: it arrived with another SHA-256, or a local one has another size.
            StorageError: the storage or the cache's disk failed, now or in an earlier `prefetch`.
        """
        with self._mutex:
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        if not isinstance(self.storage, LocalStorage):
            return self._ready(self._download(shard))
        path = self.storage.root / shard.name
        with disk_errors(path):
            size = path.stat().st_size
        if size != shard.bytes:
            raise DataError(
                f"{path} has {size:,} bytes, but the manifest says {shard.bytes:,}: restore it, or"
                " build the dataset again"
            )
        return path

    def open(self, shard: FileInfo) -> int:
        """Open what `path` returns; the file descriptor stays valid when the shard is removed."""
        return self._open(lambda: self.path(shard))

    def open_made(self, name: str, size: int, make: Callable[[Path], object]) -> int:
        """Open a file that is made on this node, once for all its processes.

        Args:
            name: of the file; what is in it must follow from its name.
            size: bytes of what is in it.
            make: writes it; is not called if it is there and whole.

        Returns:
            A file descriptor. A checksum follows the `size` bytes.
        """

        def make_sealed(path: Path) -> None:
            make(path)
            checksum = _checksum(path, size)
            with path.open("ab") as file:
                file.write(checksum)

        path, whole = self.folder / name, size + _SEAL
        wanted = _File(path, whole, name, lambda found: _is_sealed(found, size), make_sealed)
        return self._open(lambda: self._ready(wanted))

    def _open(self, find: Callable[[], Path]) -> int:
        for _ in range(_OPEN_ATTEMPTS):
            path = find()
            with contextlib.suppress(FileNotFoundError):  # removed since it was found
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        raise StorageError(
            f"{path} is removed again and again: increase --loader.cache-bytes ({self.max_bytes:,})"
        )

    def reopen(self, shard: FileInfo, descriptor: int) -> int | None:
        """Check a shard again after an image in it could not be read.

        Return a descriptor of another copy if the one behind `descriptor` was damaged or has been
        replaced; None if it is whole, so that the image itself is damaged.
        """
        _checked.discard(self._download(shard).path)
        another = self.open(shard)
        if os.path.sameopenfile(another, descriptor):
            os.close(another)
            return None
        return another

    def prefetch(self, shards: Sequence[FileInfo]) -> None:
        """Download these shards in the background, in this order, and keep them meanwhile.

        This replaces the list of an earlier call. Shards beyond `max_bytes` are skipped. The next
        call of `path` raises an error of the background thread.
        """
        if self.in_place:
            return
        totals = accumulate(shard.bytes for shard in shards)
        wanted = [s for s, total in zip(shards, totals, strict=True) if total <= self.max_bytes]
        with self._mutex:
            self._wanted, self._waiting = wanted, wanted[::-1]
            if self._waiting and self._thread is None:
                self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
                self._thread.start()

    def require(self, shards: Sequence[FileInfo], at_once: int) -> None:
        """Raise a `ConfigError` with the bytes needed unless any `at_once` shards fit together."""
        needed = sum(sorted((shard.bytes for shard in shards), reverse=True)[:at_once])
        if needed > self.max_bytes and not self.in_place:
            raise ConfigError(
                f"--loader.cache-bytes is {self.max_bytes:,}, but the {at_once} shards of a window"
                f" take up to {needed:,} bytes: increase it to {needed:,} or more (twice that to"
                " load ahead), or lower --batch.window"
            )

    def _work(self) -> None:
        while True:
            with self._mutex:
                if not self._waiting:
                    self._thread = None
                    return
                shard, keep = self._waiting.pop(), self._wanted
            try:
                # Mark the shards wanted next as used, so that they are not removed to make space.
                for wanted in keep:
                    self._touch(self._download(wanted))
                self._ready(self._download(shard))
            except Exception as error:
                log.warning("prefetching stopped: %s", error)
                with self._mutex:
                    self._failure, self._waiting, self._thread = error, [], None
                return

    def _download(self, info: FileInfo) -> _File:
        """The file of the cache that is a copy of one of the dataset."""
        return _File(
            self.folder / f"{info.sha256}{PurePosixPath(info.name).suffix}",
            info.bytes,
            info.name,
            lambda path: file_sha256(path) == info.sha256,
            lambda path: self.storage.download(info.name, path, sha256=info.sha256),
        )

    def _ready(self, file: _File) -> Path:
        if not self._holds(file):
            self._fetch(file)
        return file.path

    def _touch(self, file: _File) -> bool:
        """Whether the file is there with its size; marks it as just used."""
        with disk_errors(self.folder), contextlib.suppress(FileNotFoundError):
            if file.path.stat().st_size == file.bytes:
                os.utime(file.path)
                return True
        return False

    def _holds(self, file: _File) -> bool:
        """Whether the file is there and whole, which each process checks once."""
        path = file.path
        if not self._touch(file):
            return False
        if path in _checked:
            return True
        with disk_errors(path), contextlib.suppress(FileNotFoundError):
            if file.is_whole(path):
                _checked.add(path)
                return True
            log.warning("%s in %s is damaged; fetching it again", file.what, self.folder)
        return False

    def _fetch(self, file: _File) -> None:
        part = file.path.with_suffix(".part")
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with _lock_file(file.path.with_suffix(".lock")) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if self._holds(file):  # another process was first
                    return
                file.path.unlink(missing_ok=True)
                shutil.rmtree(part, ignore_errors=True)  # left by a process that was killed
                os.ftruncate(lock, 0)
                self._reserve(file, lock)
                began = time.monotonic()
                try:
                    part.mkdir()
                    file.make(part / "file")
                    os.replace(part / "file", file.path)
                    _checked.add(file.path)
                finally:
                    shutil.rmtree(part, ignore_errors=True)
                    os.ftruncate(lock, 0)
        log.debug("cached %s in %.1f s", file.what, time.monotonic() - began)

    def _reserve(self, file: _File, lock: int) -> None:
        """Reserve space for a file; remove the least recently used ones if necessary."""
        if file.bytes > self.max_bytes:
            raise ConfigError(
                f"--loader.cache-bytes is {self.max_bytes:,}, but {file.what} has"
                f" {file.bytes:,} bytes: increase it"
            )
        while True:
            with _lock_file(self.folder / "room.lock") as room:
                fcntl.flock(room, fcntl.LOCK_EX)
                if self._evict(file.bytes + self._reserved() - self.max_bytes) <= 0:
                    os.ftruncate(lock, file.bytes)
                    return
            time.sleep(_POLL)

    def _reserved(self) -> int:
        """Bytes of downloads in progress. If a process died, its lock and its space are free."""
        total = 0
        for path in self.folder.glob("*.lock"):
            if size := path.stat().st_size:
                with _lock_file(path) as lock:
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        os.ftruncate(lock, 0)
                    except BlockingIOError:
                        total += size
        return total

    def _evict(self, excess: int) -> int:
        """Remove files until the excess over the limit is zero; return the excess that is left."""
        files, soon = [], time.time_ns() + 60_000_000_000
        for path in (p for kind in KINDS for p in self.folder.glob(f"*{kind}")):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                # A last use in the future was noted before the clock was set back.
                used = stat.st_mtime_ns if stat.st_mtime_ns < soon else 0
                files.append((used, stat.st_size, path))
        excess += sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size
        return excess


@contextlib.contextmanager
def _lock_file(path: Path) -> Iterator[int]:
    """Open a file for `flock`, which ends with the process that holds it.

    Lock files are never removed: else two processes could each lock a file of the same name.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _checksum(path: Path, size: int) -> bytes:
    """The CRC-32 of a file's first `size` bytes: several times faster than a SHA-256."""
    value = 0
    with path.open("rb") as file:
        while size > 0 and (chunk := file.read(min(size, 1 << 20))):
            value = zlib.crc32(chunk, value)
            size -= len(chunk)
    return value.to_bytes(_SEAL, "big")


def _is_sealed(path: Path, size: int) -> bool:
    with path.open("rb") as file:
        file.seek(size)
        return file.read() == _checksum(path, size)
