"""`reid_train embed`: Ray workers embed a dataset with a model and write the parts.

A part has consecutive images of a split and is a Parquet file of its own, written whole or not at
all. So each image is embedded once, and an interrupted job continues with the missing parts.
`job.json` is written first and once. It records the model, the dataset and the device of the parts.
The first worker records the precision in `precision`, and all others follow it: another device or
precision gives other last digits.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from data_shards.errors import ConfigError, DataError, ObjectExists, ReidError
from data_shards.progress import Progress, display, phase, silent
from reid_train.config import LoaderConfig

if TYPE_CHECKING:
    from rich.console import Console

    from data_shards.dataset import Dataset
    from data_shards.storage import Storage

PART = 4096
"""Images of a part."""
PRECISION = "precision"
"""Name of the file with the precision of all parts, "bf16" or "float32"."""


@dataclass(frozen=True)
class Embed:
    """Embed a dataset with a model; write Parquet parts. The same command continues a job.

    python -m reid_train embed --model models:/reid-msmt17@champion --data s3://bucket/msmt17
        --out s3://bucket/embeddings
    """

    model: str
    """models:/name@champion, models:/name/3, or a checkpoint's or run's folder or s3:// URL."""
    data: str
    """Sharded dataset: s3://bucket/prefix or a folder."""
    out: str
    """Where to write the parts: s3://bucket/prefix or a folder."""
    splits: tuple[str, ...] = ("query", "gallery")
    """Which splits."""
    workers: int = 1
    """Ray workers, each with a copy of the model."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda gives each worker a GPU; auto does if enough are free."""
    batch: int | None = None
    """Images that a worker embeds at a time; by default the model's evaluation.batch."""
    tracking_uri: str | None = None
    """MLflow, for models:/…; by default MLFLOW_TRACKING_URI."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)


def check_counts(workers: int, batch: int | None) -> None:
    """Raise `ConfigError` for numbers below 1."""
    for name, number in (("--workers", workers), ("--batch", batch)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} must be at least 1, not {number}")


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is: brackets in names are no markup, and addresses are not broken."""
    console.print(text, markup=False, highlight=False, soft_wrap=True, style=style)


def embed(settings: Embed, console: Console) -> int:
    """Run the command; return the number of images."""
    check_counts(settings.workers, settings.batch)
    connect_ray(settings.workers, console)
    with display(console) as progress:
        images = embed_dataset(settings, progress)
    say(console, f"{images:,} embeddings at {settings.out}")
    return images


def connect_ray(workers: int, console: Console) -> None:
    """Connect to the Ray cluster at hand, or start one here, as a phase on the console."""
    import ray

    from reid_train.runs.ray_trainer import start_ray

    if not ray.is_initialized():
        with display(console) as progress, phase(progress, "starting Ray"):
            start_ray(workers)


class Task(NamedTuple):
    """One part: some rows of a split."""

    key: str
    split: str
    rows: range


def tasks_of(dataset: Dataset, splits: Sequence[str]) -> list[Task]:
    """The parts of a dataset's splits, in order."""
    from reid_train.evaluation.embedding_store import part_key
    from reid_train.evaluation.tasks import ranges

    parts = [(split, rows) for split in splits for rows in ranges(len(dataset.index(split)), PART)]
    return [Task(part_key(number), *part) for number, part in enumerate(parts)]


def embed_dataset(settings: Embed, progress: Progress = silent) -> int:
    """Embed what is missing; Ray must be running. Returns the images of all parts.

    Raises:
        DataError: no such images, or the parts that are there are of another model, dataset,
            device or precision.
    """
    import ray

    from data_shards.dataset import Dataset
    from data_shards.storage import open_storage
    from reid_train.model.embedder import CONFIG, WEIGHTS, Embedder
    from reid_train.registry.load import fetch
    from reid_train.runs.ray_trainer import use_gpu

    dataset, storage = Dataset.open(settings.data), open_storage(settings.out)
    tasks = tasks_of(dataset, settings.splits)
    if not tasks:
        raise DataError(f"{settings.data} has no images in {', '.join(settings.splits)}")
    with tempfile.TemporaryDirectory(prefix="reid-embed-") as temporary:
        with phase(progress, "loading the model"):
            folder = fetch(settings.model, Path(temporary), settings.tracking_uri)
            Embedder.from_folder(folder, "cpu")  # raises what is wrong before anything starts
        weights, config = ((folder / name).read_bytes() for name in (WEIGHTS, CONFIG))
    there = {key for key, _ in storage.list("part-")}
    missing = [task for task in tasks if task.key not in there]
    chosen = "cuda" if missing and use_gpu(settings.device, settings.workers, free=True) else "cpu"
    job = {
        "weights": hashlib.sha256(weights).hexdigest(),
        "config": hashlib.sha256(config).hexdigest(),
        "manifest_digest": dataset.manifest.digest,
        "splits": list(settings.splits),
        "part": PART,
        "parts": len(tasks),
    }
    device = _claim(storage, settings.out, job, chosen)
    if missing and device != chosen and (settings.device, device) != ("auto", "cpu"):
        raise DataError(
            f"{settings.out} was started with --device {device}: continue with that, or choose "
            "another place"
        )
    total = sum(len(task.rows) for task in tasks)
    done = total - sum(len(task.rows) for task in missing)
    progress("embedding", done, total)
    if missing:
        given = ray.put((weights, config)), device, settings
        actor = ray.remote(_Worker).options(  # type: ignore[attr-defined]
            num_cpus=1, num_gpus=int(device == "cuda"), max_restarts=2, max_task_retries=2
        )
        actors = [actor.remote(*given) for _ in range(min(settings.workers, len(missing)))]
        for images in _results(actors, missing):
            done += images
            progress("embedding", done, total)
    return total


