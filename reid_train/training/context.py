"""The place of one training worker among the others, and where it reports to."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import torch

from data_shards.cache import ShardCache
from data_shards.progress import Progress, silent

UNMEASURED = -1.0
"""The mAP of a checkpoint that was not evaluated. It is below every measured mAP, and it is not NaN
because NaN is not valid JSON."""


class StopRequest(IntEnum):
    """What a run is asked to do when it next reads its losses."""

    NONE = 0
    SAVE = 1
    """Write a checkpoint and continue: a machine will be taken away."""
    STOP = 2
    """Write a checkpoint and end."""


class Stopped(Exception):
    """The run ends early because it was asked to. Every rank raises it at the same step."""


@dataclass
class WorkerContext:
    """What differs between a test, a laptop and a cluster. The loop depends on nothing else."""

    rank: int
    world: int
    device: torch.device
    cache: ShardCache
    report: Callable[[dict[str, float], Path | None], None] = lambda metrics, folder: None
    """Takes metrics and, on rank 0, a checkpoint's folder. All ranks call it equally often."""
    log: Callable[[dict[str, float], int], None] = lambda values, step: None
    """Takes values to track at a global step. Only rank 0 calls it."""
    show: Callable[[dict[str, object]], None] = lambda state: None
    """Takes the state of the training for the console. Only rank 0 calls it."""
    progress: Progress = silent
    """Takes the progress of an evaluation. Only rank 0 calls it."""
    stop_request: Callable[[], StopRequest] = lambda: StopRequest.NONE
    """Returns what the run is asked to do. All ranks call it equally often; rank 0's answer counts.
    """
    scratch: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))
    """Where checkpoints are written before they are reported."""

    def slice(self, size: int) -> slice:
        """Return this rank's contiguous part of `size` rows."""
        return slice(size * self.rank // self.world, size * (self.rank + 1) // self.world)
