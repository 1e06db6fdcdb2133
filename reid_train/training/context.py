"""The place of one training worker among the others, and where it reports to."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from enum import IntEnum
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist

from data_shards.cache import ShardCache
from data_shards.progress import Progress, silent

RANKING = timedelta(days=7)  # longer than any gallery takes


class StopRequest(IntEnum):
    """What a run is asked to do when it next reads its losses."""

    NONE = 0
    SAVE = 1  # write a checkpoint and continue: a machine will be taken away
    STOP = 2  # write a checkpoint and end


class Stopped(Exception):
    """The run ends early because it was asked to. Every rank raises it at the same step."""


@dataclass
class WorkerContext:
    """What differs between a test, a laptop and a cluster. The loop depends on nothing else.

    All ranks call `report` (metrics and, on rank 0, a checkpoint's folder) and `stop_request` (rank
    0's answer counts) equally often. Only rank 0 calls `log` (values at a global step), `show` (the
    state of the training, for the console) and `progress` (of an evaluation).
    """

    rank: int
    world: int
    device: torch.device
    cache: ShardCache
    report: Callable[[dict[str, float], Path | None], None] = lambda metrics, folder: None
    log: Callable[[dict[str, float], int], None] = lambda values, step: None
    show: Callable[[dict[str, object]], None] = lambda state: None
    progress: Progress = silent
    stop_request: Callable[[], StopRequest] = lambda: StopRequest.NONE
    # Where checkpoints are written before they are reported.
    scratch: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))

    @cached_property
    def host_group(self) -> dist.ProcessGroup | None:
        """Group of all ranks for tensors on the host; None for one rank. First used by all at once.

        The ranks wait in it as long as rank 0 ranks a gallery. If rank 0 dies, they get an error.
        """
        if self.world == 1:
            return None
        return dist.new_group(backend="gloo", timeout=RANKING)  # type: ignore[return-value]

    def slice(self, size: int) -> slice:
        """Return this rank's contiguous part of `size` rows."""
        return slice(size * self.rank // self.world, size * (self.rank + 1) // self.world)
