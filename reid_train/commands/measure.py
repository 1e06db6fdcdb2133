"""Measuring embeddings as a person sees it: memory said first, progress, a table, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import psutil
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from data_shards.storage import open_storage
from reid_train.evaluation.embedding_store import read_embeddings
from reid_train.evaluation.evaluate import Measurement, Measures, Progress, measure
from reid_train.evaluation.ground_truth import Labels
from reid_train.evaluation.memory import distributed_memory, memory_needed


def evaluate_embeddings(
    url: str, measures: Measures, console: Console, output: str | None = None
) -> Measurement:
    """Read embeddings, say what measuring them takes, measure, show and write the outcome.

    Raises:
        DataError, ConfigError, StorageError: see `read_embeddings` and `measure`.
    """
    measures.check()
    found = evaluate_arrays(*read_embeddings(url), measures, console)
    if output:
        write_measurement(output, found, url)
        console.print(f"written to {output}")
    return found


def evaluate_arrays(
    query: np.ndarray, gallery: np.ndarray, labels: Labels, measures: Measures, console: Console
) -> Measurement:
    """Measure embeddings that are in memory, with progress, and show the outcome."""
    say_needed(len(query), len(gallery), query.shape[-1], measures, console)
    with progress_bars(console) as progress:
        found = measure(query, gallery, labels, measures, progress)
    show(found, console)
    return found


def say_needed(
    queries: int,
    gallery: int,
    dimensions: int,
    measures: Measures,
    console: Console,
    *,
    workers: int = 1,
) -> None:
    """Say how much there is to measure and what memory that takes, of this and other processes."""
    available = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    memory = "memory with re-ranking" if measures.rerank else "memory"
    if workers == 1:
        needed = memory_needed(queries, gallery, dimensions, measures)
        said = f"{needed / 1e9:.1f} GB of {memory}, {available / 1e9:.1f} GB available"
    else:
        parts = distributed_memory(queries, gallery, dimensions, measures, workers)
        needed = parts.driver + workers * parts.worker + parts.node
        said = (
            f"{parts.driver / 1e9:.1f} GB of {memory} in the driver, {parts.worker / 1e9:.1f} GB "
            f"in each of {workers} workers, and {parts.node / 1e9:.1f} GB that workers of a node "
            f"share; {available / 1e9:.1f} GB available here"
        )
    console.print(
        f"{queries:,} queries × {gallery:,} gallery images × {dimensions:,} dimensions: at most "
        f"about {said}"
    )
    if needed > available:
        where = " on one machine" if workers > 1 else ""
        console.print(f"[yellow]this may not fit{where}; the machine will swap or stop the program")


def write_measurement(url: str, found: Measurement, source: str) -> None:
    """Write a measurement as JSON to a path or s3://…, whole or not at all."""
    folder, _, key = url.rpartition("/")
    text = json.dumps({"embeddings": source, **found.to_json()}, indent=2, ensure_ascii=False)
    storage = open_storage(folder or ("/" if url.startswith("/") else "."))
    storage.write(key, text.encode() + b"\n")


def show(found: Measurement, console: Console) -> None:
    """Print a measurement as a table, and one of camera pairs if there are any."""
    result, measures = found.result, found.measures
    steps = [measures.metric]
    steps += [f"query expansion {measures.expand}"] if measures.expand else []
    steps += [f"database augmentation {measures.augment}"] if measures.augment else []
    if measures.rerank:
        steps += [f"re-ranked (k1 {measures.k1}, k2 {measures.k2}, λ {measures.weight:g})"]
    table = Table(title=", ".join(steps), title_justify="left")
    for name in result.summary():
        table.add_column(name, justify="right")
    table.add_row(*_percent(result.summary()))
    console.print(table)
    if result.valid < found.queries:
        console.print(f"{found.queries - result.valid:,} queries without a match were left out")
    if found.pairs:
        names = list(next(iter(found.pairs.values())).summary())
        # Narrow, so that nine columns fit a terminal.
        pairs = Table(title="by camera pair, in %", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in ("query", "gallery", "queries"):
            pairs.add_column(name)
        for name in names:
            pairs.add_column(name, justify="right")
        for (a, b), part in found.pairs.items():
            values = [f"{100 * value:.2f}" for value in part.summary().values()]
            pairs.add_row(str(a), str(b), f"{part.valid:,}", *values)
        console.print(pairs)


def _percent(summary: dict[str, float]) -> list[str]:
    return [f"{100 * value:.2f} %" for value in summary.values()]


@contextmanager
def progress_bars(console: Console) -> Iterator[Progress]:
    """A bar with time left for each stage, for `measure` to report to."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    with Bars(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield report
