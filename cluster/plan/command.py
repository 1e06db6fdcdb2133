"""`python -m cluster plan`: what a run will take before it is paid for."""

import shlex
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import tyro

from cluster.measure import OWN, PACKAGED, Measurement, read_table, steps_needed, write_json
from data_shards.command_line import program
from data_shards.errors import ConfigError
from data_shards.progress import display, make_console, phase
from reid_train.config import TrainConfig
from reid_train.recipes import parse_with_recipe


@dataclass(frozen=True)
class Plan:
    """What a run will take: time, S3, cache, memory, cost, and what limits it.

    Takes the flags of `python -m reid_train train`; `--gpus` stands for `--workers`. Reads the
    manifest, the index and a table of measured speeds; starts nothing. The package has the speed of
    an H100. For any other device, 'cpu' included, measure a run or give --images-per-second.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    gpus: int
    """Workers, one GPU each ('cpu': one core each). They must share the global batch equally."""
    gpu_type: str
    """H100, or a name that you gave to `python -m cluster measure`; 'cpu' for no GPUs."""
    gpus_per_node: int = 8
    """Workers of a full node."""
    network_gbit: float = 10.0
    """Of each node, to the others and to S3."""
    s3_gbit: float = float("inf")
    """Of S3, to all nodes together; by default no limit of its own."""
    interconnect_gbit: float = 100.0
    """Between the workers of a node; about 6 for 'cpu'."""
    collective_microseconds: float = 50.0
    """Of a small exchange between two workers; about 500 for 'cpu'."""
    images_per_second: float | None = None
    """Of one worker with its share of the batch, instead of a measured speed."""
    price_per_gpu_hour: float = 0.0
    """In your currency, as the other prices."""
    price_per_get: float = 0.0
    """For one GET request to S3."""
    price_per_gb: float = 0.0
    """For a gigabyte (10^9 bytes) that leaves S3."""
    table: Path = OWN
    """Speeds that you measured; they come before those of the package."""
    json: Path | None = None
    """Write everything to this file, too, in seconds and bytes."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int | float) and value < (0 if name.startswith("price") else 1e-9):
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} is {value}: give a number above 0")


def plan(*arguments: str) -> None:
    """Print what a run will take."""
    options = parse(list(arguments))
    show(options, values := make(options))
    if options.json is not None:
        write_json(options.json, values)


def parse(arguments: list[str]) -> Plan:
    """Read the flags; the recipe gives the defaults of all that `train` takes."""
    options = parse_with_recipe(
        lambda base: Plan(base, gpus=tyro.MISSING, gpu_type=tyro.MISSING),
        arguments,
        program("cluster", "reid-cluster") + " plan",
    )
    options = replace(options, config=options.config.replace(workers=options.gpus))
    if not options.config.data:
        raise ConfigError("--data is missing: give a folder or an s3://bucket/prefix")
    return options


def make(options: Plan) -> dict[str, Any]:
    """What a run takes, in seconds and bytes, on `options.gpus` and on other numbers of workers."""
    with display() as progress:
        with phase(progress, "loading PyTorch"):
            from cluster.plan import estimate as plan
        with phase(progress, "opening the dataset"):
            from data_shards.dataset import Dataset

            dataset = Dataset.open(options.config.data)

    config = options.config
    epochs = plan.plans(config, dataset)
    counts = plan.count(config, dataset, epochs)
    network = plan.describe(config, len(dataset.identities))
    table = [*read_table(options.table.expanduser()), *read_table(PACKAGED)]
    rows, notes = {}, {}
    for workers in (n for n in range(1, config.batch_size + 1) if config.batch_size % n == 0):
        here = replace(options, config=config.replace(workers=workers), gpus=workers)
        if (given := options.images_per_second) is None:
            speed = plan.speed_of(table, here.config, options.gpu_type, network)
        else:
            speed = plan.Speed(config.batch_size / workers / given, "--images-per-second")
        if speed is not None:
            read = plan.download(here, dataset, epochs, counts.evaluations)
            rows[workers] = plan.estimate(here, counts, network, read, speed)
            notes[workers] = f"{speed.seconds:.3g} s for a worker's share, from {speed.note}"
    if options.gpus not in rows:
        raise ConfigError(unmeasured(table, options))
    return {
        "recipe": config.recipe,
        "data": config.data,
        "gpu_type": options.gpu_type,
        "plan": rows[options.gpus],
        "scaling": list(rows.values()),
        "speed": notes[options.gpus],
        "checkpoint": network.weights + network.state,
        "memory": plan.memory(options, dataset, network),
    }


