"""A node's cache of shards: one download, bounded bytes, and nothing damaged is ever handed out."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from data_shards.cache import ShardCache
from data_shards.errors import ConfigError, DataError, ObjectMissing, StorageError
from data_shards.manifest import ShardInfo, sha256
from data_shards.storage import LocalStorage

SIZE = 20_000


@dataclass(frozen=True)
class RemoteFolder:
    """A folder that the cache has to download from; notes each download, for all processes."""

    root: Path
    seconds: float = 0.0

    @property
    def url(self) -> str:
        return f"remote:{self.root}"

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> None:
        with (self.root / "downloads.txt").open("a") as file:
            file.write(f"{key}\n")
        time.sleep(self.seconds)
        LocalStorage(self.root).download(key, path, sha256=sha256)

    @property
    def downloads(self) -> list[str]:
        log = self.root / "downloads.txt"
        return log.read_text().split() if log.exists() else []


def make_shards(folder: Path, count: int, seed: int = 0) -> list[ShardInfo]:
    rng = np.random.default_rng(seed)
    shards = []
    for i in range(count):
        data, name = rng.bytes(SIZE), f"shards/train-{i:06d}.tar"
        LocalStorage(folder).write(name, data)
        shards.append(
            ShardInfo(name=name, bytes=SIZE, sha256=sha256(data), split="train", images=1)
        )
    return shards


def make_cache(tmp_path: Path, room: int = 100, seconds: float = 0.0) -> ShardCache:
    """A cache of `room` shards over the dataset in `tmp_path / "data"`."""
    return ShardCache(
        RemoteFolder(tmp_path / "data", seconds),  # type: ignore[arg-type]
        tmp_path / "cache",
        room * SIZE,
    )


@pytest.fixture
def shards(tmp_path: Path) -> list[ShardInfo]:
    return make_shards(tmp_path / "data", 6)


def content(path: Path) -> str:
    return sha256(path.read_bytes())


def held(cache: ShardCache) -> int:
    """Bytes on the disk, half-finished downloads included."""
    total = 0
    for path in [*cache.folder.glob("*.tar"), *cache.folder.glob("*.part/*")]:
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # moved or removed meanwhile
            continue
    return total


def settle(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited 5 s in vain")


def settle_prefetch() -> None:
    settle(lambda: all(thread.name != "prefetch" for thread in threading.enumerate()))


def run_together(function: Callable[..., None], *arguments: tuple) -> None:
    """Run a function in one forked process for each tuple of arguments, at the same time."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=function, args=a) for a in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def test_a_shard_is_downloaded_once_and_then_found(tmp_path, shards):
    cache = make_cache(tmp_path)
    for _ in range(3):
        assert content(cache.path(shards[0])) == shards[0].sha256
    assert cache.storage.downloads == [shards[0].name]


def read_all(cache: ShardCache, shards: list[ShardInfo]) -> None:
    for shard in shards:
        assert content(cache.path(shard)) == shard.sha256


def test_four_processes_download_each_shard_once(tmp_path, shards):
    caches = [make_cache(tmp_path, seconds=0.02) for _ in range(4)]
    run_together(read_all, *[(cache, shards) for cache in caches])
    assert sorted(caches[0].storage.downloads) == [shard.name for shard in shards]


