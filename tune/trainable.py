"""One trial, in its own process on the cluster: the training that `python -m reid_train` runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ray import tune
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.tune.integration.ray_train import CHECKPOINT_PATH_KEY, TuneReportCallback

from data_shards.dataset import Dataset
from reid_train.config import TrainConfig
from reid_train.runs.ray_trainer import explained, make_trainer
from reid_train.training.context import UNMEASURED


def run_trial(task: dict[str, Any], board: Any) -> None:
    """Train as the task says, and report each evaluation to Ray Tune.

    What the configuration is to blame for is reported as a result named `failure`. A lost machine
    raises, and Ray Tune runs the trial again: it goes on from the last checkpoint of its run.

    Args:
        task: `number`, `config` (JSON), `run_id` in MLflow, `start` and `until` (`make_trainer`).
        board: `TrialBoard` actor that shows progress.
    """
    config = TrainConfig.from_json(task["config"])
    trainer = make_trainer(
        config,
        Dataset.open(config.data),
        task["run_id"],
        board=_Line(board, task["number"]),
        callbacks=[_Report()],
        start=task["start"],
        until=task["until"],
    )
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        # A trial is continued by its sweep alone: nobody is told how.
        tune.report({"failure": str(explained(error, config, advise=False))})
        return
    # A driver that was killed may have missed a report: the kept checkpoints have theirs.
    kept = [
        _evaluation(metrics, checkpoint.path)
        for checkpoint, metrics in result.best_checkpoints or []
        if metrics["mAP"] > UNMEASURED
    ]
    tune.report({"kept": kept})


class _Report(TuneReportCallback):
    """Hands evaluations to Ray Tune; checkpoints between evaluations are Ray Train's affair."""

    def after_report(self, run_context, metrics, checkpoint) -> None:
        if checkpoint is not None and metrics[0]["mAP"] > UNMEASURED:
            evaluation = _evaluation(metrics[0], checkpoint.path)
            super().after_report(run_context, [evaluation], None)


def _evaluation(metrics: dict[str, Any], path: str) -> dict[str, Any]:
    return {k: v for k, v in metrics.items() if k != CHECKPOINT_PATH_KEY} | {
        "checkpoint": PurePosixPath(path).name
    }


@dataclass(frozen=True)
class _Line:
    """What a run takes for its board: one line of the sweep's, in the shape of an actor."""

    board: Any
    number: int

    @property
    def show(self) -> _Line:
        return self

    def remote(self, state: dict[str, object]) -> None:
        self.board.show.remote(self.number, state)
