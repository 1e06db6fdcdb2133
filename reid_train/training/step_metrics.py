"""Losses of recent steps, kept on the device until they are read."""

import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from reid_train.training.context import StopRequest, WorkerContext

T = TypeVar("T")


class StepRows(NamedTuple):
    """The steps since the last reading."""

    rows: np.ndarray  # (n, m) float64, the metrics of each step
    step_seconds: float  # average time of a step
    wait_seconds: float  # average time that a step waited for its batch
    request: StopRequest  # what rank 0 was asked to do; the same on every rank


class StepWindow:
    """Collects the metrics of steps without a host sync; reading them waits for the device."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._rows: list[torch.Tensor] = []
        self._clock = time.perf_counter()
        self._waited = 0.0

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the same batches, and measure how long each is waited for."""
        began = time.perf_counter()
        for batch in batches:
            self._waited += time.perf_counter() - began
            yield batch
            began = time.perf_counter()

    def restart_clock(self) -> None:
        """Leave the time since the last reading out of the speed (evaluation, checkpoints)."""
        self._clock, self._waited = time.perf_counter(), 0.0

    def add(self, row: torch.Tensor) -> None:
        """Add one step's metrics on this rank, (m,)."""
        self._rows.append(row)

    def read(self) -> StepRows:
        """Return the rows since the last reading, averaged over ranks, and forget them."""
        values = torch.stack([*self._rows, torch.zeros_like(self._rows[0])]).double()
        values[-1] = self._context.stop_request()
        self._rows = []
        if self._context.world > 1:
            # Each rank has the mean over its own anchors; the batch's loss is the mean of those.
            values[-1] *= self._context.world if self._context.rank == 0 else 0
            dist.all_reduce(values)
            values /= self._context.world
        *rows, request = values.cpu().numpy()
        count, seconds, waited = len(rows), time.perf_counter() - self._clock, self._waited
        self.restart_clock()
        stop = StopRequest(round(request[0]))
        return StepRows(np.stack(rows), seconds / count, waited / count, stop)
