"""`python -m cluster plan` and `python -m cluster measure`."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console

from cluster.plan.estimate import Estimate, estimate
from cluster.plan.memory import Memory, memory
from cluster.plan.network import PHASES, Network, PhaseName, describe
from cluster.plan.options import Plan
from cluster.plan.throughput import (
    OWN,
    PACKAGED,
    Measurement,
    Origin,
    Speed,
    add_to_table,
    read_table,
    speed_of,
)
from cluster.plan.workload import Layout, workloads
from data_shards.command_line import program
from data_shards.dataset import Dataset
from data_shards.errors import ConfigError, DataError
from data_shards.storage import open_storage
from data_shards.storage.atomic import atomic_write, disk_errors
from reid_train.config import TrainConfig
from reid_train.model.precision import autocast
from reid_train.recipes import parse_with_recipe
from reid_train.runs.run_dir import Run
from reid_train.training.checkpoint import HISTORY
from reid_train.training.history import History
from reid_train.training.loop import epoch_plan, train_index


@dataclass(frozen=True)
class Planned:
    """A plan's outcome.

    Attributes:
        options: what was asked.
        network: of the recipe.
        estimates: by number of workers, all that can share the batch.
        memory: of the workers asked for.
        facts: figures that the estimate rests on, in words, and where each is from.
    """

    options: Plan
    network: Network
    estimates: dict[int, Estimate]
    memory: Memory
    facts: dict[str, tuple[str, Origin]]

    @property
    def chosen(self) -> Estimate:
        """The estimate for the workers asked for."""
        return self.estimates[self.options.gpus]


def plan(*arguments: str) -> None:
    """What a run will take before it is paid for: time, S3, cache, memory, cost, limits."""
    from cluster.plan.show import show, to_json

    options = parse(list(arguments))
    planned = make(options)
    show(planned, Console())
    if options.json is not None:
        text = json.dumps(to_json(planned), indent=2) + "\n"
        with disk_errors(options.json), atomic_write(options.json) as file:
            file.write(text.encode())


def parse(arguments: list[str]) -> Plan:
    """Read the flags; the recipe gives the defaults of all that `train` takes.

    Raises:
        ConfigError: an unknown recipe, or values that do not go together.
    """
    options = parse_with_recipe(
        lambda base: Plan(base, gpus=tyro.MISSING, gpu_type=tyro.MISSING),
        arguments,
        program("cluster", "reid-cluster") + " plan",
    )
    if not options.config.replace(workers=options.gpus).data:
        raise ConfigError("--data is missing: give a folder or an s3://bucket/prefix")
    return options


def make(options: Plan, dataset: Dataset | None = None) -> Planned:
    """Count, look up, estimate, for every number of workers that can share the batch.

    Raises:
        ReidError: the dataset cannot be read, or nothing was measured to conclude from.
    """
    config = options.config
    dataset = dataset or Dataset.open(config.data)
    network = describe(config, len(dataset.identities))
    machine, facts = options.machine()
    host, more = options.host(dataset)
    speeds = {}
    counts = [n for n in range(1, config.batch_size + 1) if config.batch_size % n == 0]
    for workers in counts:
        try:
            speeds[workers] = _speeds(options, network, workers)
        except ConfigError:
            if workers == options.gpus:
                raise
    layouts = [Layout(workers, options.per_node()) for workers in speeds]
    estimates = {
        work.layout.workers: estimate(
            work,
            network,
            machine,
            host,
            speeds[work.layout.workers],
            loaders=config.loader.workers,
            accumulate=config.batch.accumulate,
            mirror=config.evaluation.mirror,
        )
        for work in workloads(config, dataset, layouts)
    }
    used = {
        f"speed, {phase}": (f"{speed.seconds:.3g} s a worker's batch: {speed.note}", speed.origin)
        for phase, speed in speeds[options.gpus].items()
    }
    work = estimates[options.gpus].workload
    needed = memory(config, dataset, work, network, bf16=_bf16(options))
    return Planned(options, network, estimates, needed, used | more | facts)


def _speeds(options: Plan, network: Network, workers: int) -> dict[PhaseName, Speed]:
    """Of the phases that the run has."""
    config = options.config
    gigaflops: dict[PhaseName, float] = {p: network.phases[p].flops / 1e9 for p in PHASES}
    frozen = config.optimizer.frozen_epochs > 0
    phases: list[PhaseName] = [phase for phase in PHASES if phase == "all" or frozen]
    if options.images_per_second is None:
        table = [*read_table(options.table.expanduser()), *read_table(PACKAGED)]
        return {
            phase: speed_of(table, options.gpu_type, config, phase, workers, gigaflops)
            for phase in phases
        }
    speeds: dict[PhaseName, Speed] = {}
    for phase in phases:
        ratio = gigaflops[phase] / gigaflops["all"]
        seconds = config.batch_size / workers / options.images_per_second * ratio
        as_given = workers == options.gpus and phase == "all"
        note = "--images-per-second" + ("" if as_given else f", × {ratio:.2f} by operations")
        speeds[phase] = Speed(seconds, "given" if as_given else "estimated", note)
    return speeds


def _bf16(options: Plan) -> bool:
    """Whether the network runs in bfloat16; GPUs that have no bfloat16 are not told apart."""
    import torch

    if not options.on_cpu:
        return options.config.precision != "float32"
    return "autocast" in repr(autocast(options.config, torch.device("cpu")))


def measure(run: tyro.conf.Positional[str], gpu_type: str, table: Path = OWN) -> None:
    """Add what a finished run showed to your table of measured speeds.

    Args:
        run: The run's folder or s3:// URL, `<output>/<name>`.
        gpu_type: What its workers had, in your words; 'cpu' for none.
        table: Where to add it.
    """
    entries = measured(run, gpu_type)
    path = table.expanduser()
    add_to_table(path, entries)
    for entry in entries:
        print(
            f"{entry.device}  {entry.backbone} {entry.height} × {entry.width}  {entry.phase}  "
            f"{entry.workers} × {entry.batch}  {entry.images_per_second:,.1f} images/s  → {path}"
        )


def measured(run: str, device: str) -> list[Measurement]:
    """What a run's last checkpoint tells of its speed, a measurement for each phase.

    Raises:
        ConfigError: there is no such run.
        DataError: it has no checkpoint, or was too short.
    """
    output, _, name = run.rstrip("/").rpartition("/")
    config = Run.read(output or ".", name).config
    steps = _history(run).steps
    dataset = Dataset.open(config.data)
    network = describe(config, len(dataset.identities))
    frozen = sum(
        len(epoch_plan(config, train_index(dataset), epoch)) // config.batch.accumulate
        for epoch in range(config.optimizer.frozen_epochs)
    )
    at, speed = np.array(steps["step"]), np.array(steps["images_per_second"])
    entries = []
    for phase, here in (("heads", at <= frozen), ("all", at > frozen)):
        # Rows of one look share its speed. The first look of a phase has the warm-up in it.
        looks = speed[here][np.flatnonzero(np.diff(speed[here], prepend=np.nan))]
        if len(looks) >= 3:
            entries.append(_measurement(config, network, device, phase, looks[1:], run))  # type: ignore[arg-type]
    if not entries:
        raise DataError(
            f"{run} is too short to measure: it needs three looks at the losses in a phase; train "
            "more steps, or lower --tracking.every-steps"
        )
    return entries


def _history(run: str) -> History:
    storage = open_storage(run)
    found = [key for key, _ in storage.list("checkpoint_") if key.endswith(f"/{HISTORY}")]
    if not found:
        raise DataError(f"{run} has no checkpoint yet: wait for its first evaluation")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / HISTORY
        storage.download(max(found), path)
        return History.load(path)


def _measurement(
    config: TrainConfig,
    network: Network,
    device: str,
    phase: PhaseName,
    looks: np.ndarray,
    run: str,
) -> Measurement:
    return Measurement(
        device=device,
        backbone=config.model.backbone,
        stripes=config.model.stripes,
        height=config.image.height,
        width=config.image.width,
        phase=phase,
        precision=config.precision,
        compile=config.compile,
        workers=config.workers,
        batch=config.batch_size // config.workers,
        images_per_second=round(float(np.median(looks)), 3),
        gigaflops=network.phases[phase].flops / 1e9,
        decoding="beside" if config.loader.workers else "inside",
        date=date.today().isoformat(),
        source=run.rstrip("/").rpartition("/")[2],
    )
