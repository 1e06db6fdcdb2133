"""Measured training speeds: a table that comes with the package, and the user's own beside it.

One entry is what one run showed. Only measurements are in a table; what is concluded from one for
another batch, input or backbone is marked as an estimate, by the rules in docs/PLAN.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.plan.network import PhaseName
from data_shards.errors import ConfigError, DataError
from data_shards.storage.atomic import atomic_write, disk_errors
from reid_train.config import TrainConfig, explain

PACKAGED = Path(__file__).with_name("throughput.json")
OWN = Path("~/.config/reid/throughput.json")

Origin = Literal["measured", "given", "estimated", "assumed"]
"""Where a figure is from: a run, a flag, a rule applied to a measurement, or nothing but habit."""


class Measurement(BaseModel):
    """The speed of one run in one of its phases."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    """GPU type, as `--gpu-type` names it; 'cpu' for a worker with one thread."""
    backbone: str
    stripes: int = Field(ge=0)
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    phase: PhaseName
    precision: str
    """As configured: 'auto' stands for what the device does by itself."""
    compile: bool = False
    workers: int = Field(default=1, ge=1)
    """Workers of the run. With several, what they tell each other is in the figure."""
    batch: int = Field(ge=1)
    """Images of a worker's share of a global batch."""
    images_per_second: float = Field(gt=0, allow_inf_nan=False)
    """Of all workers together."""
    gigaflops: float = Field(gt=0, allow_inf_nan=False)
    """Of an image, forward and backward, as `network.describe` counts them."""
    decoding: Literal["beside", "inside"]
    """Whether loader processes decoded, or the worker itself did (`--loader.workers 0`)."""
    date: str
    source: str

    @property
    def seconds(self) -> float:
        """Of a global batch."""
        return self.workers * self.batch / self.images_per_second


@dataclass(frozen=True)
class Speed:
    """Seconds that a worker needs for its share of a batch, where that is from, and in words."""

    seconds: float
    origin: Origin
    note: str
    talk: bool = False
    """Whether what workers tell each other is in it already."""
    decoding: bool = False
    """Whether decoding is in it already."""


def read_table(path: Path) -> list[Measurement]:
    """The measurements of a file; none if there is no file.

    Raises:
        DataError: it is not such a table.
    """
    try:
        values = json.loads(path.read_bytes())
        return [Measurement.model_validate(entry) for entry in values["measurements"]]
    except FileNotFoundError:
        return []
    except ValidationError as error:
        raise DataError(f"{path} is not a throughput table: {explain(error)}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a throughput table: {error}") from None


def add_to_table(path: Path, entries: Iterable[Measurement]) -> None:
    """Add measurements to a file, made if need be; the same run measured again replaces itself."""
    entries = list(entries)
    fresh = {(entry.source, entry.phase) for entry in entries}
    kept = [entry for entry in read_table(path) if (entry.source, entry.phase) not in fresh]
    table = {"measurements": [entry.model_dump() for entry in (*kept, *entries)]}
    with disk_errors(path), atomic_write(path) as file:
        file.write((json.dumps(table, indent=2) + "\n").encode())


def speed_of(
    table: list[Measurement],
    device: str,
    config: TrainConfig,
    phase: PhaseName,
    workers: int,
    gigaflops: dict[PhaseName, float],
) -> Speed:
    """How long a worker takes for its share of a global batch.

    Args:
        table: measurements.
        device: GPU type.
        config: of the run; its `workers` does not matter.
        phase: of the training.
        workers: that share the batch.
        gigaflops: of an image of this run, by phase.

    Raises:
        ConfigError: nothing was measured that this could be concluded from; says how to.
    """
    batch = config.batch_size // workers
    known = [
        entry
        for entry in table
        if (entry.device, entry.precision, entry.compile)
        == (device, config.precision, config.compile)
    ]
    same = [entry for entry in known if _network(entry) == _wanted(config)]
    for entry in same:
        if (entry.phase, entry.batch, entry.workers) == (phase, batch, workers):
            return Speed(
                entry.seconds, "measured", entry.source, workers > 1, entry.decoding == "inside"
            )
    alone = [entry for entry in known if entry.workers == 1]
    if not alone:
        raise ConfigError(_unmeasured(table, device, config, batch))
    mine = [entry for entry in alone if _network(entry) == _wanted(config)] or alone
    mine = [entry for entry in mine if entry.phase == phase] or mine
    near = min(mine, key=lambda entry: abs(entry.gigaflops - gigaflops[phase]))
    alike = [e for e in mine if (_network(e), e.phase) == (_network(near), near.phase)]
    seconds, how = _at_batch({entry.batch: entry.seconds for entry in alike}, batch)
    ratio = gigaflops[phase] / near.gigaflops
    exact = how == "" and _network(near) == _wanted(config) and near.phase == phase
    if _network(near) != _wanted(config) or near.phase != phase:
        how += f", × {ratio:.2f} by operations"
        seconds *= ratio
    note = near.source if exact else f"from {near.source}{how}"
    return Speed(
        seconds, "measured" if exact else "estimated", note, decoding=near.decoding == "inside"
    )


def _network(entry: Measurement) -> tuple[str, int, int, int]:
    return entry.backbone, entry.stripes, entry.height, entry.width


def _wanted(config: TrainConfig) -> tuple[str, int, int, int]:
    return config.model.backbone, config.model.stripes, config.image.height, config.image.width


def _at_batch(seconds: dict[int, float], batch: int) -> tuple[float, str]:
    """Seconds of a batch: measured, on the line through two that were, or in proportion to one."""
    if batch in seconds:
        return seconds[batch], ""
    sizes = sorted(seconds, key=lambda size: abs(size - batch))[:2]
    if len(sizes) == 1:
        # A GPU's step takes some least time, which one measurement does not tell.
        best = ", at best" if batch < sizes[0] else ""
        return (
            seconds[sizes[0]] * batch / sizes[0],
            f", in proportion to a batch of {sizes[0]}{best}",
        )
    low, high = sorted(sizes)
    slope = max(seconds[high] - seconds[low], 0.0) / (high - low)
    # Two noisy figures may cross below nothing: a smaller batch takes no less than its share.
    least = min(seconds[size] * min(batch / size, 1.0) for size in sizes)
    value = max(seconds[low] + slope * (batch - low), least)
    return value, f", between batches of {low} and {high}"


def _unmeasured(table: list[Measurement], device: str, config: TrainConfig, batch: int) -> str:
    names = sorted({entry.device for entry in table})
    what = f"precision {config.precision}" + (" compiled" if config.compile else "")
    if device in names:
        others = sorted({entry.precision for entry in table if entry.device == device})
        there = f"{device} was measured with precision {', '.join(others)} only"
    else:
        there = f"there are measurements of {', '.join(names) or 'nothing'}"
    return (
        f"nothing was measured on {device!r} with {what}: {there}. Measure it: train two epochs on "
        f"one such worker with a batch of about {batch}, then `python -m cluster measure RUN "
        f"--gpu-type {device}`; or give --images-per-second of one worker"
    )
