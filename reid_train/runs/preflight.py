"""Checks on the driver, before a run takes its name, of everything that would fail later."""

from typing import TYPE_CHECKING

import numpy as np

from data_shards.dataset import Dataset
from data_shards.errors import ConfigError, DataError, StorageError
from data_shards.ray_utils import require_ray_cluster
from reid_train.config import TrainConfig
from reid_train.runs.run_dir import Run
from reid_train.tracking.server import require_experiment, require_names
from reid_train.tracking.uris import sqlite_file
from reid_train.training.data import epoch_plan, train_index

if TYPE_CHECKING:
    from reid_train.training.initial import Initial


def check_settings(config: TrainConfig, dataset: Dataset, saved: Run | None = None) -> None:
    """Check the settings against the dataset, the cluster and MLflow, without PyTorch.

    `saved` is the run that is resumed. A check that fails raises a `ReidError`.
    """
    require_ray_cluster()
    require_identities(config, dataset)
    require_measurable(dataset, dataset.choose_split(config.evaluation.split))
    require_tracking(config, saved)
    if len(epoch_plan(config, dataset, 0)) == 0:
        raise ConfigError(
            f"an epoch of {dataset.url} has fewer global batches than one optimizer step averages: "
            "lower --batch.accumulate, or set --batch.steps-per-epoch"
        )


def check_network(
    config: TrainConfig,
    dataset: Dataset,
    saved: Run | None = None,
    initial: "Initial | None" = None,
) -> None:
    """Build the network, and run it on an empty image.

    A run that is resumed no longer needs its pretrained weights. `initial` are the weights that a
    new run starts from instead. A check that fails raises a `ReidError`.
    """
    import torch

    from reid_train.model.pretrained import build_model
    from reid_train.training.optimizer import build_regularizer

    has_weights = saved is not None or initial is not None
    config = config.replace(model__weights="none") if has_weights else config
    model = build_model(config, len(dataset.identities))
    regularizer = build_regularizer(config, model)
    if initial is not None:
        initial.load(model, regularizer)
    with torch.no_grad():
        model.eval().embed(torch.zeros(1, 3, config.image.height, config.image.width))


def require_identities(config: TrainConfig, dataset: Dataset) -> None:
    """Raise `ConfigError` if the train split has too few identities for a batch."""
    batch = config.batch
    _, images = np.unique(train_index(dataset).label, return_counts=True)
    fewest = batch.images if batch.small_identities == "drop" else 1
    people = int((images >= fewest).sum())
    if people >= batch.identities:
        return
    found = f"{batch.identities} people a batch, but the training split has {people}"
    if fewest > 1:
        found += f" with {fewest} images or more"
    if people < 2:
        raise ConfigError(f"{found}: training needs at least 2")
    advice = f"give --batch.identities {people} or fewer"
    if fewest > 1:
        advice += ", or --batch.small-identities replace"
    raise ConfigError(f"{found}: {advice}")


def require_measurable(dataset: Dataset, split: str = "test") -> None:
    """Raise `DataError` if there are a query and a gallery, but no query has a match.

    Both the split that chooses the best checkpoint and the test split, which is measured in the
    end, are checked.
    """
    for name in sorted({split, "test"}):
        # Without a query or a gallery it is trained without being measured.
        is_measured = all(len(index) for index in dataset.evaluated(name))
        if is_measured and (reason := dataset.why_not_measurable(name)):
            on = " on its validation split" if name == "validation" else ""
            raise DataError(
                f"{dataset.url} cannot be measured{on}: {reason}. Build it with other query "
                "and gallery images, or without any to train without measuring"
            )


def require_tracking(config: TrainConfig, saved: Run | None) -> None:
    """Raise a `ReidError` if MLflow would refuse a name, or does not take a new run.

    A run that is resumed continues while MLflow is away.
    """
    tracking = config.tracking
    if tracking.uri == "off":
        return
    model = None if tracking.model_name == "off" else tracking.model_name
    require_names(model=model, experiment=tracking.experiment, run=config.name)
    if tracking.uri is None:
        return
    if saved is None:
        require_experiment(tracking.uri, tracking.experiment)
    elif (file := sqlite_file(tracking.uri)) is not None and not file.exists():
        raise StorageError(
            f"MLflow's file {file} is not there any more: give its place with --tracking.uri "
            "sqlite:////path/mlflow.db, or give --tracking.uri off"
        )