def test_four_threads_download_each_shard_once(tmp_path, shards):
    cache = make_cache(tmp_path, seconds=0.02)
    threads = [threading.Thread(target=read_all, args=(cache, shards)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(cache.storage.downloads) == [shard.name for shard in shards]


def test_the_cache_never_takes_more_than_it_may(tmp_path, shards):
    cache = make_cache(tmp_path, room=2)
    for shard in shards * 2:
        cache.path(shard)
        assert held(cache) <= 2 * SIZE
    assert len(cache.storage.downloads) == 12


def read_and_measure(cache: ShardCache, shards: list[ShardInfo]) -> None:
    for shard in shards:
        descriptor = cache.open(shard)
        assert sha256(os.pread(descriptor, SIZE, 0)) == shard.sha256
        os.close(descriptor)
        assert held(cache) <= cache.max_bytes


def test_processes_share_a_bound_that_is_smaller_than_what_they_want(tmp_path, shards):
    arguments = [(make_cache(tmp_path, 2, 0.01), list(np.roll(shards, i))) for i in range(3)]
    run_together(read_and_measure, *arguments)
    assert 0 < held(make_cache(tmp_path, 2)) <= 2 * SIZE


def test_the_least_recently_used_shard_goes_first(tmp_path, shards):
    cache = make_cache(tmp_path, room=3)
    for i in (0, 1, 2, 0, 3):
        cache.path(shards[i])
        time.sleep(0.01)
    there = {path.stem for path in cache.folder.glob("*.tar")}
    assert there == {shards[i].sha256 for i in (0, 2, 3)}


def test_shards_used_before_the_clock_was_set_back_go_first(tmp_path, shards):
    cache = make_cache(tmp_path, room=3)
    tomorrow = time.time() + 86_400
    for shard in shards[:2]:
        os.utime(cache.path(shard), (tomorrow, tomorrow))
    for shard in shards[2:4]:
        cache.path(shard)
    there = {path.stem for path in cache.folder.glob("*.tar")}
    assert {shards[2].sha256, shards[3].sha256} < there


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: os.truncate(p, SIZE // 2)])
def test_a_cached_shard_that_was_deleted_or_cut_is_downloaded_again(tmp_path, shards, damage):
    cache = make_cache(tmp_path)
    damage(cache.path(shards[0]))
    assert content(cache.path(shards[0])) == shards[0].sha256
    assert len(cache.storage.downloads) == 2


@pytest.fixture
def in_another_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Forget what this process has checked."""
    return lambda: monkeypatch.setattr("data_shards.cache._checked", set())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("ahead", [False, True])
def test_other_bytes_of_the_same_size_are_noticed_by_the_next_process(
    tmp_path, shards, in_another_process, caplog, ahead
):
    flip(make_cache(tmp_path).path(shards[0]))
    in_another_process()
    cache = make_cache(tmp_path)
    if ahead:
        cache.prefetch(shards[:1])
        settle_prefetch()
    assert content(cache.path(shards[0])) == shards[0].sha256
    assert len(cache.storage.downloads) == 2
    assert "train-000000.tar" in caplog.text


def test_a_whole_shard_is_checked_once_a_process(tmp_path, shards, in_another_process, monkeypatch):
    make_cache(tmp_path).path(shards[0])
    in_another_process()
    read = []
    monkeypatch.setattr("data_shards.cache.file_sha256", lambda p: read.append(p) or p.stem)
    cache = make_cache(tmp_path)
    for _ in range(3):
        cache.path(shards[0])
    assert len(read) == 1
    assert len(cache.storage.downloads) == 1


def test_a_shard_that_cannot_be_read_is_looked_at_again(tmp_path, shards):
    cache = make_cache(tmp_path)
    descriptor = cache.open(shards[0])
    assert cache.reopen(shards[0], descriptor) is None, "a whole one is not to blame"
    flip(cache.path(shards[0]))
    another = cache.reopen(shards[0], descriptor)
    assert another is not None
    assert sha256(os.pread(another, SIZE, 0)) == shards[0].sha256
    os.close(descriptor)
    os.close(another)


def test_an_open_shard_stays_readable_when_it_is_removed(tmp_path, shards):
    cache = make_cache(tmp_path, room=1)
    descriptor = cache.open(shards[0])
    cache.path(shards[1])
    assert sha256(os.pread(descriptor, SIZE, 0)) == shards[0].sha256
    os.close(descriptor)


def test_a_flipped_byte_is_an_error_and_is_not_kept(tmp_path, shards):
    path = tmp_path / "data" / shards[0].name
    data = bytearray(path.read_bytes())
    data[SIZE // 2] ^= 1
    path.write_bytes(data)
    cache = make_cache(tmp_path)
    with pytest.raises(DataError, match="damaged"):
        cache.path(shards[0])
    assert held(cache) == 0


def test_a_missing_shard_is_an_error_with_its_name(tmp_path, shards):
    (tmp_path / "data" / shards[0].name).unlink()
    with pytest.raises(ObjectMissing, match="train-000000"):
        make_cache(tmp_path).path(shards[0])


def test_datasets_with_the_same_names_share_a_folder(tmp_path):
    first = make_shards(tmp_path / "a" / "data", 3, seed=1)
    second = make_shards(tmp_path / "b" / "data", 3, seed=2)
    caches = [
        ShardCache(RemoteFolder(tmp_path / name / "data"), tmp_path / "cache", 6 * SIZE)  # type: ignore[arg-type]
        for name in "ab"
    ]
    for _ in range(2):
        read_all(caches[0], first)
        read_all(caches[1], second)
    assert all(len(cache.storage.downloads) == 3 for cache in caches)


def test_what_a_killed_process_left_behind_takes_no_room(tmp_path, shards):
    cache = make_cache(tmp_path, room=1)
    part = cache.folder / f"{shards[0].sha256}.part"
    part.mkdir(parents=True)
    (part / "half").write_bytes(bytes(SIZE))
    (cache.folder / f"{shards[0].sha256}.lock").write_bytes(bytes(SIZE))
    assert content(cache.path(shards[1])) == shards[1].sha256
    assert content(cache.path(shards[0])) == shards[0].sha256
    assert not part.exists()


def test_prefetched_shards_are_present_before_they_are_read(tmp_path, shards):
    cache = make_cache(tmp_path, seconds=0.01)
    cache.prefetch(shards[3:])
    settle_prefetch()
    assert len(list(cache.folder.glob("*.tar"))) == 3
    read_all(cache, shards[3:])
    assert cache.storage.downloads == [shard.name for shard in shards[3:]]


def test_prefetching_keeps_what_is_wanted_and_removes_what_is_not(tmp_path, shards):
    cache = make_cache(tmp_path, room=3)
    for i in (1, 2, 0):  # 1 and 2 are the least recently used, but wanted
        cache.path(shards[i])
        time.sleep(0.01)
    cache.prefetch([shards[1], shards[2], shards[3]])
    settle_prefetch()
    there = {path.stem for path in cache.folder.glob("*.tar")}
    assert there == {shards[i].sha256 for i in (1, 2, 3)}


def test_prefetching_stops_at_what_fits(tmp_path, shards):
    cache = make_cache(tmp_path, room=2)
    cache.prefetch(shards)
    settle_prefetch()
    assert cache.storage.downloads == [shards[0].name, shards[1].name]


def test_a_failed_prefetch_is_raised_by_the_next_request(tmp_path, shards):
    (tmp_path / "data" / shards[1].name).unlink()
    cache = make_cache(tmp_path)
    cache.path(shards[0])
    cache.prefetch([shards[1]])
    settle(lambda: cache._failure is not None)
    with pytest.raises(ObjectMissing, match="train-000001"):
        cache.path(shards[0])
    assert content(cache.path(shards[0])) == shards[0].sha256


def test_a_cache_smaller_than_a_shard_is_refused_with_the_bytes_needed(tmp_path, shards):
    cache = ShardCache(make_cache(tmp_path).storage, tmp_path / "cache", SIZE - 1)
    with pytest.raises(ConfigError, match=f"{SIZE:,}"):
        cache.path(shards[0])


def test_a_cache_smaller_than_a_window_is_refused_with_the_bytes_needed(tmp_path, shards):
    cache = make_cache(tmp_path, room=3)
    cache.require(shards, 3)
    with pytest.raises(ConfigError, match=f"increase it to {4 * SIZE:,} or more"):
        cache.require(shards, 4)


def test_a_local_dataset_is_read_where_it_lies(tmp_path, shards):
    cache = ShardCache(LocalStorage(tmp_path / "data"), tmp_path / "cache", 1)
    assert cache.path(shards[0]) == tmp_path / "data" / shards[0].name
    cache.prefetch(shards)
    assert not cache.folder.exists()


def test_a_local_shard_of_another_size_is_an_error(tmp_path, shards):
    cache = ShardCache(LocalStorage(tmp_path / "data"), tmp_path / "cache", SIZE)
    os.truncate(tmp_path / "data" / shards[0].name, SIZE // 2)
    with pytest.raises(DataError, match="10,000 bytes, but the manifest says 20,000"):
        cache.path(shards[0])


def test_a_pickled_cache_is_the_same_cache(tmp_path, shards):
    cache = make_cache(tmp_path)
    cache.path(shards[0])
    other = pickle.loads(pickle.dumps(cache))
    assert other.path(shards[0]) == cache.path(shards[0])
    assert len(cache.storage.downloads) == 1


def test_a_disk_that_refuses_is_an_error_with_the_folder(tmp_path, shards, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = make_cache(tmp_path)
    monkeypatch.setattr(RemoteFolder, "download", full)
    with pytest.raises(StorageError, match=f"disk full while writing {cache.folder}.*free some"):
        cache.path(shards[0])


def test_a_cache_folder_that_cannot_be_made_is_an_error(tmp_path, shards):
    (tmp_path / "file").write_text("")
    cache = ShardCache(make_cache(tmp_path).storage, tmp_path / "file" / "cache", 10 * SIZE)
    with pytest.raises(StorageError, match="file/cache: Not a directory"):
        cache.path(shards[0])


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with room for one shard and a half."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    size = f"size={SIZE * 3 // 2}"
    if (
        os.getuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", folder]).returncode
    ):
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_an_error_and_the_shards_there_stay_good(tmp_path, shards, tiny_disk):
    cache = ShardCache(make_cache(tmp_path).storage, tiny_disk / "cache", 10 * SIZE)
    cache.path(shards[0])
    with pytest.raises(StorageError, match="disk full while writing"):
        cache.path(shards[1])
    assert content(cache.path(shards[0])) == shards[0].sha256
    assert held(cache) == SIZE


def test_a_read_only_disk_is_an_error(tmp_path, shards, tiny_disk):
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    with pytest.raises(StorageError, match="Read-only file system"):
        ShardCache(make_cache(tmp_path).storage, tiny_disk / "cache", SIZE).path(shards[0])
