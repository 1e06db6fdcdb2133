"""A model's embeddings of a dataset, computed by Ray workers and written in parts.

A part is a stretch of a split's images and a Parquet file of its own, written whole or not at all;
so each image is embedded once, and an interrupted job goes on with the parts that are missing.
`job.json`, written first and once, says of which model and dataset the parts are, and of what
device: the last digits differ with it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import ray.exceptions

from data_shards.cache import ShardCache
from data_shards.dataset import Dataset
from data_shards.errors import DataError, ObjectExists, ReidError
from data_shards.loader import row_batches
from data_shards.storage import open_storage
from reid_train.config import LoaderConfig
from reid_train.evaluation.embedding_store import JOB, EmbeddingTable, part_key, write_part
from reid_train.evaluation.extract import embed_batches
from reid_train.model.embedder import CONFIG, WEIGHTS, Embedder
from reid_train.model.precision import autocast, set_precision
from reid_train.out_of_memory import out_of_memory
from reid_train.registry.registry import fetch
from reid_train.runs.ray_trainer import use_gpu

PART = 4096
"""Images of a part."""


@dataclass(frozen=True)
class Part:
    """Rows `first` to `stop` of a split."""

    key: str
    split: str
    first: int
    stop: int


def parts_of(dataset: Dataset, splits: Sequence[str]) -> list[Part]:
    """The parts of a dataset's splits, in order."""
    stretches = [
        (split, first, min(first + PART, len(dataset.index(split))))
        for split in splits
        for first in range(0, len(dataset.index(split)), PART)
    ]
    return [Part(part_key(number), *stretch) for number, stretch in enumerate(stretches)]


def embed_dataset(
    model: str,
    data: str,
    out: str,
    *,
    splits: Sequence[str] = ("query", "gallery"),
    workers: int = 1,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    tracking_uri: str | None = None,
    loader: LoaderConfig | None = None,
    batch: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Embed splits of a dataset with a registered model or a checkpoint.

    Args:
        model: as `registry.load` takes it.
        data: URL of the sharded dataset.
        out: where the parts go, a folder or an s3:// URL; parts already there are kept.
        splits: which; those that the dataset has not are left out.
        workers: Ray actors, each with a copy of the model.
        device: "cuda" gives each worker a GPU; "auto" does where there are enough.
        tracking_uri: of the registry.
        loader: decoding processes and cache of each worker.
        batch: images that a worker embeds at a time; None takes the model's `evaluation.batch`.
        progress: told how many images are embedded, and how many there are.

    Returns:
        Images in all parts.

    Raises:
        DataError: no such images, or `out` holds embeddings of another model or dataset, or some
            that another device than the given made.
    """
    dataset, storage = Dataset.open(data), open_storage(out)
    parts = parts_of(dataset, splits)
    if not parts:
        raise DataError(f"{data} has no images in {', '.join(splits)}")
    with tempfile.TemporaryDirectory(prefix="reid-embed-") as temporary:
        folder = fetch(model, Path(temporary), tracking_uri)
        Embedder.from_folder(folder, "cpu")  # says what is wrong with it before anything starts
        weights, config = ((folder / name).read_bytes() for name in (WEIGHTS, CONFIG))
    there = {key for key, _ in storage.list("part-")}
    missing = [part for part in parts if part.key not in there]
    chosen = "cuda" if missing and use_gpu(device, workers, free=True) else "cpu"
    job = {
        "weights": hashlib.sha256(weights).hexdigest(),
        "config": hashlib.sha256(config).hexdigest(),
        "manifest_digest": dataset.manifest.digest,
        "splits": list(splits),
        "part": PART,
        "parts": len(parts),
    }
    begun = _claim(out, job, chosen)
    if missing and begun != chosen and (device, begun) != ("auto", "cpu"):
        raise DataError(
            f"{out} was begun with --device {begun}: go on with that, or choose another place"
        )
    total = sum(part.stop - part.first for part in parts)
    done = total - sum(part.stop - part.first for part in missing)
    progress(done, total)
    if missing:
        shared = ray.put((weights, config, begun))
        actor = ray.remote(_Worker).options(  # type: ignore[attr-defined]
            num_cpus=1, num_gpus=int(begun == "cuda"), max_restarts=2, max_task_retries=2
        )
        count = min(workers, len(missing))
        given = shared, data, out, loader or LoaderConfig(), batch
        actors = [actor.remote(*given) for _ in range(count)]
        for images in _results(actors, missing):
            done += images
            progress(done, total)
    return total


def _results(actors: Sequence[Any], parts: Sequence[Part]) -> Iterator[int]:
    """Images of each part that is done; an actor gets the first when it is up, if ever it is."""
    busy = {actor.ready.remote(): actor for actor in actors}
    left, done = deque(parts), 0
    while done < len(parts):
        (reference,), _ = ray.wait(list(busy))
        actor = busy.pop(reference)
        try:
            images = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if reason := out_of_memory(str(error)):
                raise ReidError(f"{reason}: lower --batch. The same command goes on") from None
            raise error.cause if isinstance(error.cause, ReidError) else error from None
        except ray.exceptions.RayError as error:
            reason = out_of_memory(str(error)) or str(error).strip().splitlines()[0]
            raise ReidError(
                f"an embedding worker was lost: {reason}. The same command goes on with the rest"
            ) from error
        if images is not None:
            done += 1
            yield images
        if left:
            busy[actor.embed.remote(left.popleft())] = actor


class _Worker:
    """Embeds parts; an actor."""

    def __init__(
        self,
        model: tuple[bytes, bytes, str],
        data: str,
        out: str,
        loader: LoaderConfig,
        batch: int | None,
    ) -> None:
        *files, device = model
        with tempfile.TemporaryDirectory(prefix="reid-embed-") as temporary:
            folder = Path(temporary)
            for name, content in zip((WEIGHTS, CONFIG), files, strict=True):
                (folder / name).write_bytes(content)
            self.embedder = Embedder.from_folder(folder, device)
        set_precision(self.embedder.config)
        self.batch = batch or self.embedder.config.evaluation.batch
        self.dataset, self.storage, self.loader = Dataset.open(data), open_storage(out), loader
        cache = loader.cache.expanduser().absolute()
        self.cache = ShardCache(self.dataset.storage, cache, loader.cache_bytes)

    def ready(self) -> None:
        """Returns once the actor is up."""

    def embed(self, part: Part) -> int:
        """Write one part; return its number of images."""
        config, index = self.embedder.config, self.dataset.index(part.split)
        rows = np.arange(part.first, part.stop)
        batches = row_batches(
            self.dataset,
            self.cache,
            part.split,
            rows,
            batch=self.batch,
            height=config.image.height,
            width=config.image.width,
            workers=self.loader.workers,
        )
        # In the precision of the training's own evaluations, to come to the same figures.
        embedding = embed_batches(
            self.embedder.network,
            batches,
            self.embedder.device,
            mirror=config.evaluation.mirror,
            autocast=autocast(config, self.embedder.device),
        )
        table = EmbeddingTable(
            embedding.cpu().numpy(),
            index.pid[rows],
            index.camid[rows],
            np.full(len(rows), part.split),
            index.path[rows],
        )
        write_part(self.storage, part.key, table)
        return len(rows)


def _claim(out: str, job: dict[str, Any], device: str) -> str:
    """Write `job.json`, or check that it says the same; the device that it was begun with."""
    storage = open_storage(out)
    if not storage.exists(JOB) and any(storage.list("part-")):
        raise DataError(
            f"{out} has embeddings, but no {JOB} that says of what: choose another place"
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
