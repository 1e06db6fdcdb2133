"""A run under Ray Train: its workers, where checkpoints go, what is retried."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import OutOfMemoryError
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2._internal.execution import context as train_context
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
from rich.console import Console

from data_shards.cache import ShardCache
from data_shards.dataset import Dataset
from data_shards.errors import DataError, ReidError
from reid_train.config import TrainConfig
from reid_train.gauges import Gauges
from reid_train.memory import out_of_memory
from reid_train.progress import Board, watch
from reid_train.run_storage import first_whole, opened, ray_checkpoint, ray_storage, upload
from reid_train.tracking import Tracker
from reid_train.worker import Worker

logger = logging.getLogger(__name__)


def fit(
    config: TrainConfig, dataset: Dataset, run_id: str | None, *, console: Console
) -> ray.train.Result:
    """Train on a Ray cluster (the one at hand, or a local one that this starts).

    A run of that name which has checkpoints goes on from the last one.

    Args:
        config: as `prepare` returned it.
        dataset: what it trains on; every worker checks that it opens the same.
        run_id: MLflow run to log to, if any.
        console: where progress is shown.

    Returns:
        Ray Train's result: checkpoints and their metrics.

    Raises:
        ReidError: what a worker raised on purpose, or what made the run fail.
    """
    start_ray(config.workers)
    board = Board.remote()  # type: ignore[attr-defined]
    trainer = make_trainer(config, dataset, run_id, board=board)
    with watch(board, console):
        try:
            return trainer.fit()
        except (TrainingFailedError, OutOfMemoryError) as error:
            raise explained(error, config) from error


def make_trainer(
    config: TrainConfig,
    dataset: Dataset,
    run_id: str | None,
    *,
    board: Any = None,
    callbacks: Sequence[UserCallback] = (),
    start: str | None = None,
    until: int | None = None,
) -> TorchTrainer:
    """The Ray Train trainer of a run; `fit()` on it trains.

    Args:
        config: as `prepare` returned it.
        dataset: what it trains on.
        run_id: MLflow run that the first worker logs to, if any.
        board: a `Board` actor to show progress on, if anybody looks.
        callbacks: Ray Train's, such as Tune's to report a trial's metrics.
        start: checkpoint that a run without any of its own starts from, a folder or an s3:// URL.
        until: epoch after whose evaluation the run ends early, its schedule unchanged.
    """
    return _Trainer(
        _train_worker,
        train_loop_config={
            "config": config.to_json(),
            "manifest_digest": dataset.manifest.digest,
            "run_id": run_id,
            "board": board,
            "start": start,
            "until": until,
        },
        scaling_config=ScalingConfig(num_workers=config.workers, use_gpu=_use_gpu(config)),
        run_config=RunConfig(
            name=config.name,
            **ray_storage(config.output),
            failure_config=FailureConfig(max_failures=config.checkpoint.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2, checkpoint_score_attribute="mAP"),
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=list(callbacks),
        ),
    )


def start_ray(cpus: int, *, logs: bool = True) -> None:
    """Connect to the Ray cluster at hand, or start one here with at least `cpus` CPUs.

    Args:
        cpus: of a cluster that this starts.
        logs: show here what workers print and log.
    """
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": logs}
    if not os.environ.get("RAY_ADDRESS"):
        options |= {"address": "local", "num_cpus": max(cpus, os.cpu_count() or 1)}
    ray.init(**options)


def _train_worker(settings: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    for package in ("data_shards", "reid_train"):
        logging.getLogger(package).setLevel(logging.INFO)
    # Ray names this one after its file, so the level of its `LoggingConfig` does not reach it.
    for noisy in ("botocore", str(train_context.__file__)):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        _train(settings)
    except ReidError:
        # The driver says it in one line; Ray would print a traceback as well.
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)
        raise


def _train(settings: dict[str, Any]) -> None:
    """Train as this worker of the group."""
    # Only workers need the network; drivers and controllers start a third faster without it.
    from reid_train.loop import train

    config = TrainConfig.from_json(settings["config"])
    context = ray.train.get_context()
    rank, board = context.get_world_rank(), settings["board"]
    dataset = Dataset.open(config.data)
    if dataset.manifest.digest != settings["manifest_digest"]:
        raise DataError(f"{config.data} changed while the run was going on")
    run_id = settings["run_id"] if rank == 0 else None
    uri = config.tracking.uri if run_id else None
    gauges = Gauges(config.name or "")
    with Tracker(uri, run_id) as tracker:

        def log(values: dict[str, float], step: int) -> None:
            tracker.log(values, step)
            gauges.log(values, step)

        worker = Worker(
            rank=rank,
            world=context.get_world_size(),
            device=get_device(),  # type: ignore[arg-type]
            cache=ShardCache(
                dataset.storage, config.loader.cache.expanduser(), config.loader.cache_bytes
            ),
            report=partial(_report, run=f"{config.output}/{config.name}", until=settings["until"]),
            log=log,
            show=board.show.remote if board is not None else lambda state: None,
        )
        checkpoint = _starting_point(settings["start"])
        with contextlib.suppress(_Enough):
            if checkpoint is None:
                train(config, dataset, worker)
            else:
                with opened(checkpoint) as folder:
                    _require_more(folder, settings["until"])
                    train(config, dataset, worker, folder)


def _starting_point(start: str | None) -> ray.train.Checkpoint | None:
    """The run's furthest checkpoint that is whole, the same on all ranks; or where it starts."""
    newest = ray.train.get_checkpoint()
    if newest is None:
        return None if start is None else ray_checkpoint(start)
    path = ""
    if ray.train.get_context().get_world_rank() == 0:
        kept = ray.train.get_all_reported_checkpoints()
        kept.sort(key=lambda reported: reported.metrics["step"], reverse=True)
        path = first_whole([reported.checkpoint for reported in kept]).path
    return ray.train.Checkpoint(broadcast_from_rank_zero(path), newest.filesystem)


