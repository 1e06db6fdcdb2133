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
import ray.exceptions
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
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2._internal.constants import (
    COLLECTIVE_TIMEOUT_S_ENV_VAR,
    WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR,
)
from ray.train.v2._internal.execution import context as train_context
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from data_shards.cache import ShardCache
from data_shards.dataset import Dataset
from data_shards.errors import DataError, Interrupted, ReidError
from data_shards.progress import Display, phase
from reid_train.config import TrainConfig
from reid_train.out_of_memory import gpu_out_of_memory, out_of_memory
from reid_train.runs.console import Board, beside_driver, watch
from reid_train.runs.process import stop_signals
from reid_train.runs.ray_checkpoints import (
    first_whole,
    forget_missing,
    opened,
    ray_checkpoint,
    ray_storage,
    unlisted,
    upload,
)
from reid_train.runs.ray_internals import ResilientTrainer, on_purpose
from reid_train.runs.run_lock import Claim
from reid_train.runs.scratch import own_temporary_folder
from reid_train.tracking import prometheus
from reid_train.tracking.tracker import Tracker
from reid_train.training.context import Asked, Stopped, Worker

logger = logging.getLogger(__name__)

RESIZE_SECONDS = 30.0
"""Between two looks of an elastic run at whether nodes came."""


def fit(
    config: TrainConfig, dataset: Dataset, run_id: str | None, claim: Claim, *, progress: Display
) -> ray.train.Result:
    """Train on a Ray cluster (the one at hand, or a local one that this starts).

    A run of that name which has checkpoints goes on from the last one.

    Args:
        config: as `prepare` returned it.
        dataset: what it trains on; every worker checks that it opens the same.
        run_id: MLflow run to log to, if any.
        claim: the driver's lease on the run.
        progress: where the run is shown.

    Returns:
        Ray Train's result: checkpoints and their metrics.

    Raises:
        ReidError: what a worker raised on purpose, or what made the run fail.
        Interrupted: SIGTERM or SIGINT ended it, with a checkpoint.
    """
    run = f"{config.output}/{config.name}"
    forget_missing(run)
    start = unlisted(run)
    with phase(progress, "starting Ray"):
        start_ray(config.workers)
    board = beside_driver(Board).remote()
    trainer = make_trainer(config, dataset, run_id, claim=claim, board=board, start=start)
    with stop_signals() as stop, watch(board, progress, config, stop):
        try:
            result = trainer.fit()
        except (TrainingFailedError, OutOfMemoryError) as error:
            raise explained(error, config) from error
    if stop.signal is not None and not _ended(result, config):
        step = (result.metrics or {}).get("step", 0)
        raise Interrupted(
            f"stopped by {stop.signal.name} with a checkpoint after step {step}. "
            f"Continue with --resume --name {config.name} --output {config.output}",
            stop.signal,
        )
    return result


