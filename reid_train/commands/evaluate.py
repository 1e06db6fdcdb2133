"""`reid_train evaluate`: what it is told, and what it does in turn."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from data_shards.errors import ConfigError
from data_shards.progress import display, phase, say
from data_shards.records import EVALUATED
from reid_train.commands.embed import Embed, check_counts, connect_ray, require_found
from reid_train.config import LoaderConfig
from reid_train.evaluation.measures import Measures

if TYPE_CHECKING:
    from rich.console import Console

    from data_shards.dataset import Dataset
    from data_shards.images import ImageFolder
    from reid_train.evaluation.evaluate import Measurement
    from reid_train.evaluation.thresholds import Thresholds
    from reid_train.tracking.tracker import Tracker


@dataclass(frozen=True)
class Evaluate:
    """Measure models on datasets, or a file of embeddings from any system.

    python -m reid_train evaluate --model models:/reid-msmt17@champion --data s3://bucket/msmt17

    python -m reid_train evaluate --embeddings features.npz --rerank
    """

    embeddings: str | None = None
    """Parquet file, folder of parts, or npz, to measure; with --model: where to keep them."""
    model: tuple[str, ...] = ()
    """models:/name@champion, models:/name/3, or a checkpoint's or run's folder or s3:// URL."""
    data: tuple[str, ...] = ()
    """Sharded datasets, or folders of photos: ID/*.jpg, or query/ID/*.jpg and gallery/ID/*.jpg."""
    split: Literal["test", "validation"] = "test"
    """Whether these are the test split's or the validation split's."""
    output: str | None = None
    """Where to write the measurement as JSON, a list if there are several: a path or s3://…"""
    workers: int = 1
    """Ray workers that embed; if more than one, they also measure Parquet embeddings."""
    cpus_per_worker: int | None = None
    """Cores of each worker that embeds; by default the nodes' cores, shared by the workers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda gives each embedding worker a GPU; auto does if enough are free."""
    batch: int | None = None
    """Images that a worker embeds at a time; by default the model's evaluation.batch."""
    tracking_uri: str | None = None
    """MLflow, for models:/… and to log to; by default MLFLOW_TRACKING_URI."""
    experiment: str = "reid-evaluation"
    """MLflow experiment that a model's measurement is logged to."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    thresholds: bool = False
    """Also measure from which similarity on images show the same person; kept with models:/…"""
    measures: Annotated[Measures, tyro.conf.arg(name="")] = field(default_factory=Measures)

    def check(self) -> None:
        """Raise `ConfigError` for what does not go together or is out of range."""
        self.measures.check()
        cpus = self.cpus_per_worker
        check_counts(workers=self.workers, cpus_per_worker=cpus, batch=self.batch)
        output = self.output
        if output is not None and (output.endswith("/") or Path(output).is_dir()):  # "" is ".", too
            raise ConfigError(f"--output {output!r} is a folder: give the name of a file in it")
        if not self.model:
            if self.embeddings is None:
                raise ConfigError("give --embeddings FILE, or --model and --data")
            if self.data or self.tracking_uri:
                raise ConfigError(
                    "--data and --tracking-uri go with --model: --embeddings are measured as they "
                    "are"
                )
        elif not self.data:
            raise ConfigError("--model needs --data: the sharded dataset to measure it on")
        elif (self.embeddings or "").endswith(".npz"):
            raise ConfigError(
                "a model's embeddings are kept as Parquet: --embeddings is a folder here"
            )
        if self.split == "validation" and (self.embeddings or "").endswith(".npz"):
            raise ConfigError("npz files hold one query and gallery: leave out --split")


def evaluate(settings: Evaluate, console: Console) -> list[Measurement]:
    """Run the command: embed if a model is given, measure, show, write, and log.

    Returns:
        The measurement of each model on each dataset, a model's one after another.
    """
    settings.check()
    if not settings.model:
        assert settings.embeddings is not None
        found = _measure(settings.embeddings, settings, console)
        show(found, console)
        _write(settings, {"embeddings": settings.embeddings, **found.to_json()}, console)
        return [found]
    require_found(console, settings.model, settings.data, settings.tracking_uri)
    with display(console) as progress, phase(progress, "loading PyTorch and Ray"):
        import reid_train.commands.embedding_job  # noqa: F401  what the rest needs
        from data_shards.images import open_images
        from reid_train.commands.measurable import labels_of, name_of
        from reid_train.evaluation.ground_truth import find_ground_truth

    datasets = [open_images(url, settings.loader.node_cache) for url in settings.data]
    for dataset in datasets:
        labels = labels_of(dataset, settings.split)
        find_ground_truth(labels)
        settings.measures.check(len(labels.query_pid), len(labels.gallery_pid))
    connect_ray(settings.workers * (settings.cpus_per_worker or 1), console)
    pairs = list(itertools.product(settings.model, datasets))
    results = [_measure_model(settings, pair, console, len(pairs)) for pair in pairs]
    if len(pairs) > 1:
        show_all(settings.model, list(map(name_of, datasets)), results, console)
    written = [
        {"embeddings": f"{model} on {dataset.url}", **found.to_json()}
        for (model, dataset), found in zip(pairs, results, strict=True)
    ]
    _write(settings, written if len(pairs) > 1 else written[0], console)
    return results


def _measure_model(
    settings: Evaluate, pair: tuple[str, Dataset | ImageFolder], console: Console, count: int
) -> Measurement:
    """Embed a dataset with a model, measure and log; show it if it is the only one of `count`."""
    import ray

    from data_shards.images import ImageFolder
    from reid_train.commands.embedding_job import embed_dataset
    from reid_train.evaluation.metrics import of_each_dataset
    from reid_train.tracking.server import run_page
    from reid_train.tracking.tracker import Tracker
    from reid_train.tracking.uris import registry_uri

    model, dataset = pair
    if count > 1:
        say(console, f"{model} on {dataset.url}")
    place = nullcontext(settings.embeddings)
    if settings.embeddings is None:
        if len(ray.nodes()) > 1:
            raise ConfigError(
                "on several nodes, give a place that all can write to: "
                "--embeddings s3://bucket/prefix"
            )
        place = tempfile.TemporaryDirectory(prefix="reid-embeddings-")
    given = settings.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    registered = model.startswith("models:/")
    uri = registry_uri(given) if given or registered else None  # a checkpoint, and no MLflow
    tracker = Tracker.start(uri, settings.experiment, run_name=model)
    with tracker, place as out:
        assert out is not None
        if count > 1:  # each has a folder of its own
            out = f"{out.rstrip('/')}/{sha256(f'{model} {dataset.url}'.encode()).hexdigest()[:12]}"
        known = {f.name for f in fields(Embed)}
        shared = {name: value for name, value in vars(settings).items() if name in known}
        shared |= {"model": model, "data": dataset.url, "splits": EVALUATED[settings.split]}
        with display(console) as progress:
            embed_dataset(Embed(out=out, **shared), progress)
        found = _measure(out, settings, console, of_folder=isinstance(dataset, ImageFolder))
        names = None
        if not isinstance(dataset, ImageFolder):
            names = dataset.manifest.names
            origin = dataset.origin(EVALUATED[settings.split][0])
            each = of_each_dataset(found.result, dataset.merged, origin)
            found = replace(found, datasets=each)
        if count == 1:
            show(found, console, names and names.cameras)
        _log(settings, found, pair, tracker)
        if registered and found.thresholds:
            _attach(model, found.thresholds, settings)
    if tracker.uri and tracker.run_id:
        say(console, f"logged to {run_page(tracker.uri, tracker.run_id)}")
    return found


def _attach(model: str, thresholds: Thresholds, settings: Evaluate) -> None:
    """Log thresholds beside a registered version: `search` and `compare` use them."""
    from reid_train.registry.attached import THRESHOLDS, attach

    with tempfile.TemporaryDirectory(prefix="reid-thresholds-") as temporary:
        path = Path(temporary) / "thresholds.json"
        path.write_text(json.dumps(thresholds.to_json()))
        attach(model, path, THRESHOLDS, {"split": settings.split}, settings.tracking_uri)


def _measure(
    url: str, settings: Evaluate, console: Console, *, of_folder: bool = False
) -> Measurement:
    """Read embeddings, print what measuring them takes, and measure."""
    with display(console) as progress, phase(progress, "loading PyTorch and Numba"):
        from reid_train.commands.measurable import folder_embeddings
        from reid_train.commands.memory import say_needed
        from reid_train.evaluation import evaluate as evaluation
        from reid_train.evaluation.embedding_store import ROWS, EmbeddingFiles, read_embeddings
        from reid_train.evaluation.ground_truth import find_ground_truth
        from reid_train.evaluation.thresholds import measure_thresholds

    measures, workers = settings.measures, settings.workers
    in_memory = of_folder or url.endswith(".npz")
    if in_memory:
        if workers > 1:
            what = "folders" if of_folder else "npz files"
            say(console, f"{what} are measured in one process; Parquet files by all workers")
        query, gallery, labels = folder_embeddings(url) if of_folder else read_embeddings(url)
        workers, dimensions = 1, query.shape[1]
        run = partial(evaluation.evaluate, query, gallery, labels, measures)
    else:
        files = EmbeddingFiles.open(url, settings.split)
        labels, dimensions = files.labels, files.dimensions
        find_ground_truth(labels)  # raises if there is none, before workers start
        run = partial(evaluation.evaluate_files, files, measures, workers=workers)
        longest = max((len(group.rows) for group in files.groups), default=0)
        if workers > 1 and longest > 4 * ROWS:
            say(
                console,
                f"{url} has row groups of {longest:,} rows, and a worker reads a whole one: "
                f"write it with row_group_size={ROWS} to divide it better",
            )
    sizes = len(labels.query_pid), len(labels.gallery_pid)
    measures.check(*sizes)
    if workers > 1:
        connect_ray(workers, console)
    say_needed(*sizes, dimensions, measures, console, workers=workers)
    with display(console, units=evaluation.UNITS) as progress:
        found = run(progress=progress)
        if settings.thresholds:
            if not in_memory:
                query, gallery = files.read("query"), files.read("gallery")
            measured = measure_thresholds(query, gallery, labels, progress=progress)
            found = replace(found, thresholds=measured)
    return found


def _write(settings: Evaluate, values: object, console: Console) -> None:
    """Write measurements where `--output` says."""
    if settings.output:
        from data_shards.storage import open_file

        storage, key = open_file(settings.output)
        storage.write(key, json.dumps(values, indent=2, ensure_ascii=False).encode() + b"\n")
        say(console, f"written to {settings.output}")


def show_all(
    models: Sequence[str], datasets: Sequence[str], found: Sequence[Measurement], console: Console
) -> None:
    """Print a row for each dataset, or for each of several models with the datasets as columns.

    `found` are the measurements of the first model on all datasets, then of the second, and so on.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    say(console, steps_of(found[0]))
    # A folder that all models are in is printed once: their names would fold in a narrow column.
    folder = models[0].rpartition("/")[0] + "/"
    if len(models) > 1 and folder != "models:/" and all(m.startswith(folder) for m in models):
        say(console, f"models in {folder}")
    else:
        folder = ""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("dataset" if len(models) == 1 else "model", overflow="fold")

    def cells(summaries: Sequence[Mapping[str, float]], names: Iterable[str]) -> list[str]:
        return [f"{100 * fmean(s[name] for s in summaries):.2f} %" for name in names]

    if len(models) == 1:
        names, of_way = list(found[0].result.summary()), dict[str, list[Mapping[str, float]]]()
        for name in names:
            table.add_column(name, justify="right")
        for dataset, one in zip(datasets, found, strict=True):
            ways = {"": one.result}
            if one.plain is not None:
                ways = {", plain": one.plain, ", re-ranked": one.result}
            for way, result in ways.items():
                of_way.setdefault(way, []).append(result.summary())
                table.add_row(f"{dataset}{way}", *cells([result.summary()], names))
        for way, summaries in of_way.items():
            table.add_row(f"mean{way}", *cells(summaries, names))
    else:
        for dataset in [*datasets, *(["mean"] if len(datasets) > 1 else [])]:
            for name in ("mAP", "rank-1"):
                table.add_column(f"{dataset}\n{name}", justify="right")
        results = iter(found)
        for model in models:
            summaries = [next(results).result.summary() for _ in datasets]
            shown = [[one] for one in summaries] + ([summaries] if len(datasets) > 1 else [])
            name = model[len(folder) :]
            table.add_row(name, *(c for group in shown for c in cells(group, ("mAP", "rank-1"))))
    console.print(table)


