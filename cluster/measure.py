"""`python -m cluster measure`: measured training speeds, of the package and of the user's runs."""

import json
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import tyro
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_shards.errors import DataError
from data_shards.progress import display, phase
from data_shards.storage.atomic import atomic_write, disk_errors
from reid_train.config import TrainConfig, explain

PACKAGED = Path(__file__).parent / "plan" / "throughput.json"
OWN = Path("~/.config/reid/throughput.json")
LOOKS = 3  # how often a run must have recorded its speed. The first record includes the warm-up.


class Measurement(BaseModel):
    """The speed of one run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str  # as `--gpu-type` names it; 'cpu' for a worker with one core
    backbone: str
    stripes: int = Field(ge=0)
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    phase: Literal["heads", "all"]  # the backbone frozen, or everything trained
    precision: str  # as configured: 'auto' is the device's default
    compile: bool = False
    workers: int = Field(default=1, ge=1)
    batch: int = Field(ge=1)  # images of a worker's share of a global batch
    images_per_second: float = Field(gt=0, allow_inf_nan=False)  # of all workers together
    gigaflops: float = Field(gt=0, allow_inf_nan=False)  # of an image, forward and backward
    decoding: Literal["beside", "inside"]  # by loader processes, or by the worker itself
    date: str
    source: str

    @property
    def shape(self) -> tuple[str, int, int, int]:
        """All that decides the operations of an image."""
        return self.backbone, self.stripes, self.height, self.width


def measure(run: tyro.conf.Positional[str], gpu_type: str, table: Path = OWN) -> None:
    """Add the speed of a run to your table of measured speeds.

    The run needs 3 × --tracking.every-steps optimizer steps (30 by default) with everything
    trained, and a checkpoint.

    Args:
        run: The run's folder or s3:// URL, `<output>/<name>`.
        gpu_type: The GPU type of its workers, in your words; 'cpu' for none.
        table: Where to add it.
    """
    with display() as progress, phase(progress, "reading the run"):
        found, path = measured(run, gpu_type), table.expanduser()
    add_to_table(path, found)
    print(
        f"{found.device}  {found.backbone} {found.height} × {found.width}  {found.workers} × "
        f"{found.batch}  {found.images_per_second:,.1f} images/s  → {path}"
    )


def steps_needed(config: TrainConfig) -> int:
    """Optimizer steps with everything trained that a run needs to be measured."""
    return LOOKS * config.tracking.every_steps


def measured(run: str, device: str) -> Measurement:
    """The median speed of a run while everything was trained, from its last checkpoint."""
    from cluster.plan.estimate import count, describe, plans
    from data_shards.dataset import Dataset
    from data_shards.storage import open_storage
    from reid_train.runs.run_dir import Run
    from reid_train.training.checkpoint import HISTORY
    from reid_train.training.compiled import compiles
    from reid_train.training.history import History

    output, _, name = run.rstrip("/").rpartition("/")
    config = Run.read(output or ".", name).config
    if device == "cpu" and config.cpus_per_worker != 1:
        raise DataError(
            f"{run} had workers of {config.cpus_per_worker} cores, and a plan counts a core for "
            "each: measure a run with --cpus-per-worker 1, or give it another --gpu-type"
        )
    storage = open_storage(run)
    histories = [key for key, _ in storage.list("checkpoint_") if key.endswith(f"/{HISTORY}")]
    if not histories:
        raise DataError(f"{run} has no checkpoint yet: wait for its first evaluation")
    with TemporaryDirectory() as folder:
        storage.download(max(histories), Path(folder) / HISTORY)
        steps = History.load(Path(folder) / HISTORY).steps
    dataset = Dataset.open(config.data)
    frozen = count(config, dataset, plans(config, dataset)).frozen_steps
    speed = np.array(steps["images_per_second"])[np.array(steps["step"]) > frozen]
    # All steps between two records have the same speed.
    records = speed[np.flatnonzero(np.diff(speed, prepend=np.nan))]
    if len(records) < LOOKS:
        raise DataError(
            f"{run} is too short to measure: it has {len(speed)} steps with everything trained and "
            f"needs {steps_needed(config)}, which is {LOOKS} × --tracking.every-steps"
        )
    model, image = config.model, config.image
    return Measurement(
        device=device, backbone=model.backbone, stripes=model.stripes, height=image.height,
        width=image.width, phase="all", precision=config.precision,
        compile=compiles(config, device), workers=config.workers,
        batch=config.batch_size // config.workers,
        images_per_second=round(float(np.median(records[1:])), 3),
        gigaflops=describe(config, len(dataset.identities)).flops / 1e9,
        decoding="beside" if config.loader.workers else "inside",
        date=date.today().isoformat(), source=name,
    )  # fmt: skip


def read_table(path: Path) -> list[Measurement]:
    """The measurements of a file; none if there is no file."""
    try:
        values = json.loads(path.read_bytes())
        return [Measurement.model_validate(entry) for entry in values["measurements"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = explain(error) if isinstance(error, ValidationError) else error
        raise DataError(f"{path} is not a throughput table: {why}") from None


def add_to_table(path: Path, entry: Measurement) -> None:
    """Add a measurement to a file, created if need be.

    It replaces an older one of the same run: of its name, on that device, with these settings.
    """
    measured = {"images_per_second", "gigaflops", "date"}

    def run(one: Measurement) -> dict[str, Any]:
        return one.model_dump(exclude=measured)

    kept = [old for old in read_table(path) if run(old) != run(entry)]
    write_json(path, {"measurements": [one.model_dump() for one in (*kept, entry)]})


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write values to a file, atomically."""
    with disk_errors(path), atomic_write(path) as file:
        file.write((json.dumps(values, indent=2) + "\n").encode())
