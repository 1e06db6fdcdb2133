"""Losses of recent steps, held on the device until it is time to look at them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from reid_train.training.context import Asked, Worker

T = TypeVar("T")


class Look(NamedTuple):
    """What has happened since the last look.

    Attributes:
        rows: (n, 4) float64, cross-entropy, triplet, penalty and whether the gradient was not
            finite (0 or 1), of each step.
        step_seconds: of a step, on average.
        wait_seconds: of these, waiting for the next batch.
        asked: what the first rank was asked, the same on every rank.
    """

    rows: np.ndarray
    step_seconds: float
    wait_seconds: float
    asked: Asked


class Meter:
    """Collects the losses of steps and turns them into rows; looking waits for the device."""

    def __init__(self, worker: Worker):
        self._worker = worker
        self._rows: list[torch.Tensor] = []
        self._clock = time.perf_counter()
        self._waited = 0.0

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the time until each is there is counted."""
        batches = iter(batches)
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - began
            yield batch

    def restart_clock(self) -> None:
        """Leave the time since the last look out of the throughput (evaluation, checkpoints)."""
        self._clock, self._waited = time.perf_counter(), 0.0

    def add(self, row: torch.Tensor) -> None:
        """Take one step's (cross-entropy, triplet, penalty, gradient not finite) of this rank.

        (4,), without waiting.
        """
        self._rows.append(row)

    def read(self) -> Look:
        """Rows since the last look, averaged over ranks, the time they took, and what is asked."""
        values = torch.stack([*self._rows, torch.zeros_like(self._rows[0])]).double()
        values[-1] = self._worker.asked()
        self._rows = []
        if self._worker.world > 1:
            # Each rank holds the mean over its own anchors; the batch's loss is the mean of those.
            values[-1] *= self._worker.world if self._worker.rank == 0 else 0
            dist.all_reduce(values)
            values /= self._worker.world
        *rows, asked = values.cpu().numpy()
        rows = np.stack(rows)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        waited, self._waited = self._waited, 0.0
        count = len(rows)
        return Look(rows, seconds / count, waited / count, Asked(round(asked[0])))
