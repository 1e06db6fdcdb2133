"""Losses of recent steps, held on the device until it is time to look at them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from data_shards.errors import DataError
from reid_train.worker import Worker

T = TypeVar("T")


class Look(NamedTuple):
    """What has happened since the last look.

    Attributes:
        rows: (n, 3) float64, cross-entropy, triplet and penalty of each step.
        step_seconds: of a step, on average.
        wait_seconds: of these, waiting for the next batch.
    """

    rows: np.ndarray
    step_seconds: float
    wait_seconds: float


class Meter:
    """Collects the losses of steps and turns them into rows; looking waits for the device."""

    def __init__(self, worker: Worker):
        self._worker = worker
        self._losses: list[torch.Tensor] = []
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

    def add(self, losses: torch.Tensor) -> None:
        """Take one step's (cross-entropy, triplet, penalty) of this rank, (3,), without waiting."""
        self._losses.append(losses)

    def read(self, last_step: int) -> Look:
        """Losses since the last look, averaged over ranks, and the time that steps took.

        Args:
            last_step: global step of the newest row, for the error message.

        Raises:
            DataError: a loss is not finite.
        """
        values = torch.stack(self._losses).double()
        self._losses = []
        if self._worker.world > 1:
            # Each rank holds the mean over its own anchors; the batch's loss is the mean of those.
            dist.all_reduce(values)
            values /= self._worker.world
        rows = values.cpu().numpy()
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        wrong = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(wrong):
            step = last_step - len(rows) + 1 + int(wrong[0])
            cross_entropy, triplet, penalty = rows[wrong[0]]
            raise DataError(
                f"the loss is not finite at step {step} (cross-entropy {cross_entropy:.4g}, "
                f"triplet {triplet:.4g}, penalty {penalty:.4g}): train under another --name with a "
                "lower --optimizer.learning-rate, or with --optimizer.clip-norm"
            )
        waited, self._waited = self._waited, 0.0
        return Look(rows, seconds / len(rows), waited / len(rows))
