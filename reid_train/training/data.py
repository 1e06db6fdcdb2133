"""The images of a training: the plan of an epoch, and this rank's batches of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from data_shards.dataset import Dataset
from data_shards.errors import DataError
from data_shards.index import Index
from data_shards.sampler import plan, plan_apart, slice_for_rank
from reid_train.config import TrainConfig

if TYPE_CHECKING:
    from data_shards.loading.loader import Batch, Decoders
    from reid_train.training.context import WorkerContext


def train_index(dataset: Dataset) -> Index:
    """Return the index of the training images; raise a `DataError` if there are none."""
    index = dataset.index("train")
    if len(index) == 0:
        raise DataError(f"{dataset.url} has no train split: build it with training images")
    return index


def epoch_plan(config: TrainConfig, dataset: Dataset, epoch: int) -> np.ndarray:
    """Return an epoch's global batches: train index rows, (steps · accumulate, P·K) int64."""
    batch, steps = config.batch, config.batch.steps_per_epoch
    make = plan
    if batch.datasets == "apart":
        make = partial(plan_apart, dataset=dataset.origin("train"))
    rows = make(
        train_index(dataset),
        seed=config.seed,
        epoch=epoch,
        identities=batch.identities,
        images=batch.images,
        window=batch.window,
        steps=None if steps is None else steps * batch.accumulate,
        small=batch.small_identities,
    )
    return rows[: len(rows) // batch.accumulate * batch.accumulate]


def make_decoders(config: TrainConfig, dataset: Dataset, context: WorkerContext) -> Decoders:
    """Return the worker processes that decode all batches of a run, of evaluations too."""
    from data_shards.loading.loader import Decoders

    share = -(-config.batch_size // context.world)
    return Decoders(
        context.cache,
        dataset.manifest.shards,
        max(share, config.evaluation.batch),
        **config.image.model_dump(),
        workers=config.loader.workers or 0,
    )


def step_batches(
    config: TrainConfig,
    dataset: Dataset,
    context: WorkerContext,
    decoders: Decoders,
    rows: np.ndarray,
    start: int,
) -> Iterator[list[Batch]]:
    """Yield this rank's batches of each optimizer step on its device, `batch.accumulate` at a time.

    `rows` is the epoch's plan; `start` is the first optimizer step, from 0 within the epoch.
    """
    from data_shards.loading.loader import train_batches
    from data_shards.loading.on_device import on_device

    batches = train_batches(
        dataset,
        context.cache,
        slice_for_rank(rows, context.rank, context.world),
        start=start * config.batch.accumulate,
        workers=decoders.workers,
        decoders=decoders,
        **config.image.model_dump(),
    )
    batches = on_device(batches, context.device)
    while group := list(islice(batches, config.batch.accumulate)):
        yield group
