"""MLflow: one parent run a sweep, one child run a trial."""

from __future__ import annotations

import logging
import math

from data_shards.errors import StorageError
from reid_train.config import TrainConfig
from reid_train.tracking.tracker import Tracker
from tune.store import Trial

logger = logging.getLogger(__name__)

_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


def begin_child(trial: Trial, base: TrainConfig, parent: str | None) -> None:
    """Give a trial its MLflow run, or reopen it; a trial is run even if MLflow cannot be reached.

    Args:
        trial: its `mlflow_run_id` is set.
        base: the sweep's configuration.
        parent: the sweep's run; None tracks nothing.
    """
    if parent is None:
        return
    config, tracking = trial.config(base), base.tracking
    known = trial.mlflow_run_id
    try:
        tracker = Tracker.start(
            tracking.uri, tracking.experiment, run_name=trial.name, run_id=known
        )
    except StorageError as error:
        logger.warning("%s is not tracked: %s", trial.name, error)
        return
    trial.mlflow_run_id = tracker.run_id
    if known is None:
        tracker.log_parameters(config.flat())
    # A population changes values under way; parameters cannot be, so these go to metrics.
    numbers = {n: v for n, v in trial.values.items() if isinstance(v, (int, float))}
    step = int(trial.evaluations[-1]["step"]) if trial.evaluations else 0
    tracker.log({f"setting/{name}": float(value) for name, value in numbers.items()}, step)
    tracker.set_tags(
        {"mlflow.parentRunId": parent, "trial": trial.number, "point": trial.label or "search"}
    )
    tracker.close()


def end_child(trial: Trial, base: TrainConfig) -> None:
    """Log what a stopped worker may have left unsent, the state and its reason; end the run."""
    if trial.mlflow_run_id is None:
        return
    tracker = Tracker(base.tracking.uri, trial.mlflow_run_id, system_metrics=False)
    for evaluation in trial.evaluations:
        metrics = {
            name: value
            for name, value in evaluation.items()
            if name not in ("epoch", "step") and isinstance(value, float) and math.isfinite(value)
        }
        tracker.log(metrics, int(evaluation["step"]))
    tracker.set_tags({"state": trial.state, "reason": trial.reason or None})
    tracker.finish(_STATUS[trial.state])  # type: ignore[arg-type]
