"""Evaluation while training: all workers embed query and gallery, rank 0 ranks them."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from data_shards.dataset import Dataset
from data_shards.loading.loader import Batch, Decoders, split_batches
from data_shards.progress import phase, silent
from data_shards.records import EVALUATED
from reid_train.config import TrainConfig
from reid_train.evaluation.examples import choose_map, choose_rank_list
from reid_train.evaluation.extract import Autocast, embed_batches, gather_rows
from reid_train.evaluation.ground_truth import Labels
from reid_train.evaluation.metrics import by_name, of_each_dataset
from reid_train.evaluation.ranking import rank as rank_gallery
from reid_train.evaluation.thresholds import measure_thresholds
from reid_train.model import precision
from reid_train.model.network import ReidNet
from reid_train.model.pretrained import build_model
from reid_train.training.checkpoint import Checkpoint
from reid_train.training.context import WorkerContext
from reid_train.training.data import make_decoders

THREADS = 16  # most threads of the ranking
THRESHOLD_PAIRS = 10**8  # of images, for which measuring thresholds takes half a minute


@dataclass(frozen=True)
class Validation:
    """Metrics by name, and what the report shows. Both are empty on ranks above 0."""

    metrics: dict[str, float] = field(default_factory=dict)
    rank_list: dict[str, np.ndarray] = field(default_factory=dict)


def validate(
    config: TrainConfig,
    dataset: Dataset,
    context: WorkerContext,
    decoders: Decoders,
    model: ReidNet,
    autocast: Autocast,
    *,
    on: str | None = None,
    best: float = np.inf,
) -> Validation:
    """Measure the model on a query and a gallery, each image embedded exactly once.

    Every rank calls it, with the network without wrappers. `on` is "validation" or "test", by
    default what the configuration chooses. Nothing is measured without a query or gallery.
    Thresholds are measured if the mAP is no lower than `best`, and kept with the rank list.
    """
    on = on or dataset.choose_split(config.evaluation.split)
    query, gallery = dataset.evaluated(on)
    if len(query) == 0 or len(gallery) == 0:
        return Validation()
    rank, world, embeddings = context.rank, context.world, []
    for split, index in zip(EVALUATED[on], (query, gallery), strict=True):
        batches = split_batches(
            dataset,
            context.cache,
            split,
            rank=rank,
            world=world,
            batch=config.evaluation.batch,
            workers=decoders.workers,
            decoders=decoders,
            **config.image.model_dump(),
        )
        total, done = len(index), 0
        own = total * (rank + 1) // world - total * rank // world
        rows = np.empty((total if rank == 0 else own, model.embedding_size), np.float32)
        for part in embed_batches(
            model,
            _counted(batches, f"embedding {split.replace('_', ' ')}", total, context),
            context.device,
            mirror=config.evaluation.mirror,
            autocast=autocast,
        ):
            rows[done : (done := done + len(part))] = part
        gather_rows(torch.from_numpy(rows), total, context.host_group)
        embeddings.append(rows)
    found = Validation()
    if rank == 0:
        labels = Labels(query.pid, query.camid, gallery.pid, gallery.camid)
        origin = dataset.origin(EVALUATED[on][0])
        found = _ranked(config, context, embeddings, labels, (dataset.merged, origin), best)
    if world > 1:
        # The others wait here, where nothing times out, and not in the next step's exchange.
        dist.barrier(context.host_group)
    return found


def _ranked(
    config: TrainConfig,
    context: WorkerContext,
    embeddings: Sequence[np.ndarray],
    labels: Labels,
    merged: tuple[list[str], np.ndarray],
    best: float,
) -> Validation:
    """Rank the gallery for the queries.

    `embeddings` are those of the queries and the gallery; `merged` are the names of the datasets,
    and that of each query as a position among them.
    """
    found, base = embeddings
    metric = config.evaluation.metric
    kept: dict[str, np.ndarray] = {}
    with _all_cores():
        with phase(context.progress, "ranking"):
            result = rank_gallery(found, base, labels, metric=metric, device=context.device)
        if result.mAP >= best and len(found) * len(base) <= THRESHOLD_PAIRS:
            thresholds = measure_thresholds(found, base, labels, progress=context.progress)
            kept["thresholds"] = np.array(json.dumps(thresholds.to_json()))
    if config.evaluation.rank_list:
        kept |= choose_rank_list(found, base, labels, result, metric)
        kept |= choose_map(base, labels)
    return Validation(result.summary() | by_name(of_each_dataset(result, *merged)), kept)


def measure_test(
    config: TrainConfig, dataset: Dataset, context: WorkerContext, checkpoint: Checkpoint
) -> dict[str, float]:
    """Return a checkpoint's metrics on the test split, on rank 0; every rank calls it."""
    precision.set_precision(config)
    model = build_model(config.replace(model__weights="none"), checkpoint.origin.identities)
    model = model.to(context.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    checkpoint.load_model(model)
    cast = precision.autocast(config, context.device)
    with closing(make_decoders(config, dataset, context)) as decoders:
        return validate(config, dataset, context, decoders, model, cast, on="test").metrics


def _counted(
    batches: Iterable[Batch], stage: str, total: int, context: WorkerContext
) -> Iterator[Batch]:
    """Yield the same batches; rank 0 reports progress as if all ranks were equally fast."""
    report = context.progress if context.rank == 0 else silent
    done = 0
    report(stage, 0, total)
    for batch in batches:
        yield batch
        done = min(done + len(batch.row) * context.world, total)
        report(stage, done, total)
    report(stage, total, total)  # rank 0 may have an image fewer than others


@contextmanager
def _all_cores() -> Iterator[None]:
    """Use all cores: Ray gave this worker one thread, and the others wait for it to rank."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, min(os.cpu_count() or 1, THREADS)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
