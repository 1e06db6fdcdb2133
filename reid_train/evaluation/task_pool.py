"""Ray tasks that share the work of a stage, with progress."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayTaskError

from reid_train.evaluation.evaluate import Progress

SHARES = 4  # a worker's, one after another: so progress is seen, and a slow worker gets fewer


@dataclass(frozen=True)
class Crew:
    """Workers that take shares of a stage's work.

    Args:
        workers: how many tasks run at a time.
        cpus: of each task.
        progress: told what is done.
    """

    workers: int
    cpus: float = 1
    progress: Progress = lambda stage, done, total: None

    def start(
        self,
        stage: str,
        function: Callable,
        given: Sequence[Any],
        items: Sequence,
        size: Callable[[Any], int],
    ) -> Iterator[tuple[int, ray.ObjectRef]]:
        """Run `function(*given, share)` for shares of the items.

        Args:
            stage: what progress is told of.
            given: of any share; what is large, as references.
            items: what is shared, by stretches.
            size: how much work an item is.

        Yields:
            The share's number and a reference to its result, in the order in which they are done.
        """
        task = _task(function, self.cpus)
        shares = [s for s in shares_of(items, self.workers * SHARES, size) if s]
        left = deque(enumerate(shares))
        running: dict[ray.ObjectRef, int] = {}
        done, total = 0, sum(map(size, items))
        self.progress(stage, 0, total)
        while left or running:
            while left and len(running) < self.workers:
                number, share = left.popleft()
                running[task(*given, share)] = number
            ready, _ = ray.wait(list(running), fetch_local=False)
            for reference in ready:
                number = running.pop(reference)
                yield number, reference
                done += sum(map(size, shares[number]))
                self.progress(stage, done, total)

    def results(self, *arguments: Any) -> Iterator[Any]:
        """The results of `start`, in the order in which they are done.

        An error of ours comes out as itself, not wrapped.
        """
        for _, reference in self.start(*arguments):
            yield result_of(reference)

    def one(self, stage: str, function: Callable, *given: Any) -> ray.ObjectRef:
        """Run `function(*given)` as one task; wait for it, leaving its result where it is."""
        task = _task(function, self.cpus)
        self.progress(stage, 0, 1)
        reference = task(*given)
        # The value stays on the node that made it; only an error is fetched.
        ray.wait([reference], fetch_local=False)
        self.progress(stage, 1, 1)
        return reference


def _task(function: Callable, cpus: float) -> Callable[..., ray.ObjectRef]:
    return ray.remote(num_cpus=cpus, max_retries=2)(function).remote


def result_of(reference: ray.ObjectRef) -> Any:
    """A task's result; an error of ours comes out as itself, not wrapped."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None


def shares_of(items: Sequence, count: int, size: Callable[[Any], int]) -> list[list]:
    """Consecutive items in `count` shares of about the same size in all; some may be empty."""
    ends = np.cumsum([size(item) for item in items])
    middle = ends - np.diff(ends, prepend=0) / 2
    owner = np.minimum(middle * count // ends[-1], count - 1).astype(int)
    return [[item for item, w in zip(items, owner, strict=True) if w == i] for i in range(count)]
