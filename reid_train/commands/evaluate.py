"""`python -m reid_train evaluate` and `embed`: what they are told, and what they do in turn."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import ray
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_shards.dataset import Dataset
from data_shards.errors import ConfigError
from reid_train.commands.measure import (
    evaluate_embeddings,
    progress_bars,
    say_needed,
    show,
    write_measurement,
)
from reid_train.config import LoaderConfig
from reid_train.evaluation.distributed import measure_distributed
from reid_train.evaluation.embedding_job import embed_dataset
from reid_train.evaluation.embedding_store import ROWS, EmbeddingFiles
from reid_train.evaluation.evaluate import Measurement, Measures
from reid_train.runs.ray_trainer import start_ray
from reid_train.tracking.tracker import Tracker
from reid_train.tracking.uris import registry_uri


@dataclass(frozen=True)
class Embed:
    """Embed a dataset with a model; write Parquet parts, and go on where an earlier try ended.

    python -m reid_train embed --model models:/reid-msmt17@champion --data s3://bucket/msmt17
        --out s3://bucket/embeddings
    """

    model: str
    """models:/name@champion, models:/name/3, or a checkpoint's or run's folder or s3:// URL."""
    data: str
    """Sharded dataset: s3://bucket/prefix or a folder."""
    out: str
    """Where the parts go: s3://bucket/prefix or a folder."""
    splits: tuple[str, ...] = ("query", "gallery")
    """Which splits."""
    workers: int = 1
    """Ray workers, each with a copy of the model."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda gives each worker a GPU; auto does where enough are free."""
    batch: int | None = None
    """Images that a worker embeds at a time; None takes the model's own."""
    tracking_uri: str | None = None
    """MLflow, for models:/…; by default MLFLOW_TRACKING_URI."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)


@dataclass(frozen=True)
class Evaluate:
    """Measure a model on a dataset, or a file of embeddings from any system.

    python -m reid_train evaluate --model models:/reid-msmt17@champion --data s3://bucket/msmt17

    python -m reid_train evaluate --embeddings features.npz --rerank
    """

    embeddings: str | None = None
    """Parquet file, folder of parts, or npz, to measure; with --model: where to keep them."""
    model: str | None = None
    """models:/name@champion, models:/name/3, or a checkpoint's or run's folder or s3:// URL."""
    data: str | None = None
    """Sharded dataset whose query and gallery the model is measured on."""
    output: str | None = None
    """Where to write the measurement as JSON; a path or s3://…"""
    workers: int = 1
    """Ray workers that embed; more than one also share the measuring of Parquet embeddings."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda gives each embedding worker a GPU; auto does where enough are free."""
    batch: int | None = None
    """Images that a worker embeds at a time; None takes the model's own."""
    tracking_uri: str | None = None
    """MLflow, for models:/… and to log to; by default MLFLOW_TRACKING_URI."""
    experiment: str = "reid-evaluation"
    """MLflow experiment that a model's measurement is logged to."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    measures: Annotated[Measures, tyro.conf.arg(name="")] = field(default_factory=Measures)


def embed(settings: Embed, console: Console) -> int:
    """Run `embed`; return the number of images."""
    images = _embed(settings, console)
    console.print(f"{images:,} embeddings at {settings.out}", highlight=False, soft_wrap=True)
    return images


def _embed(settings: Embed, console: Console) -> int:
    start_ray(settings.workers)
    with _bar(console) as progress:
        return embed_dataset(
            settings.model,
            settings.data,
            settings.out,
            splits=settings.splits,
            workers=settings.workers,
            device=settings.device,
            tracking_uri=settings.tracking_uri,
            loader=settings.loader,
            batch=settings.batch,
            progress=progress,
        )


def evaluate(settings: Evaluate, console: Console) -> Measurement:
    """Run `evaluate`: embed if a model is given, measure, show, write, and log."""
    measures = settings.measures
    measures.check()
    if settings.model is None:
        if settings.embeddings is None:
            raise ConfigError("give --embeddings FILE, or --model and --data")
        if settings.data or settings.tracking_uri:
            raise ConfigError(
                "--data and --tracking-uri go with --model: --embeddings are measured as they are"
            )
        found = _measure(settings.embeddings, settings, console)
        _write(settings, found, settings.embeddings, console)
        return found
    if settings.data is None:
        raise ConfigError("--model needs --data: the sharded dataset to measure it on")
    if (settings.embeddings or "").endswith(".npz"):
        raise ConfigError("a model's embeddings are kept as Parquet: --embeddings is a folder here")
    dataset = Dataset.open(settings.data)
    measures.check_sizes(len(dataset.index("query")), len(dataset.index("gallery")))
    start_ray(settings.workers)
    if settings.embeddings is None and len(ray.nodes()) > 1:
        raise ConfigError(
            "on several nodes, say where they can all write: --embeddings s3://bucket/prefix"
        )
    place = nullcontext(settings.embeddings) if settings.embeddings else _temporary()
    with place as out:
        assert out is not None
        loader, uri = settings.loader, settings.tracking_uri
        _embed(
            Embed(
                model=settings.model,
                data=settings.data,
                out=out,
                workers=settings.workers,
                device=settings.device,
                batch=settings.batch,
                tracking_uri=uri,
                loader=loader,
            ),
            console,
        )
        found = _measure(out, settings, console)
    _write(settings, found, f"{settings.model} on {settings.data}", console)
    _log(settings, found, dataset)
    return found


def _measure(url: str, settings: Evaluate, console: Console) -> Measurement:
    measures, workers = settings.measures, settings.workers
    if url.endswith(".npz") and workers > 1:
        console.print("an npz file is measured in one process; Parquet is what workers share")
    if url.endswith(".npz") or workers == 1:
        return evaluate_embeddings(url, measures, console)
    files = EmbeddingFiles.open(url)
    longest = max((piece.rows for piece in files.pieces), default=0)
    if longest > 4 * ROWS:
        console.print(
            f"{url} has row groups of {longest:,} rows, and one worker reads a whole one: "
            f"write it with row_group_size={ROWS} to share it better"
        )
    labels = files.labels
    sizes = len(labels.query_pid), len(labels.gallery_pid), files.dimensions
    start_ray(workers)
    say_needed(*sizes, measures, console, workers=workers)
    with progress_bars(console) as progress:
        found = measure_distributed(files, measures, workers=workers, progress=progress)
    show(found, console)
    return found


def _write(settings: Evaluate, found: Measurement, source: str, console: Console) -> None:
    if settings.output:
        write_measurement(settings.output, found, source)
        console.print(f"written to {settings.output}", highlight=False, soft_wrap=True)


def _log(settings: Evaluate, found: Measurement, dataset: Dataset) -> None:
    assert settings.model is not None
    given = settings.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not given and not settings.model.startswith("models:/"):
        return  # a checkpoint, and no MLflow was named
    uri = registry_uri(given)
    with Tracker.start(uri, settings.experiment, run_name=settings.model) as tracker:
        tracker.log_parameters({f"measures.{k}": v for k, v in vars(found.measures).items()})
        tracker.set_tags(
            {
                "model": settings.model,
                "dataset": dataset.url,
                "manifest_digest": dataset.manifest.digest,
                "evaluation_digest": dataset.manifest.evaluation_digest,
            }
        )
        # MLflow takes neither @ nor = in a name.
        summary = found.result.summary().items()
        tracker.log({k.replace("@", " at ").replace("=", " "): v for k, v in summary}, 0)


@contextmanager
def _temporary():
    with tempfile.TemporaryDirectory(prefix="reid-embeddings-") as folder:
        yield str(Path(folder))


@contextmanager
def _bar(console: Console):
    columns = TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("embedding", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
