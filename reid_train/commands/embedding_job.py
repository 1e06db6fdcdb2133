"""Embed a dataset or a folder of images on Ray workers that write parts.

A part has consecutive images of a split and is a Parquet file of its own, written whole or not at
all. So each image is embedded once, and an interrupted job continues with the missing parts.
`job.json` is written first and once. It records the model, the dataset, the device of the parts,
and on how many cores a worker computed them. The first worker records the precision in `precision`.
Those that continue follow them all: another device, number or precision gives other last digits.
"""

import json
import logging
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from data_shards.images import ImageFolder, open_images, warn_left_out
from data_shards.loading.loader import Batch, split_batches
from data_shards.manifest import LeftOut, sha256
from data_shards.progress import Progress, phase, silent
from data_shards.records import NO_CAMERA
from data_shards.storage import Storage, open_storage
from reid_train.commands.embed import Embed
from reid_train.commands.runtime import Runtime, fetched_onnx, onnx_runtime, uses_onnx
from reid_train.evaluation import embedding_store
from reid_train.evaluation.embedding_store import JOB, EmbeddingTable, part_key, write_part
from reid_train.evaluation.extract import embed_batches
from reid_train.evaluation.tasks import ranges
from reid_train.model.embedder import CONFIG, WEIGHTS, Embedder
from reid_train.model.precision import autocast, precision_on, set_precision
from reid_train.out_of_memory import out_of_memory
from reid_train.registry.load import fetched
from reid_train.runs.cores import settle
from reid_train.runs.process import keep_freed_memory
from reid_train.runs.ray_trainer import use_gpu

logger = logging.getLogger(__name__)

PART = 4096  # images of a part
ONNX = "model.onnx"  # the name that a worker gives an exported file
WAIT_SECONDS = 20.0  # for the first worker, before a person hears what it may wait for
FOLDER_SPLIT = "gallery"  # of the images of a folder
PRECISION = "precision"  # the file with the precision of all parts, "bf16", "fp16" or "float32"


class Task(NamedTuple):
    """One part: some rows of a split."""

    key: str
    split: str
    rows: range


def tasks_of(data: Dataset | ImageFolder, splits: Sequence[str]) -> list[Task]:
    """The parts of a dataset's splits, in order; a folder of images is one split."""
    if isinstance(data, ImageFolder):
        sizes = {FOLDER_SPLIT: len(data.path)}
    else:
        sizes = {split: len(data.index(split)) for split in splits}
    parts = [(split, rows) for split, size in sizes.items() for rows in ranges(size, PART)]
    return [Task(part_key(number), *part) for number, part in enumerate(parts)]


