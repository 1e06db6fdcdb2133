"""Pools that run the tasks of a stage: in this process, or as Ray tasks on a cluster.

A task is a function of what all tasks of the stage are given, of its own blocks, and of a callback
that counts what is done. It returns the same bits wherever it runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_shards.progress import Progress, silent

TASKS = 4  # of a worker, one after another: progress is seen, and a slow worker gets fewer


@dataclass(frozen=True)
class LocalPool:
    """Runs each stage as one task in this process, in which loops and products use threads."""

    progress: Progress = silent

    def put(self, value: Any) -> Any:
        """The value, ready to be given to tasks."""
        return value

    def map(
        self,
        stage: str,
        function: Callable,
        given: Sequence[Any],
        blocks: Sequence,
        size: Callable[[Any], int],
    ) -> Iterator[Any]:
        """Yield the results of `function(*given, blocks of the task, count)` for all blocks.

        Args:
            stage: the stage's name in progress.
            given: what all tasks are given; large values from `put` or `one`.
            blocks: what is divided among tasks.
            size: how much work a block is.
        """
        done, total = 0, sum(map(size, blocks))

        def count(more: int) -> None:
            nonlocal done
            done += more
            self.progress(stage, done, total)

        self.progress(stage, 0, total)
        yield function(*given, blocks, count)

    def one(self, stage: str, function: Callable, *given: Any) -> Any:
        """Run `function(*given)` as a stage of one task; its result can be given to others."""
        self.progress(stage, 0, 1)
        result = function(*given)
        self.progress(stage, 1, 1)
        return result


@dataclass(frozen=True)
class RayPool:
    """As `LocalPool`, with some Ray tasks of one core at a time on any node of the cluster."""

    workers: int
    progress: Progress = silent

    def put(self, value: Any) -> Any:
        """A reference to the value in Ray's shared memory."""
        import ray

        return ray.put(value)

    def map(
        self,
        stage: str,
        function: Callable,
        given: Sequence[Any],
        blocks: Sequence,
        size: Callable[[Any], int],
    ) -> Iterator[Any]:
        """As `LocalPool.map`; results come in the order in which tasks end."""
        import ray
        from ray.exceptions import RayTaskError

        task: Callable = ray.remote(num_cpus=1, max_retries=2)(function).remote
        left = deque(divided(blocks, self.workers * TASKS, size))
        running: dict[ray.ObjectRef, int] = {}
        done, total = 0, sum(map(size, blocks))
        self.progress(stage, 0, total)
        while left or running:
            while left and len(running) < self.workers:
                own = left.popleft()
                running[task(*given, own, _ignore)] = sum(map(size, own))
            ready, _ = ray.wait(list(running), fetch_local=False)
            for reference in ready:
                try:
                    yield ray.get(reference)
                except RayTaskError as error:  # one of ours comes out as it is
                    raise error.cause from None
                done += running.pop(reference)
                self.progress(stage, done, total)

    def one(self, stage: str, function: Callable, *given: Any) -> Any:
        """As `LocalPool.one`; the result stays on the node that made it."""
        import ray

        self.progress(stage, 0, 1)
        task: Callable = ray.remote(num_cpus=1, max_retries=2)(function).remote
        reference = task(*given)
        ray.wait([reference], fetch_local=False)
        self.progress(stage, 1, 1)
        return reference


Pool = LocalPool | RayPool


def _ignore(more: int) -> None:
    """Count nothing: a Ray task is counted when it ends."""


def divided(blocks: Sequence, count: int, size: Callable[[Any], int]) -> list[list]:
    """Consecutive blocks, divided among at most `count` tasks of about the same size."""
    ends = np.cumsum([size(block) for block in blocks])
    middle = ends - np.diff(ends, prepend=0) / 2
    owner = np.minimum(middle * count // ends[-1], count - 1).astype(int)
    tasks = [[b for b, w in zip(blocks, owner, strict=True) if w == i] for i in range(count)]
    return [task for task in tasks if task]