class _Enough(Exception):
    """Every rank raises it at the same report, so none is left waiting for another."""


def _report(metrics: dict[str, float], folder: Path | None, run: str, until: int | None) -> None:
    """Hand metrics and a checkpoint to Ray Train, which uploads it while training goes on."""
    checkpoint = None if folder is None else ray.train.Checkpoint.from_directory(folder)
    mode = ray.train.CheckpointUploadMode.ASYNC
    ray.train.report(
        metrics,
        checkpoint=checkpoint,
        checkpoint_upload_mode=mode,
        checkpoint_upload_fn=partial(upload, run),
    )
    if until is not None and metrics["epoch"] >= until:
        raise _Enough


def _require_more(folder: Path, until: int | None) -> None:
    """Leave a run alone that was stopped between its last report and its end."""
    from reid_train.checkpoint import Checkpoint

    if until is not None and Checkpoint.open(folder).progress.epoch >= until:
        raise _Enough


class _PermanentErrors(DefaultFailurePolicy):
    """Retries what a machine may have caused; an error raised on purpose would only recur."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if _on_purpose(training_failed_error):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class _Trainer(TorchTrainer):
    """TorchTrainer that does not retry errors raised on purpose: Ray has no public setting."""

    def _initialize_and_run_controller(self, **arguments):
        policy = _PermanentErrors(self.run_config.failure_config or FailureConfig())
        return super()._initialize_and_run_controller(**arguments | {"failure_policy": policy})


def _on_purpose(error: Exception) -> ReidError | None:
    """The controller's or the first worker's `ReidError`, if there is one."""
    if isinstance(error, ControllerError) and isinstance(error.controller_failure, ReidError):
        return error.controller_failure
    if isinstance(error, WorkerGroupError):
        for failure in error.worker_failures.values():
            cause = getattr(failure, "cause", failure)
            if isinstance(cause, ReidError):
                return cause
    return None


def explained(error: TrainingFailedError | OutOfMemoryError, config: TrainConfig) -> ReidError:
    """What a failed training means to a person: the cause if it was raised on purpose."""
    cause = _on_purpose(error)
    if cause is not None:
        return cause
    if memory := out_of_memory(str(error)):
        return ReidError(
            f"{memory}. Use fewer workers or --loader.workers on a machine, or a smaller batch, and"
            f" continue with --resume --name {config.name} --output {config.output}"
        )
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    often = f" more than {config.checkpoint.max_failures} times, last"
    return ReidError(
        f"training failed{often if isinstance(error, WorkerGroupError) else ''} with: {text[-1]}. "
        f"Continue with --resume --name {config.name} --output {config.output}"
    )


def _use_gpu(config: TrainConfig) -> bool:
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if config.device == "cuda" and gpus < config.workers:
        logger.warning(
            "%d GPUs are needed and %d are here: waiting for the cluster", config.workers, gpus
        )
    return config.device == "cuda" or (config.device == "auto" and gpus >= config.workers)