def _claim(storage: Storage, out: str, job: dict[str, Any], device: str) -> str:
    """Write `job.json`, or check that it is of the same job; returns the job's device."""
    from reid_train.evaluation.embedding_store import JOB

    if not storage.exists(JOB) and any(storage.list("part-")):
        raise DataError(
            f"{out} has embeddings but no {JOB} that describes them: choose another place"
        )
    try:
        content = json.dumps(job | {"device": device}, indent=2)
        storage.write(JOB, content.encode(), create_once=True)
    except ObjectExists:
        kept = json.loads(storage.read(JOB))
        device = kept.pop("device", device)
        if kept != job:
            raise DataError(
                f"{out} holds embeddings of another model, dataset or choice of splits: "
                "choose another place"
            ) from None
    return device


def _results(actors: Sequence[Any], tasks: Sequence[Task]) -> Iterator[int]:
    """Images of each part that is done. An actor gets its first task once it has started."""
    import ray
    import ray.exceptions

    from reid_train.out_of_memory import out_of_memory

    busy = {actor.ready.remote(): actor for actor in actors}
    left, done = deque(tasks), 0
    while done < len(tasks):
        (reference,), _ = ray.wait(list(busy))
        actor = busy.pop(reference)
        try:
            images = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if reason := out_of_memory(str(error)):
                raise ReidError(
                    f"{reason}: lower --batch and give the same command to continue"
                ) from None
            raise error.cause if isinstance(error.cause, ReidError) else error from None
        except ray.exceptions.RayError as error:
            reason = out_of_memory(str(error)) or str(error).strip().splitlines()[0]
            raise ReidError(
                f"an embedding worker was lost: {reason}. Give the same command to continue"
            ) from error
        if images is not None:
            done += 1
            yield images
        if left:
            busy[actor.embed.remote(left.popleft())] = actor


class _Worker:
    """Embeds parts; a Ray actor."""

    def __init__(self, files: tuple[bytes, bytes], device: str, settings: Embed) -> None:
        from data_shards.cache import ShardCache
        from data_shards.dataset import Dataset
        from data_shards.storage import expand_home, open_storage
        from reid_train.model.embedder import CONFIG, WEIGHTS, Embedder
        from reid_train.model.precision import precision_on, set_precision

        with tempfile.TemporaryDirectory(prefix="reid-embed-") as temporary:
            folder = Path(temporary)
            for name, content in zip((WEIGHTS, CONFIG), files, strict=True):
                (folder / name).write_bytes(content)
            self.embedder = Embedder.from_folder(folder, device)
        config, storage = self.embedder.config, open_storage(settings.out)
        precision: str = precision_on(config, self.embedder.device)
        try:
            storage.write(PRECISION, precision.encode(), create_once=True)
        except ObjectExists:
            precision = storage.read(PRECISION).decode()
        self.config, self.storage = config.replace(precision=precision), storage
        set_precision(self.config)
        self.settings, self.dataset = settings, Dataset.open(settings.data)
        cache = expand_home(settings.loader.cache).absolute()
        self.cache = ShardCache(self.dataset.storage, cache, settings.loader.cache_bytes)

    def ready(self) -> None:
        """Return once the actor has started."""

    def embed(self, task: Task) -> int:
        """Write one part; return its number of images."""
        import numpy as np

        from data_shards.loader import split_batches
        from reid_train.evaluation.embedding_store import EmbeddingTable, write_part
        from reid_train.evaluation.extract import embed_batches
        from reid_train.model.precision import autocast

        config, index = self.config, self.dataset.index(task.split)
        network, device, rows = self.embedder.network, self.embedder.device, np.array(task.rows)
        options = {
            "batch": self.settings.batch or config.evaluation.batch,
            "height": config.image.height,
            "width": config.image.width,
            "workers": self.settings.loader.workers,
        }
        batches = split_batches(self.dataset, self.cache, task.split, rows, **options)
        # In the precision of the training's own evaluations, to give the same figures.
        options = {"mirror": config.evaluation.mirror, "autocast": autocast(config, device)}
        embedding = embed_batches(network, batches, device, **options)
        split = np.full(len(rows), task.split)
        table = EmbeddingTable(
            embedding.cpu().numpy(), index.pid[rows], index.camid[rows], split, index.path[rows]
        )
        write_part(self.storage, task.key, table)
        return len(rows)
