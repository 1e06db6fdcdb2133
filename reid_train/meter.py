"""Losses of recent steps, held on the device until it is time to look at them."""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.distributed as dist

from reid_train.worker import Asked, Worker


class Meter:
    """Collects the losses of steps and turns them into rows; looking waits for the device."""

    def __init__(self, worker: Worker):
        self._worker = worker
        self._rows: list[torch.Tensor] = []
        self._clock = time.perf_counter()

    def restart_clock(self) -> None:
        """Leave the time since the last look out of the throughput (evaluation, checkpoints)."""
        self._clock = time.perf_counter()

    def add(self, row: torch.Tensor) -> None:
        """Take one step's (cross-entropy, triplet, penalty, gradient not finite) of this rank.

        (4,), without waiting.
        """
        self._rows.append(row)

    def read(self) -> tuple[np.ndarray, float, Asked]:
        """Rows since the last look, averaged over ranks, the steps per second, and what is asked.

        Returns:
            (n, 4) float64 cross-entropy, triplet, penalty and whether the gradient was not finite
            (0 or 1); steps a second; what the first rank was asked, the same on every rank.
        """
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
        return rows, len(rows) / seconds, Asked(round(asked[0]))
