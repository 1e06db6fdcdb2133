"""The tasks of an evaluation: the sources that they read from, and the pool that runs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_shards.progress import Progress, silent
from reid_train.evaluation.embedding_store import EmbeddingFiles
from reid_train.evaluation.similarity import Features

TASKS = 4  # of a worker, one after another: progress is seen, and a slow worker gets fewer

Range = tuple[int, int]
"""Consecutive images: the first, and the one past the last."""
Count = Callable[[int], object]
"""Called with how much more is done."""


def ranges(count: int, size: int, first: int = 0) -> list[Range]:
    """Consecutive ranges of `size` images from `first` to `count`; the last may be shorter."""
    return [(a, min(a + size, count)) for a in range(first, count, size)]


def length(own: Range) -> int:
    """How many images a range has."""
    return own[1] - own[0]


def ignore(more: int) -> None:
    """Count nothing."""


@dataclass(frozen=True)
class Separate:
    """Queries and gallery in memory, each in an array of its own."""

    query: Features
    gallery: Features


@dataclass(frozen=True)
class Joined:
    """Queries and gallery in memory in one array, queries first."""

    both: Features
    queries: int

    @property
    def query(self) -> Features:
        """Only the queries."""
        return self.both.rows(0, self.queries)

    @property
    def gallery(self) -> Features:
        """Only the gallery."""
        return self.both.rows(self.queries, len(self.both))


def read_all(files: EmbeddingFiles) -> Joined:
    """Read all embeddings into memory."""
    both = Features.of(files.read("query", "gallery"))
    return Joined(both, int(np.count_nonzero(files.split == "query")))


@dataclass(frozen=True)
class Streamed:
    """Queries in memory, and a gallery that stays on storage."""

    query: Features
    files: EmbeddingFiles


Source = Separate | Joined | Streamed


def gallery_blocks(
    source: Source, own: Sequence[Range], size: int
) -> Iterator[tuple[int, Features]]:
    """The images of consecutive gallery ranges, `size` at a time, with the index of the first."""
    first, stop = own[0][0], own[-1][1]
    if isinstance(source, Streamed):
        for at, embedding in source.files.blocks("gallery", first, stop, size):
            yield at, Features.of(embedding)
    else:
        gallery = source.gallery
        for a, b in ranges(stop, size, first):
            yield a, gallery.rows(a, b)


@dataclass(frozen=True)
class Pool:
    """Runs the tasks of a stage: in this process, or as Ray tasks of one core on a cluster.

    A task is a function of what all tasks of the stage are given, of its own blocks, and of a
    callback that counts what is done. It returns the same bits wherever it runs. In this process a
    stage is one task, in which loops and products use threads.

    Args:
        workers: Ray tasks that run at a time; 1 is this process, without Ray.
        progress: called with each stage.
    """

    workers: int = 1
    progress: Progress = silent

    def put(self, value: Any) -> Any:
        """What tasks are given for a large value: on Ray, a reference to it in shared memory."""
        if self.workers == 1:
            return value
        import ray

        return ray.put(value)

    def one(self, stage: str, function: Callable, *given: Any) -> Any:
        """Run `function(*given)` as a stage of one task; returns what `put` of its result would."""
        self.progress(stage, 0, 1)
        if self.workers == 1:
            result = function(*given)
        else:
            import ray

            result = _task(function)(*given)
            ray.wait([result], fetch_local=False)  # it stays on the node that made it
        self.progress(stage, 1, 1)
        return result

    def map(
        self,
        stage: str,
        function: Callable,
        given: Sequence[Any],
        blocks: Sequence,
        size: Callable[[Any], int],
    ) -> Iterator[Any]:
        """Yield the results of `function(*given, blocks of the task, count)`, as tasks end.

        Args:
            stage: the stage's name in progress.
            given: what all tasks are given.
            blocks: what is divided among tasks.
            size: how much work a block is.
        """
        done, total = 0, sum(map(size, blocks))

        def count(more: int) -> None:
            nonlocal done
            done += more
            self.progress(stage, done, total)

        self.progress(stage, 0, total)
        if self.workers == 1:
            yield function(*given, blocks, count)
            return
        import ray
        from ray.exceptions import RayTaskError

        task, running = _task(function), {}
        left = deque(divided(blocks, self.workers * TASKS, size))
        while left or running:
            while left and len(running) < self.workers:
                own = left.popleft()
                running[task(*given, own, ignore)] = sum(map(size, own))
            ready, _ = ray.wait(list(running), fetch_local=False)
            for reference in ready:
                try:
                    yield ray.get(reference)
                except RayTaskError as error:  # raise the task's own error, as in one process
                    raise error.cause from None
                count(running.pop(reference))


def _task(function: Callable) -> Callable[..., Any]:
    import ray

    return ray.remote(num_cpus=1, max_retries=2)(function).remote  # type: ignore[attr-defined]


def divided(blocks: Sequence, count: int, size: Callable[[Any], int]) -> list[list]:
    """Consecutive blocks, divided among at most `count` tasks of about the same size."""
    ends = np.cumsum([size(block) for block in blocks])
    middle = ends - np.diff(ends, prepend=0) / 2
    owner = np.minimum(middle * count // ends[-1], count - 1).astype(int)
    tasks = [[b for b, w in zip(blocks, owner, strict=True) if w == i] for i in range(count)]
    return [task for task in tasks if task]