def embed_dataset(settings: Embed, progress: Progress = silent) -> int:
    """Embed what is missing; Ray must be running. Returns the images of all parts.

    Unreadable images of a folder are left out, and named in a warning.

    Raises:
        DataError: no such images, or the parts that are there are of another model, dataset,
            device or precision.
    """
    data = open_images(settings.data, settings.loader.node_cache)
    storage = open_storage(settings.out)
    tasks = tasks_of(data, settings.splits)
    if not tasks:
        raise DataError(f"{settings.data} has no images in {', '.join(settings.splits)}")
    with phase(progress, "loading the model"):
        model, digests = _model_files(settings)
    there = {key for key, _ in storage.list("part-")}
    missing = [task for task in tasks if task.key not in there]
    chosen = "cuda" if missing and use_gpu(settings.device, settings.workers, free=True) else "cpu"
    job = {
        **digests,
        "manifest_digest": data.digest,
        "splits": [FOLDER_SPLIT] if isinstance(data, ImageFolder) else list(settings.splits),
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
    left_out: list[LeftOut] = []
    if missing:
        # In a list, so that a worker that has the model need not read it again.
        files = [ray.put(model)]
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
        given = device, settings, data.digest
        actors = [actor.remote(*given) for _ in missing[: settings.workers]]
        for images, unreadable in _results(actors, files, missing):
            done += images
            left_out += unreadable
            progress("embedding", done, total)
    if isinstance(data, ImageFolder):
        warn_left_out(data, left_out)
        return len(embedding_store.EmbeddingFiles.open(settings.out).pid)
    return total


def _model_files(settings: Embed) -> tuple[dict[str, bytes], dict[str, str]]:
    """What a worker loads, by file name, and its digests for `job.json`.

    Raises what is wrong with the model before anything starts.
    """
    if uses_onnx(settings.model, settings.runtime):
        with fetched_onnx(settings.model, settings.tracking_uri) as path:
            weights, content = onnx_runtime(path, "cpu").weights, path.read_bytes()
        return {ONNX: content}, {"weights": weights, "config": sha256(content)}
    with fetched(settings.model, settings.tracking_uri) as folder:
        Embedder.from_folder(folder, "cpu")
        files = {name: (folder / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    return files, {"weights": sha256(files[WEIGHTS]), "config": sha256(files[CONFIG])}


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


def _results(
    actors: Sequence[Any], files: list[Any], tasks: Sequence[Task]
) -> Iterator[tuple[int, list[LeftOut]]]:
    """What `embed` returns for each part. An actor gets its first task once it has the model."""
    busy = {actor.load.remote(files): actor for actor in actors}
    left, done = deque(tasks), 0
    ready, _ = ray.wait(list(busy), timeout=WAIT_SECONDS)
    if not ready and not ray.available_resources().get("CPU", 0):
        logger.warning("no worker is ready yet: all cores of the Ray cluster are in use")
    while done < len(tasks):
        (reference,), _ = ray.wait(list(busy))
        actor = busy.pop(reference)
        try:
            result = ray.get(reference)
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
        if result is not None:
            done += 1
            yield result
        if left:
            busy[actor.embed.remote(files, left.popleft())] = actor


class _Worker:
    """Embeds parts; a Ray actor. One that Ray restarts loads the model again at its next part."""

    def __init__(self, device: str, settings: Embed, digest: str) -> None:
        self.device, self.settings, self.digest = device, settings, digest
        self.embed_all: Callable[[Iterable[Batch]], np.ndarray] | None = None

    def load(self, files: list[Any]) -> None:
        """Load the model, unless it is loaded; `files` refers to its files' contents."""
        if self.embed_all is not None:
            return
        settings, self.storage = self.settings, open_storage(self.settings.out)
        torch.set_num_threads(settings.cpus_per_worker or 1)
        if self.device == "cpu":
            keep_freed_memory()
        self.data = open_images(settings.data, settings.loader.node_cache)
        if self.data.digest != self.digest:
            raise DataError(f"the images at {settings.data} changed while they were embedded")
        self.cache = ShardCache(self.data.storage, *settings.loader.node_cache)
        with tempfile.TemporaryDirectory(prefix="reid-embed-") as temporary:
            folder = Path(temporary)
            contents: dict[str, bytes] = ray.get(files[0])  # type: ignore
            for name, content in contents.items():
                (folder / name).write_bytes(content)
            if ONNX in contents:
                self._use(onnx_runtime(folder / ONNX, self.device))
            else:
                self._use(Embedder.from_folder(folder, self.device))

    def _use(self, model: Embedder | Runtime) -> None:
        """Embed with this model from now on, in the precision of the other parts."""
        if isinstance(model, Runtime):
            self._agreed_precision("onnx")
            empty = np.empty((0, model.embedding_size), np.float32)
            self.size = model.height, model.width, model.batch
            self.embed_all = lambda batches: np.concatenate(
                [empty, *(model(batch.image.numpy()) for batch in batches)]
            )
            return
        precision = self._agreed_precision(precision_on(model.config, model.device))
        config = model.config.replace(precision=precision)
        set_precision(config)
        # In the precision of the training's own evaluations, to give the same figures.
        options = {"mirror": config.evaluation.mirror, "autocast": autocast(config, model.device)}
        self.size = config.image.height, config.image.width, config.evaluation.batch
        empty = np.empty((0, model.embedding_size), np.float32)
        self.embed_all = lambda batches: np.concatenate(
            [empty, *embed_batches(model.network, batches, model.device, **options)]
        )

    def _agreed_precision(self, precision: str) -> str:
        """The precision that the first worker found."""
        try:
            self.storage.write(PRECISION, precision.encode(), create_once=True)
        except ObjectExists:
            precision = self.storage.read(PRECISION).decode()
        return precision

    def embed(self, files: list[Any], task: Task) -> tuple[int, list[LeftOut]]:
        """Write one part; return its number of images, and which of them cannot be read."""
        self.load(files)
        assert self.embed_all is not None
        data, rows = self.data, np.array(task.rows)
        left_out: list[LeftOut] = []
        height, width, batch = self.size
        size: dict[str, Any] = {
            "batch": self.settings.batch or batch,
            "height": height,
            "width": width,
        }
        if isinstance(data, ImageFolder):
            batches = data.batches(rows, left_out, **size)
        else:
            size["workers"] = self.settings.loader.workers or 0
            batches = split_batches(data, self.cache, task.split, rows, **size)
        embedding = self.embed_all(batches)
        if isinstance(data, ImageFolder):
            rows = rows[~np.isin(data.path[rows], [image.path for image in left_out])]
            pid, camid = np.full(len(rows), -1), np.full(len(rows), NO_CAMERA)
            path = data.path[rows]
        else:
            index = data.index(task.split)
            pid, camid, path = index.pid[rows], index.camid[rows], index.path[rows]
        split = np.full(len(rows), task.split)
        write_part(self.storage, task.key, EmbeddingTable(embedding, pid, camid, split, path))
        return len(task.rows), left_out
