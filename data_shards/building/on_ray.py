"""Map a function over the nodes of a Ray cluster; lost nodes and slow ones are made up for."""

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
import ray.exceptions

from data_shards.building.parallel import Cluster
from data_shards.errors import ConfigError, ReidError

T = TypeVar("T")
R = TypeVar("R")

RETRIES = 5  # of a task whose worker or node is gone
SLOW = 3.0  # times the median: a task that takes longer is started once more elsewhere
LEAST_SECONDS = 30.0  # before a task can count as slow
CHECK_SECONDS = 1.0


def ray_results(
    function: Callable[[T], R], items: Sequence[T], workers: int, cluster: Cluster
) -> Iterator[R]:
    """Yield the results in the order of the items; Ray must be running.

    When no items are left to start, one that takes much longer than others is started a second
    time, and the first result counts. So `function` must be safe to run twice at once.

    Args:
        function: picklable, as are the items and the results.
        workers: most tasks at a time, each on one CPU; 0 for as many as the cluster has CPUs.
    """
    workers = workers or int(ray.cluster_resources().get("CPU", 1))
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(_call)
    shared = ray.put((function, cluster))
    running, results, seconds = dict[Any, tuple[int, float]](), dict[int, R](), list[float]()
    unstarted, twice, following = iter(range(len(items))), set[int](), 0

    def start(number: int) -> None:
        running[task.remote(shared, items[number])] = number, time.monotonic()

    try:
        while following < len(items):
            while len(running) < workers:
                if (number := next(unstarted, None)) is None:
                    number = _slow(running, seconds, twice)
                    if number is None:
                        break
                    twice.add(number)
                start(number)
            for done in ray.wait(list(running), timeout=CHECK_SECONDS)[0]:
                number, began = running.pop(done)
                result = _get(done)
                seconds.append(time.monotonic() - began)
                results[number] = result
                for other in [r for r, (n, _) in running.items() if n == number]:
                    ray.cancel(other)
                    del running[other]
            while following in results:
                yield results.pop(following)
                following += 1
    finally:
        for left in running:
            ray.cancel(left)


def _slow(
    running: dict[Any, tuple[int, float]], seconds: list[float], twice: set[int]
) -> int | None:
    """The task that has run for longest, if that is much longer than usual, and not yet twice."""
    once = [(began, number) for number, began in running.values() if number not in twice]
    if not once or not seconds:
        return None
    began, number = min(once)
    limit = max(LEAST_SECONDS, SLOW * statistics.median(seconds))
    return number if time.monotonic() - began > limit else None


def _get(done: Any) -> Any:
    try:
        result = ray.get(done)
    except ray.exceptions.RayTaskError:  # a fault of ours, with its traceback
        raise
    except ray.exceptions.RayError as error:
        raise ReidError(
            f"a task's worker ended {RETRIES + 1} times ({type(error).__name__}), perhaps because"
            " memory ran out: the same command continues, with fewer --workers"
        ) from None
    if isinstance(result, ReidError):
        raise result
    return result


def _call(shared: tuple[Callable[[T], R], Cluster], item: T) -> R | ReidError:
    """Run in a worker. An error is returned, because Ray adds a traceback to what is raised."""
    function, cluster = shared
    for path in cluster.shared:
        if not path.exists():
            return ConfigError(
                f"node {platform.node()} has no {path}: give an s3:// URL, or a place that all"
                " nodes share"
            )
    try:
        return function(item)
    except ReidError as error:
        return error
