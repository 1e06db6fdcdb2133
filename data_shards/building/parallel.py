"""Map a function over processes or a cluster; the results do not depend on how many there are."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data_shards.errors import ReidError

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that does the jobs of `parallel_map`.

    Each of its nodes must have the files and folders in `shared`.
    """

    address: str  # HOST:PORT, or "local" to start one on this machine
    shared: tuple[Path, ...] = ()


def cores() -> int:
    """How many cores this process may use, at least 1; a container's limit counts."""
    found = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        found = len(os.sched_getaffinity(0))
    try:  # microseconds of each period, or "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(found, int(quota) // int(period)))
    except (OSError, ValueError):
        return found


def parallel_map(
    function: Callable[[T], R],
    items: Sequence[T],
    jobs: int,
    images: Sequence[int],
    progress: Callable[[int, int], None],
    cluster: Cluster | None = None,
) -> list[R]:
    """Return the results in the order of the items, from processes of this machine or of a cluster.

    One job is done in this process.

    Processes are spawned, not forked, because the caller may have threads. A script that calls
    this needs the usual `if __name__ == "__main__":`. `images` has the number of images in each
    item; `progress` is called with how many are done, and with their total. On a cluster 0 `jobs`
    are as many as it has CPUs.
    """
    results, done, total = [], 0, sum(images)
    progress(0, total)
    if cluster is None:
        found = _results(function, items, jobs)
    else:
        from data_shards.ray_utils import connect

        connect(cluster.address)  # before Ray is imported
        from data_shards.building.on_ray import ray_results

        found = ray_results(function, items, jobs, cluster)
    for result, count in zip(found, images, strict=True):
        results.append(result)
        done += count
        progress(done, total)
    return results


def _results(function: Callable[[T], R], items: Sequence[T], jobs: int) -> Iterator[R]:
    workers = min(jobs, len(items))
    if workers <= 1:
        yield from map(function, items)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker)
    try:
        yield from pool.map(function, items)
    except BrokenProcessPool:
        raise ReidError(
            "a process was killed, perhaps because memory ran out: try again with fewer --jobs"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    # Ctrl-C reaches the whole process group. Only the parent reacts; started tasks may finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:  # a parent that is killed cannot stop its workers
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