def steps_of(found: Measurement) -> str:
    """How a measurement ranked, in words."""
    measures = found.measures
    steps = [measures.metric]
    steps += [f"query expansion {measures.expand}"] if measures.expand else []
    steps += [f"database augmentation {measures.augment}"] if measures.augment else []
    if measures.rerank:
        steps += [f"re-ranked (k1 {measures.k1}, k2 {measures.k2}, λ {measures.weight:g})"]
    return ", ".join(steps)


def show(found: Measurement, console: Console, cameras: Mapping[int, str] | None = None) -> None:
    """Print a measurement as a table, and another one of camera pairs if there are any.

    `cameras` are the names of those that have names.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Column, Table
    from rich.text import Text

    result = found.result
    say(console, steps_of(found))
    table, rows = Table(box=SIMPLE_HEAD), {"": result}
    if found.plain is not None:
        rows = {"plain": found.plain, "re-ranked": result}
        table.add_column("")
    for name in result.summary():
        table.add_column(name, justify="right")
    for name, part in rows.items():
        values = [f"{100 * value:.2f} %" for value in part.summary().values()]
        table.add_row(*([name] if name else []), *values)
    console.print(table)
    if found.datasets:
        say(console, "queries of each dataset, in the gallery of all")
        names = next(iter(found.datasets.values()))
        columns = (Column(name, justify="right") for name in names)
        datasets = Table("", *columns, box=SIMPLE_HEAD)
        for name, summary in found.datasets.items():
            datasets.add_row(name, *(f"{100 * value:.2f} %" for value in summary.values()))
        console.print(datasets)
    if result.valid < found.queries:
        say(console, f"{found.queries - result.valid:,} queries without a match were left out")
    if found.pairs:
        say(console, "by camera pair, in %")
        # Narrow: nine columns fit a terminal.
        pairs = Table("query", "gallery", "queries", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in next(iter(found.pairs.values())).summary():
            pairs.add_column(name, justify="right")
        for (a, b), part in found.pairs.items():
            values = [f"{100 * value:.2f}" for value in part.summary().values()]
            named = [Text((cameras or {}).get(camera) or str(camera)) for camera in (a, b)]
            pairs.add_row(*named, f"{part.valid:,}", *values)
        console.print(pairs)
    if found.thresholds is not None:
        _show_thresholds(found.thresholds, console)


def _show_thresholds(found: Thresholds, console: Console) -> None:
    """Print thresholds as a table, and the rates that too few pairs tell."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from reid_train.evaluation.thresholds import needed

    say(console, f"same person or not, from {found.impostors:,} pairs of different people")
    table = Table(box=SIMPLE_HEAD)
    for name in ("false accepts", "similarity above", "95 % interval", "true accepts"):
        table.add_column(name, justify="right")
    for at in found.at:
        interval, accepts = f"{at.low:.4f} to {at.high:.4f}", f"{100 * at.true_accept_rate:.2f} %"
        table.add_row(f"{at.false_accept_rate:g}", f"{at.similarity:.4f}", interval, accepts)
    if found.at:
        console.print(table)
    for rate in found.too_few:
        say(console, f"too few pairs for {rate:g}: it needs {needed(rate):,}")


def _log(
    settings: Evaluate,
    found: Measurement,
    pair: tuple[str, Dataset | ImageFolder],
    tracker: Tracker,
) -> None:
    """Log a model's measurement on a dataset."""
    from reid_train.commands.measurable import digests_of
    from reid_train.evaluation.metrics import by_name
    from reid_train.training.history import tracked

    tracker.log_parameters({f"measures.{k}": v for k, v in vars(found.measures).items()})
    model, dataset = pair
    digests = digests_of(dataset, settings.split)
    tracker.set_tags({"model": model, "dataset": dataset.url, **digests})
    summary = tracked(found.result.summary() | by_name(found.datasets), settings.split)
    if found.plain is not None:
        summary |= {f"plain {k}": v for k, v in found.plain.summary().items()}
    # MLflow accepts neither @ nor = in a name.
    tracker.log({k.replace("@", " at ").replace("=", " "): v for k, v in summary.items()}, 0)
