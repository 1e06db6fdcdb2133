"""A plan as a person reads it, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from cluster.plan.estimate import NAMES, Estimate

if TYPE_CHECKING:
    from cluster.plan.command import Planned


def show(planned: Planned, console: Console) -> None:
    """Print what the run takes, how it scales, where the figures are from, and what limits it."""
    options = planned.options
    title = f"{options.config.recipe} on {options.gpus} × {options.gpu_type}"
    table = Table(title=title, show_header=False, box=None, pad_edge=False)
    for name, value in _rows(planned):
        table.add_row(name, value)
    console.print(table)
    console.print(_scaling(planned))
    facts = Table("the estimate rests on", "", "", box=None, pad_edge=False)
    for name, (value, origin) in planned.facts.items():
        facts.add_row(name.replace("_", " "), value, origin)
    console.print(facts)
    console.print(_sentence(planned), highlight=False)
    console.print(_caution(planned), highlight=False)


def _rows(planned: Planned) -> list[tuple[str, str]]:
    chosen, needed, network = planned.chosen, planned.memory, planned.network
    work, layout = chosen.workload, chosen.workload.layout
    config = planned.options.config
    simulated = "" if work.exact else ", simulated: the cache is smaller than the dataset"
    rows = [
        ("time", f"{_duration(chosen.seconds)}: {_parts(chosen)}"),
        ("training", f"{work.steps:,} steps of {work.images} images"),
        (
            "evaluation",
            f"{work.evaluations} × {work.queries:,} queries and {work.gallery:,} gallery images",
        ),
        (
            "from S3",
            f"{_bytes(work.bytes)} in {work.gets:,} GETs: {work.shards:,} shards on "
            f"{layout.nodes} node{'s' * (layout.nodes > 1)}{simulated}"
            if work.openings
            else "nothing: the dataset is a folder, read where it lies",
        ),
        (
            "cache",
            f"{_bytes(needed.cache)} a node; {_bytes(needed.cache_whole)} hold all, "
            f"{_bytes(needed.cache_least)} is the least ({_bytes(config.loader.cache_bytes)} "
            "allowed)",
        ),
        (
            "checkpoints",
            f"{sum(work.checkpoints.values())} of {_bytes(network.checkpoint('all'))} to the "
            "output; up to three are kept",
        ),
        (
            "memory",
            f"{_bytes(needed.device)} {'of a worker' if planned.options.on_cpu else 'of a GPU'} to "
            f"train, {_bytes(needed.worker)} of the first worker's process, "
            f"{_bytes(needed.shared)} of a node's /dev/shm",
        ),
    ]
    if (prices := planned.options.prices) is not None:
        rows.append(("cost", f"{prices.cost(chosen):,.2f} in your prices"))
    return rows


def _scaling(planned: Planned) -> Table:
    columns = ["workers", "nodes", "images/s", "efficiency", "time", "limit"]
    prices = planned.options.prices
    table = Table(*columns, *(["cost"] if prices else []), box=None, pad_edge=False)
    first = next(iter(planned.estimates.values()))
    for workers, found in planned.estimates.items():
        speed = found.images_per_second()
        ideal = first.images_per_second() / first.workload.layout.workers * workers
        row = [
            str(workers),
            str(found.workload.layout.nodes),
            f"{speed:,.1f}",
            f"{speed / ideal:.0%}",
            _duration(found.seconds),
            NAMES[found.limit],
        ]
        chosen = workers == planned.options.gpus
        style = "bold" if chosen else None
        table.add_row(*row, *([f"{prices.cost(found):,.2f}"] if prices else []), style=style)
    return table


def _sentence(planned: Planned) -> str:
    """Which resource is the limit, and with how many workers another one is."""
    workers, limit = planned.options.gpus, planned.chosen.limit
    text = f"With {workers} worker{'s' * (workers > 1)} the limit is {NAMES[limit]}"
    for more, found in planned.estimates.items():
        if more > workers and found.limit != limit:
            return f"{text}; from {more} on it is {NAMES[found.limit]}."
    most = max(planned.estimates)
    return f"{text}, and stays so up to {most}, the most that can share this batch."


def _caution(planned: Planned) -> str:
    names = [
        name.replace("_", " ")
        for name, (_, origin) in planned.facts.items()
        if origin in ("assumed", "estimated")
    ]
    text = "Steps, images and checkpoints are exact, and so are bytes and GETs of shards "
    text += "as long as nothing fails." if planned.chosen.workload.exact else "but for the cache."
    if names:
        text += f" Time is no better than what is not measured: {', '.join(names)}."
    return text


def to_json(planned: Planned) -> dict[str, Any]:
    """Everything, in seconds and bytes."""
    prices = planned.options.prices
    return {
        "recipe": planned.options.config.recipe,
        "data": planned.options.config.data,
        "gpu_type": planned.options.gpu_type,
        "gpus": planned.options.gpus,
        "plan": _values(planned.chosen) | {"cost": prices.cost(planned.chosen) if prices else None},
        "memory": asdict(planned.memory),
        "scaling": [_values(found) for found in planned.estimates.values()],
        "facts": {n: {"value": v, "origin": origin} for n, (v, origin) in planned.facts.items()},
    }


def _values(found: Estimate) -> dict[str, Any]:
    work = found.workload
    return {
        "workers": work.layout.workers,
        "nodes": work.layout.nodes,
        "limit": found.limit,
        "seconds": found.seconds,
        "parts": {name: getattr(found, name) for name in PARTS},
        "step_seconds": {phase: step.seconds for phase, step in found.steps.items()},
        "images_per_second": {phase: found.images_per_second(phase) for phase in found.steps},
        "steps": work.steps,
        "images": work.steps * work.images,
        "evaluations": work.evaluations,
        "images_embedded": work.embedded,
        "checkpoints": sum(work.checkpoints.values()),
        "shards": work.shards,
        "gets": work.gets,
        "bytes": work.bytes,
        "exact": work.exact,
    }


PARTS = ("start", "train", "evaluate", "checkpoint", "wait", "finish")


def _parts(found: Estimate) -> str:
    parts = ((name, getattr(found, name)) for name in PARTS)
    return ", ".join(f"{name} {_duration(seconds)}" for name, seconds in parts if seconds >= 0.5)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
