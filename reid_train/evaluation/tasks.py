"""The tasks of an evaluation: the sources that they read from, and the pool that runs them."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_shards.errors import ReidError
from data_shards.progress import Progress, phase, silent
from reid_train.evaluation.embedding_store import EmbeddingFiles
from reid_train.evaluation.similarity import Features
from reid_train.out_of_memory import out_of_memory

TASKS = 4  # of a worker, one after another: progress is seen, and a slow worker gets fewer
Count = Callable[[int], object]  # called with how much more is done


def ranges(count: int, size: int, first: int = 0) -> list[range]:
    """Consecutive ranges of `size` images from `first` to `count`; the last may be shorter."""
    return [range(a, min(a + size, count)) for a in range(first, count, size)]


def ignore(more: int) -> None:
    """Count nothing."""


@dataclass(frozen=True)
class Separate:
    """Queries in memory, and the gallery in another array, or in files that are streamed."""

    query: Features
    gallery: Features | EmbeddingFiles


@dataclass(frozen=True)
class Joined:
    """Queries and gallery in memory in one array, queries first."""

    both: Features
    queries: int

    @property
    def query(self) -> Features:
        return self.both[: self.queries]

    @property
    def gallery(self) -> Features:
        return self.both[self.queries :]


Source = Separate | Joined


def gallery_blocks(
    source: Source, own: Sequence[range], size: int
) -> Iterator[tuple[int, Features]]:
    """The images of consecutive gallery ranges, `size` at a time, with the index of the first."""
    gallery, first, stop = source.gallery, own[0].start, own[-1].stop
    if isinstance(gallery, EmbeddingFiles):
        for at, embedding in gallery.blocks("gallery", first, stop, size):
            yield at, Features.of(embedding)
    else:
        for part in ranges(stop, size, first):
            yield part.start, gallery[part.start : part.stop]


@dataclass(frozen=True)
class Pool:
    """Runs the tasks of a stage: in this process, or as Ray tasks of one core on a cluster.

    A task is a function of what all tasks of the stage are given, of its own blocks, and of a
    callback that counts what is done. It returns the same bits wherever it runs. In this process a
    stage is one task, in which loops and products use threads.
    """

    workers: int = 1  # Ray tasks that run at a time; 1 is this process, without Ray
    progress: Progress = silent

    def put(self, value: Any) -> Any:
        """What tasks are given for a large value: on Ray, a reference to it in shared memory."""
        if self.workers == 1:
            return value
        import ray

        return ray.put(value)

    def one(self, stage: str, function: Callable, *given: Any) -> Any:
        """Run `function(*given)` as a stage of one task; returns what `put` of its result would."""
        with phase(self.progress, stage):
            if self.workers == 1:
                return function(*given)
            import ray

            result = _task(function)(*given)
            ray.wait([result], fetch_local=False)  # it stays on the node that made it
            return result

    def map(
        self,
        stage: str,
        function: Callable,
        given: Sequence[Any],
        blocks: Sequence,
        size: Callable[[Any], int] = len,
    ) -> Iterator[Any]:
        """Yield the results of `function(*given, blocks of the task, count)`, as tasks end.

        All tasks are given `given`. `blocks` are divided among them by `size`, the work of a block.
        """
        done, total = 0, sum(map(size, blocks))

        def count(more: int) -> None:
            nonlocal done
            done += more
            self.progress(stage, done, total)

        count(0)
        if self.workers == 1:
            yield function(*given, blocks, count)
            return
        import ray
        from ray.exceptions import RayError, RayTaskError

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
                except RayError as error:
                    reason = out_of_memory(str(error)) or str(error).strip().splitlines()[0]
                    raise ReidError(f"a worker was lost while {stage}: {reason}") from error
                count(running.pop(reference))


def _task(function: Callable) -> Callable[..., Any]:
    import ray

    return ray.remote(num_cpus=1, max_retries=2)(function).remote  # type: ignore[attr-defined]


def divided(blocks: Sequence, count: int, size: Callable[[Any], int] = len) -> list[list]:
    """Consecutive blocks, divided among at most `count` tasks of about the same size."""
    ends = np.cumsum([size(block) for block in blocks])
    middle = ends - np.diff(ends, prepend=0) / 2
    owner = np.minimum(middle * count // ends[-1], count - 1).astype(int)
    tasks = [[b for b, w in zip(blocks, owner, strict=True) if w == i] for i in range(count)]
    return [task for task in tasks if task]
