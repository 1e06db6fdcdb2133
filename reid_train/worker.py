"""One training worker's place among the others, and where it sends what it learns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data_shards.cache import ShardCache

UNMEASURED = -1.0
"""The mAP that a checkpoint between evaluations is reported with: below every measured one, and no
NaN, which Ray's record of a run gives back as null."""


@dataclass
class Worker:
    """What differs between a test, a laptop and a cluster; the loop knows nothing else of them."""

    rank: int
    world: int
    device: torch.device
    cache: ShardCache
    report: Callable[[dict[str, float], Path | None], None] = lambda metrics, folder: None
    """Takes metrics and, on rank 0, a checkpoint's folder; every rank calls it equally often."""
    log: Callable[[dict[str, float], int], None] = lambda values, step: None
    """Takes values to track at a global step; called on rank 0."""
    show: Callable[[dict[str, object]], None] = lambda state: None
    """Takes the state of progress for a person; called on rank 0."""
    scratch: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))
    """Where checkpoints are written before they are reported."""

    def slice(self, size: int) -> slice:
        """This rank's contiguous part of `size` rows."""
        return slice(size * self.rank // self.world, size * (self.rank + 1) // self.world)
