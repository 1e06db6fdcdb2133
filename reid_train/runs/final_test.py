"""The test split is measured once, after a training whose best checkpoint validation chose."""

import json
from contextlib import nullcontext
from typing import Any

from ray.exceptions import RayError
from ray.train import TrainingFailedError

from data_shards.dataset import Dataset
from data_shards.errors import ObjectMissing, ReidError
from data_shards.progress import Display, Progress
from data_shards.ray_utils import start_ray
from data_shards.storage import open_storage
from reid_train.config import TrainConfig
from reid_train.runs.console import Board, beside_driver, watch
from reid_train.runs.process import Stop
from reid_train.runs.ray_trainer import TEST, explained, run_workers


def final_test(
    config: TrainConfig, dataset: Dataset, checkpoint: str, progress: Progress
) -> dict[str, float]:
    """Measure a run's best checkpoint on the test split with the run's workers.

    The metrics are kept in the run's folder, so a run that is resumed does not measure again unless
    another checkpoint is the best. They are empty if test itself chose the checkpoint, or if the
    dataset has no test split.
    """
    has_test = all(len(index) for index in dataset.evaluated("test"))
    if dataset.choose_split(config.evaluation.split) == "test" or not has_test:
        return {}
    run = f"{config.output}/{config.name}"
    if (known := _measured(run, checkpoint)) is not None:
        return known
    start_ray(config.workers * (config.cpus_per_worker or 1))
    board: Any = beside_driver(Board).remote()
    shown = watch(board, progress, config, Stop()) if isinstance(progress, Display) else None
    try:
        with shown or nullcontext():
            run_workers(config, dataset, None, board=board, test=checkpoint)
    except (TrainingFailedError, RayError) as error:
        reason = explained(error, config, advise=False)
        raise ReidError(
            f"{run} is trained, but {checkpoint} was not measured on the test split: {reason}. "
            "Continue it to measure"
        ) from error
    metrics = _measured(run, checkpoint)
    assert metrics is not None
    return metrics


def _measured(run: str, checkpoint: str) -> dict[str, float] | None:
    """The metrics that were kept, if they are of this checkpoint."""
    try:
        found = json.loads(open_storage(run).read(TEST))
    except ObjectMissing:
        return None
    return found["metrics"] if found["checkpoint"] == checkpoint else None