def make_trainer(
    config: TrainConfig,
    dataset: Dataset,
    run_id: str | None,
    *,
    claim: Claim | None = None,
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
        claim: without which nothing is written into the run's folder; a sweep's trials have none.
        board: a `Board` actor to show progress on, if anybody looks.
        callbacks: Ray Train's, such as Tune's to report a trial's metrics.
        start: checkpoint that a run without any of its own starts from, a folder or an s3:// URL.
        until: epoch after whose evaluation the run ends early, its schedule unchanged.
    """
    # Ray names a rank that does not answer. One that answers but does not go on keeps the others
    # waiting in a collective, torch's or Ray's: a little later, they give up.
    hang = config.checkpoint.hang_seconds
    waiting = hang * 3 // 2
    # Ray Train has no other settings; the driver's environment is passed on to its processes.
    os.environ[WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR] = str(hang)
    os.environ[COLLECTIVE_TIMEOUT_S_ENV_VAR] = str(waiting)
    return ResilientTrainer(
        _train_worker,
        train_loop_config={
            "config": config.to_json(),
            "manifest_digest": dataset.manifest.digest,
            "run_id": run_id,
            "board": board,
            "start": start,
            "until": until,
            "batch_size": config.batch_size,
            "claim": claim,
        },
        torch_config=TorchConfig(timeout_s=waiting),
        scaling_config=ScalingConfig(
            num_workers=(config.min_workers, config.workers)
            if config.min_workers
            else config.workers,
            use_gpu=use_gpu(config.device, config.min_workers or config.workers),
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        run_config=RunConfig(
            name=config.name,
            **ray_storage(config.output, claim),
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
    own_temporary_folder()
    for package in ("data_shards", "reid_train"):
        logging.getLogger(package).setLevel(os.environ.get("REID_LOG_LEVEL", "INFO"))
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
    from reid_train.training.checkpoint import Checkpoint
    from reid_train.training.loop import train

    config = TrainConfig.from_json(settings["config"])
    context = ray.train.get_context()
    rank, board, until = context.get_world_rank(), settings["board"], settings["until"]
    dataset = Dataset.open(config.data)
    if dataset.manifest.digest != settings["manifest_digest"]:
        raise DataError(f"{config.data} changed while the run was going on")
    run_id = settings["run_id"] if rank == 0 else None
    uri = config.tracking.uri if run_id else None
    show_gauges = prometheus.gauges(config.name or "")
    with Tracker(uri, run_id) as tracker:

        def log(values: dict[str, float], step: int) -> None:
            tracker.log(values, step)
            show_gauges(values)

        worker = Worker(
            rank=rank,
            world=context.get_world_size(),
            device=get_device(),  # type: ignore[arg-type]
            cache=ShardCache(
                dataset.storage, config.loader.cache.expanduser(), config.loader.cache_bytes
            ),
            report=partial(
                _report,
                run=f"{config.output}/{config.name}",
                until=until,
                claim=settings["claim"],
            ),
            log=log,
            show=board.show.remote if board is not None else lambda state: None,
            asked=_Asked(board, rank),
        )
        own = ray.train.get_checkpoint() is not None
        checkpoint = _starting_point(settings["start"])
        with contextlib.suppress(_Enough, Stopped):
            if checkpoint is None:
                train(config, dataset, worker)
            else:
                with opened(checkpoint) as folder:
                    saved = Checkpoint.open(folder)
                    if until is not None and saved.progress.epoch >= until:
                        raise _Enough  # stopped between its last report and its end
                    if rank == 0 and own:
                        # What MLflow has not got when a process dies, it gets from here.
                        saved.history().replay(tracker.log)
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


def _report(
    metrics: dict[str, float], folder: Path | None, run: str, until: int | None, claim: Claim | None
) -> None:
    """Hand metrics and a checkpoint to Ray Train, which uploads it while training goes on."""
    checkpoint = None if folder is None else ray.train.Checkpoint.from_directory(folder)
    mode = ray.train.CheckpointUploadMode.ASYNC
    ray.train.report(
        metrics,
        checkpoint=checkpoint,
        checkpoint_upload_mode=mode,
        checkpoint_upload_fn=partial(upload, run, claim=claim),
    )
    if until is not None and metrics["epoch"] >= until:
        raise _Enough


class _Asked:
    """What the driver, or a node that will be taken away, asks of the run."""

    def __init__(self, board: Any, rank: int) -> None:
        self._stopping = getattr(board, "stopping", None) if rank == 0 else None
        self._saved = False

    def __call__(self) -> Asked:
        leaving = ray.train.get_preemption_info() is not None  # every rank has to ask
        with contextlib.suppress(ray.exceptions.RayError):
            if self._stopping is not None and ray.get(self._stopping.remote(), timeout=10):
                return Asked.STOP
        if leaving and not self._saved:
            self._saved = True
            return Asked.SAVE
        return Asked.NOTHING


def _ended(result: ray.train.Result, config: TrainConfig) -> bool:
    return (result.metrics or {}).get("epoch") == config.total_epochs


def explained(
    error: TrainingFailedError | OutOfMemoryError, config: TrainConfig, *, advise: bool = True
) -> ReidError:
    """What a failed training means to a person: the cause if it was raised on purpose.

    Args:
        error: as Ray raised it.
        config: of the run.
        advise: say how to go on with the run, too.
    """
    cause = on_purpose(error)
    if cause is not None:
        return cause
    resume = f"with --resume --name {config.name} --output {config.output}"
    if reason := out_of_memory(str(error)):
        advice = (
            "Continue on more --workers, each with a smaller share of the batch, or with a smaller "
            f"--evaluation.batch if it was evaluating, {resume}"
            if gpu_out_of_memory(str(error))
            else "Use fewer workers or --loader.workers on a machine, or a smaller batch, and "
            f"continue {resume}"
        )
    else:
        last = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()[-1]
        often = f" more than {config.checkpoint.max_failures} times, last"
        reason = (
            f"training failed{often if isinstance(error, WorkerGroupError) else ''} with: {last}"
        )
        advice = f"Continue {resume}"
    return ReidError(f"{reason}. {advice}" if advise else reason)


def use_gpu(device: str, needed: int, *, free: bool = False) -> bool:
    """Whether workers get a GPU each: "cuda" says so, "auto" if as many are here as are needed.

    Args:
        device: as given.
        needed: GPUs.
        free: count those alone that nobody has now.
    """
    resources = ray.available_resources() if free else ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    if device == "cuda" and gpus < needed:
        logger.warning("%d GPUs are needed and %d are here: waiting for the cluster", needed, gpus)
    if device == "auto" and 0 < gpus < needed:
        logger.warning(
            "%d GPUs are here, fewer than the %d workers: going on without them. Lower --workers, "
            "or wait for more with --device cuda",
            *(gpus, needed),
        )
    return device == "cuda" or (device == "auto" and gpus >= needed)
