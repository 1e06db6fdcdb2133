"""Embed a dataset on Ray workers that write parts.

A part has consecutive images of a split and is a Parquet file of its own, written whole or not at
all. So each image is embedded once, and an interrupted job continues with the missing parts.
`job.json` is written first and once. It records the model, the dataset, the device of the parts,
and on how many cores a worker computed them. The first worker records the precision in `precision`.
Those that continue follow them all: another device, number or precision gives other last digits.
"""

import hashlib
import json
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.exceptions
import torch

from data_shards.cache import ShardCache
from data_shards.dataset import Dataset
from data_shards.errors import DataError, ObjectExists, ReidError
from data_shards.loader import split_batches
from data_shards.progress import Progress, phase, silent
from data_shards.storage import Storage, expand_home, open_storage
from reid_train.commands.embed import Embed
from reid_train.evaluation.embedding_store import JOB, EmbeddingTable, part_key, write_part
from reid_train.evaluation.extract import embed_batches
from reid_train.evaluation.tasks import ranges
from reid_train.model.embedder import CONFIG, WEIGHTS, Embedder
from reid_train.model.precision import autocast, precision_on, set_precision
from reid_train.out_of_memory import out_of_memory
from reid_train.registry.load import fetch
from reid_train.runs.cores import settle
from reid_train.runs.ray_trainer import use_gpu

PART = 4096  # images of a part
PRECISION = "precision"  # the file with the precision of all parts, "bf16" or "float32"


class Task(NamedTuple):
    """One part: some rows of a split."""

    key: str
    split: str
    rows: range


def tasks_of(dataset: Dataset, splits: Sequence[str]) -> list[Task]:
    """The parts of a dataset's splits, in order."""
    parts = [(split, rows) for split in splits for rows in ranges(len(dataset.index(split)), PART)]
    return [Task(part_key(number), *part) for number, part in enumerate(parts)]


def embed_dataset(settings: Embed, progress: Progress = silent) -> int:
    """Embed what is missing; Ray must be running. Returns the images of all parts.

    Raises:
        DataError: no such images, or the parts that are there are of another model, dataset,
            device or precision.
    """
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
    workers, loader = min(settings.workers, max(len(missing), 1)), settings.loader
    gpu = chosen == "cuda"
    cpus, loaders = settle(settings.cpus_per_worker, loader.workers, workers, gpu=gpu)
    kept = _claim(storage, settings.out, job, {"device": chosen, "cpus_per_worker": cpus})
    device = kept.get("device", chosen)
    if missing and device != chosen and (settings.device, device) != ("auto", "cpu"):
        raise DataError(
            f"{settings.out} was started with --device {device}: continue with that, or choose "
            "another place"
        )
    total = sum(len(task.rows) for task in tasks)
    done = total - sum(len(task.rows) for task in missing)
    progress("embedding", done, total)
    if missing:
        # In a list, so that a worker that has the model need not read it again.
        files = [ray.put((weights, config))]
        settings = replace(
            settings,
            cpus_per_worker=kept.get("cpus_per_worker", 1),
            loader=loader.model_copy(update={"workers": loaders}),
        )
        actor = ray.remote(_Worker).options(  # type: ignore[attr-defined]
            num_cpus=1 if device == "cuda" else cpus,
            num_gpus=int(device == "cuda"),
            max_restarts=2,
            max_task_retries=2,
        )
        actors = [actor.remote(device, settings) for _ in missing[: settings.workers]]
        for images in _results(actors, files, missing):
            done += images
            progress("embedding", done, total)
    return total


def _claim(
    storage: Storage, out: str, job: dict[str, Any], computed: dict[str, Any]
) -> dict[str, Any]:
    """Write `job.json`, or check that it is of the same job; returns how it is `computed`."""
    if not storage.exists(JOB) and any(storage.list("part-")):
        raise DataError(
            f"{out} has embeddings but no {JOB} that describes them: choose another place"
        )
    try:
        content = json.dumps(job | computed, indent=2)
        storage.write(JOB, content.encode(), create_once=True)
    except ObjectExists:
        kept = json.loads(storage.read(JOB))
        computed = {name: kept.pop(name) for name in computed if name in kept}
        if kept != job:
            raise DataError(
                f"{out} holds embeddings of another model, dataset or choice of splits: "
                "choose another place"
            ) from None
    return computed


def _results(actors: Sequence[Any], files: list[Any], tasks: Sequence[Task]) -> Iterator[int]:
    """Images of each part that is done. An actor gets its first task once it has the model."""
    busy = {actor.load.remote(files): actor for actor in actors}
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
            busy[actor.embed.remote(files, left.popleft())] = actor


class _Worker:
    """Embeds parts; a Ray actor. One that Ray restarts loads the model again at its next part."""

    def __init__(self, device: str, settings: Embed) -> None:
        self.device, self.settings = device, settings
        self.embedder: Embedder | None = None

    def load(self, files: list[Any]) -> None:
        """Load the model, unless it is loaded; `files` refers to its weights and configuration."""
        if self.embedder is not None:
            return
        settings, storage = self.settings, open_storage(self.settings.out)
        torch.set_num_threads(settings.cpus_per_worker or 1)
        with tempfile.TemporaryDirectory(prefix="reid-embed-") as temporary:
            folder = Path(temporary)
            for name, content in zip((WEIGHTS, CONFIG), ray.get(files[0]), strict=True):
                (folder / name).write_bytes(content)
            embedder = Embedder.from_folder(folder, self.device)
        precision: str = precision_on(embedder.config, embedder.device)
        try:
            storage.write(PRECISION, precision.encode(), create_once=True)
        except ObjectExists:
            precision = storage.read(PRECISION).decode()
        self.config, self.storage = embedder.config.replace(precision=precision), storage
        set_precision(self.config)
        self.dataset = Dataset.open(settings.data)
        cache = expand_home(settings.loader.cache).absolute()
        self.cache = ShardCache(self.dataset.storage, cache, settings.loader.cache_bytes)
        self.embedder = embedder

    def embed(self, files: list[Any], task: Task) -> int:
        """Write one part; return its number of images."""
        self.load(files)
        assert self.embedder is not None
        config, index = self.config, self.dataset.index(task.split)
        network, device, rows = self.embedder.network, self.embedder.device, np.array(task.rows)
        batches = split_batches(
            self.dataset,
            self.cache,
            task.split,
            rows,
            batch=self.settings.batch or config.evaluation.batch,
            workers=self.settings.loader.workers or 0,
            **config.image.model_dump(),
        )
        # In the precision of the training's own evaluations, to give the same figures.
        options = {"mirror": config.evaluation.mirror, "autocast": autocast(config, device)}
        embedding = embed_batches(network, batches, device, **options)
        split = np.full(len(rows), task.split)
        table = EmbeddingTable(
            embedding.cpu().numpy(), index.pid[rows], index.camid[rows], split, index.path[rows]
        )
        write_part(self.storage, task.key, table)
        return len(rows)
