"""One training worker's place among the others, and where it sends what it learns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import torch

from data_shards.cache import ShardCache

UNMEASURED = -1.0
"""The mAP that a checkpoint between evaluations is reported with: below every measured one, and no
NaN, which Ray's record of a run gives back as null."""


class Asked(IntEnum):
    """What a run is asked to do at its next look at the losses."""

    NOTHING = 0
    SAVE = 1
    """Write a checkpoint and go on: a machine will be taken away."""
    STOP = 2
    """Write a checkpoint and end."""


class Stopped(Exception):
    """The run ends early, as it was asked to; every rank raises it at the same step."""


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
    asked: Callable[[], Asked] = lambda: Asked.NOTHING
    """What the run is asked to do; every rank calls it equally often, the first rank's counts."""
    scratch: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))
    """Where checkpoints are written before they are reported."""

    def slice(self, size: int) -> slice:
        """This rank's contiguous part of `size` rows."""
        return slice(size * self.rank // self.world, size * (self.rank + 1) // self.world)