def unmeasured(table: list[Measurement], options: Plan) -> str:
    """Say which speeds are known, and how to measure another."""
    config = options.config
    known = sorted({f"{entry.device} ({entry.precision})" for entry in table})
    words = ["--recipe", config.recipe, "--data", config.data, "--output", "OUTPUT"]
    probe = f"--workers 1 --batch.steps-per-epoch {steps_needed(config)}"
    probe += " --cpus-per-worker 1" * (options.gpu_type == "cpu")
    return (
        f"no speed of {options.gpu_type} with precision {config.precision} is known, only of "
        f"{', '.join(known)}. Give --images-per-second of one worker, or measure it: `python -m "
        f"reid_train train {shlex.join(words)} --name probe {probe} --optimizer.frozen-epochs 0 "
        "--optimizer.epochs 1 --tracking.model-name off`, then `python -m cluster measure "
        f"OUTPUT/probe --gpu-type {shlex.quote(options.gpu_type)}`"
    )


def show(options: Plan, values: dict[str, Any]) -> None:
    """Print a plan as a person reads it."""
    from rich.filesize import decimal
    from rich.table import Table

    def duration(seconds: float) -> str:
        return str(timedelta(seconds=round(seconds)))

    config, row, needed = options.config, values["plan"], values["memory"]
    most = "" if row["exact"] else "at most, if the cache holds two windows of shards, "
    parts = (f"{name} {duration(took)}" for name, took in row["parts"].items() if took >= 1)
    lines = {
        "time": f"{duration(row['seconds'])}: {', '.join(parts)}",
        "training": f"{row['steps']:,} steps of {row['images'] // row['steps']} images",
        "evaluation": f"{row['evaluations']} × {row['queries']:,} queries and {row['gallery']:,} "
        "gallery images",
        "from S3": f"{most}{decimal(row['bytes'])} in {row['gets']:,} GETs: "
        f"{row['shards']:,} shards on {row['nodes']} node{'s' * (row['nodes'] > 1)}",
        "cache": f"{decimal(needed['cache'])} a node hold the dataset; "
        f"{decimal(config.loader.cache_bytes)} are allowed",
        "checkpoints": f"{row['checkpoints']} of {decimal(values['checkpoint'])}; three are kept",
        "memory": f"{decimal(needed['device'])} of a worker's device in float32, "
        f"{decimal(needed['shm'])} of a node's /dev/shm",
        "exchange": f"{row['exchanges']:,} small ones and {decimal(row['gradient_bytes'])} of "
        f"gradients a step; scales from {row['least_share']:,} images a worker on",
        "speed": values["speed"],
    }
    if options.gpus == 1:
        del lines["exchange"]
    if not row["gets"]:
        lines["from S3"] = "nothing: the dataset is a folder, read in place"
    priced = ["cost"] if row["cost"] else []
    if priced:
        lines["cost"] = f"{row['cost']:,.2f} in your prices"
    title = f"{config.recipe} on {options.gpus} × {options.gpu_type}"
    table = Table(title=title, show_header=False, box=None, pad_edge=False)
    for name, text in lines.items():
        table.add_row(name, text)
    columns = ["workers", "nodes", "images/s", "efficiency", "time", "limit", *priced]
    scaling = Table(*columns, box=None, pad_edge=False)
    first = values["scaling"][0]
    for other in values["scaling"]:
        workers, speed = other["workers"], other["images_per_second"]
        efficiency = speed / workers / (first["images_per_second"] / first["workers"])
        cells = [f"{workers}", f"{other['nodes']}", f"{speed:,.1f}", f"{efficiency:.0%}"]
        cells += [duration(other["seconds"]), other["limit"]]
        cells += [f"{other['cost']:,.2f}"] * len(priced)
        scaling.add_row(*cells, style="bold" if workers == options.gpus else None)
    best = min(values["scaling"], key=lambda other: other["seconds"])["workers"]
    advice = f"The limit is {row['limit']}."
    if best < options.gpus:
        advice += f" {options.gpus} GPUs are slower than {best}: use {best} GPU{'s' * (best > 1)}."
    make_console().print(table, scaling, advice)
