"""Checks on the driver, before a run takes its name, of what would fail later."""

from __future__ import annotations

import torch

from data_shards.dataset import Dataset
from data_shards.errors import ConfigError
from reid_train.config import TrainConfig
from reid_train.model.factory import build_model
from reid_train.runs.run_dir import Run
from reid_train.training.data import epoch_plan, train_index
from reid_train.training.optimizer import build_regularizer


def check(config: TrainConfig, dataset: Dataset, saved: Run | None = None) -> None:
    """Plan an epoch, build the network, and run it on an empty image.

    Args:
        config: as `prepare` returned it.
        dataset: what it will train on.
        saved: the run that is resumed; it no longer needs its pretrained weights.

    Raises:
        ReidError: there is no train split or too few identities in it; weights are not there or do
            not fit; images are too small for the stripes; an exclusion matches nothing.
    """
    if len(epoch_plan(config, train_index(dataset), 0)) == 0:
        raise ConfigError(
            f"an epoch of {dataset.url} has fewer global batches than one optimizer step averages: "
            "lower --batch.accumulate, or set --batch.steps-per-epoch"
        )
    if saved is not None:
        config = config.replace(model__weights="none")
    model = build_model(config, len(dataset.identities))
    build_regularizer(config, model)
    with torch.no_grad():
        model.eval().embed(torch.zeros(1, 3, config.image.height, config.image.width))
