"""One trial in its own process on the cluster: the training that `python -m reid_train` runs."""

from __future__ import annotations

from functools import partial
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.train import TrainingFailedError
from ray.tune.integration.ray_train import CHECKPOINT_PATH_KEY, TuneReportCallback

from data_shards.dataset import Dataset
from data_shards.progress import silent
from reid_train.config import TrainConfig
from reid_train.runs.checkpoint_store import stored_evaluations
from reid_train.runs.ray_trainer import explained, run_workers
from reid_train.training.context import UNMEASURED


def run_trial(task: dict[str, Any], board: Any) -> None:
    """Train, and report each evaluation to Ray Tune.

    A failure that the configuration causes is reported as a result named `failure`. A lost machine
    raises, and the trial is run again: it resumes from the last checkpoint of its run.

    Args:
        task: `number`, `config` (JSON), `run_id` in MLflow, `start` and `until` (`run_workers`).
        board: the sweep's `Board` actor, to show progress on.
    """
    config = TrainConfig.from_json(task["config"])
    try:
        run_workers(
            config,
            Dataset.open(config.data),
            task["run_id"],
            board=_trial_board(board, config.name or ""),
            callbacks=[_Report()],
            start=task["start"],
            until=task["until"],
        )
    except TrainingFailedError as error:
        # Only its sweep continues a trial, so no advice on how to do it.
        tune.report({"failure": str(explained(error, config, advise=False))})
        return
    # A driver that was killed may have missed a report: the checkpoints that are kept have it.
    tune.report({"kept": stored_evaluations(f"{config.output}/{config.name}")})


class _Report(TuneReportCallback):
    """Reports evaluations to Ray Tune, not the checkpoints between them."""

    def after_report(self, run_context, metrics, checkpoint) -> None:
        if checkpoint is not None and metrics[0]["mAP"] > UNMEASURED:
            evaluation = _evaluation(metrics[0], checkpoint.path)
            super().after_report(run_context, [evaluation], None)


def _evaluation(metrics: dict[str, Any], path: str) -> dict[str, Any]:
    return {k: v for k, v in metrics.items() if k != CHECKPOINT_PATH_KEY} | {
        "checkpoint": PurePosixPath(path).name
    }


def _trial_board(board: Any, trial: str) -> Any:
    """The sweep's board as a run uses its own: states are shown under the trial's name."""
    return SimpleNamespace(
        show=SimpleNamespace(remote=partial(board.show.remote, trial=trial)),
        progress=SimpleNamespace(remote=silent),
    )
