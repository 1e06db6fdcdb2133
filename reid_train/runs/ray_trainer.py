"""A run under Ray Train: its workers, where checkpoints go, what is retried."""

import contextlib
import json
import logging
import os
import platform
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.exceptions import RayError
from ray.train import ScalingConfig, TrainingFailedError, UserCallback, WorkerGroupError
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, get_device

from data_shards.cache import ShardCache
from data_shards.dataset import Dataset
from data_shards.errors import DataError, Interrupted, ReidError, StorageError
from data_shards.progress import Display
from data_shards.storage import LocalStorage, open_file, open_storage
from reid_train.config import TrainConfig
from reid_train.out_of_memory import gpu_out_of_memory, out_of_memory
from reid_train.runs import checkpoint_store
from reid_train.runs.console import Board, beside_driver, reporter, watch
from reid_train.runs.process import keep_freed_memory, own_temporary_folder, stop_signals
from reid_train.runs.ray_internals import CONTEXT_LOGGER, ResilientTrainer, on_purpose, set_timeouts
from reid_train.runs.run_lock import RunLock
from reid_train.tracking import prometheus
from reid_train.tracking.tracker import Tracker
from reid_train.tracking.uris import sqlite_file
from reid_train.training.checkpoint import Checkpoint
from reid_train.training.context import Stopped, StopRequest, WorkerContext

logger = logging.getLogger(__name__)

RESIZE_SECONDS = 30.0  # how often an elastic run looks for new nodes
LOCK_SECONDS = 5.0  # how often rank 0 checks its driver's lock; a new driver's workers start later
TEST = "test.json"  # in the run's folder: the test metrics of its best checkpoint
START = "start"  # name of the folder of a checkpoint that is not the run's own


def fit(
    config: TrainConfig, dataset: Dataset, run_id: str | None, lock: RunLock, display: Display
) -> None:
    """Train with `run_workers`, show it, and say in one line why it failed or who stopped it."""
    board = beside_driver(Board).remote()
    with stop_signals() as stop, watch(board, display, config, stop):
        try:
            kept = f"{config.output}/{config.name}"
            run_workers(config, dataset, run_id, lock=lock, board=board, initial=kept)
        except (TrainingFailedError, RayError) as error:
            raise explained(error, config) from error
    if stop.signal is not None:
        stored = checkpoint_store.stored_checkpoints(f"{config.output}/{config.name}")
        newest = next(iter(stored), None)
        if newest is None or newest.epoch < config.total_epochs:
            saved = f" with a checkpoint after step {newest.step}" if newest else ""
            raise Interrupted(
                f"stopped by {stop.signal.name}{saved}. Continue with python -m reid_train train "
                f"{_resuming(config)}",
                stop.signal,
            )


def run_workers(
    config: TrainConfig,
    dataset: Dataset,
    run_id: str | None,
    *,
    lock: RunLock | None = None,
    board: Any = None,
    callbacks: Sequence[UserCallback] = (),
    start: str | None = None,
    initial: str | None = None,
    until: int | None = None,
    test: str | None = None,
) -> None:
    """Train with a group of Ray Train workers until the run ends. It resumes if it can.

    Args:
        config: as `prepare` returned it.
        dataset: every worker checks that it opens the same one.
        run_id: MLflow run that rank 0 logs to.
        lock: nothing is written into the run's folder once it is not held; trials have none.
        board: a `Board` actor that shows the progress.
        callbacks: Ray Train's, such as one that reports a trial's metrics to Ray Tune.
        start: checkpoint that a run without its own starts from, a folder or an s3:// URL.
        initial: folder or s3:// URL of the run or sweep that keeps the weights to start from
            otherwise (`init_from.keep`).
        until: epoch after whose evaluation the run ends early, with the same schedule.
        test: instead of training, measure this checkpoint of the run on the test split, and write
            the metrics to `TEST` in the run's folder.
    """
    # A rank that does not answer is named by Ray. One that answers but makes no progress keeps the
    # others waiting in a collective, torch's or Ray's, which gives up a little later.
    hang = config.checkpoint.hang_seconds
    set_timeouts(hang, hang * 3 // 2)
    least = config.min_workers or config.workers
    gpu = use_gpu(config.device, least)
    settings = {"run_id": run_id, "board": board, "start": start, "until": until, "lock": lock}
    settings["test"] = test
    settings["initial"] = initial if config.init_from else None
    settings |= {"config": config.to_json(), "manifest_digest": dataset.manifest.digest}
    # Ray Train's own record of a run is not kept: the run's folder is the only one.
    with tempfile.TemporaryDirectory(prefix="reid-ray-") as folder:
        ResilientTrainer(
            _train_worker,
            run=f"{config.output}/{config.name}",
            batch_size=config.batch_size,
            train_loop_config=settings,
            torch_config=TorchConfig(timeout_s=hang * 3 // 2),
            scaling_config=ScalingConfig(
                num_workers=(least, config.workers) if config.min_workers else config.workers,
                use_gpu=gpu,
                # Nodes with GPUs have more cores than workers, which need not be reserved.
                resources_per_worker=None if gpu else {"CPU": config.cpus_per_worker or 1},
                elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            ),
            run_config=ray.train.RunConfig(
                name=ray_name(str(config.name)),
                storage_path=folder,
                failure_config=ray.train.FailureConfig(max_failures=config.checkpoint.max_failures),
                logging_config=ray.train.LoggingConfig(log_level="WARNING"),
                callbacks=list(callbacks),
            ),
        ).fit()


def ray_name(name: str) -> str:
    """Return a run's name as Ray's metrics accept it: other letters than ASCII's become `_`."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)


def _train_worker(settings: dict[str, Any]) -> None:
    """The function that every Ray Train worker runs."""
    own_temporary_folder()
    for package in ("data_shards", "reid_train"):
        logging.getLogger(package).setLevel(os.environ.get("REID_LOG_LEVEL", "INFO"))
    for noisy in ("botocore", CONTEXT_LOGGER):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        _train(settings)
    except ReidError:
        # The driver prints it in one line; Ray would print a traceback as well.
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)
        raise


def _train(settings: dict[str, Any]) -> None:
    """Train as this worker of the group."""
    # Only workers need the network; drivers and controllers start a third faster without it.
    from reid_train.runs.init_from import read_kept
    from reid_train.training.loop import train

    config = TrainConfig.from_json(settings["config"])
    torch.set_num_threads(config.cpus_per_worker or 1)
    ray_context = ray.train.get_context()
    rank, board = ray_context.get_world_rank(), settings["board"]
    until, lock = settings["until"], settings["lock"]
    _require_shared_folders(config, lock)
    cache = config.loader.node_cache
    dataset = Dataset.open(config.data, settings["manifest_digest"], cache)
    if dataset.manifest.digest != settings["manifest_digest"]:
        raise DataError(f"{config.data} changed since the run was started")
    run = f"{config.output}/{config.name}"
    context = WorkerContext(
        rank=rank,
        world=ray_context.get_world_size(),
        device=get_device(),  # type: ignore[arg-type]
        cache=ShardCache(dataset.storage, *cache),
    )
    if context.device.type == "cpu":
        keep_freed_memory()
    if board is not None:
        context.show, context.progress = board.show.remote, reporter(board)
    if settings["test"]:
        _measure(config, dataset, context, settings["test"])
        return
    run_id = settings["run_id"] if rank == 0 else None
    show_gauges = prometheus.gauges(ray_name(config.name or ""))
    with (
        Tracker(config.tracking.uri, run_id, may_send=lock and lock.is_held) as tracker,
        _resume(run, rank, settings["start"]) as resume,
    ):
        if resume is not None:
            if until is not None and resume.progress.epoch >= until:
                return  # it was killed between its last report and its end
            if rank == 0 and resume.folder.name != START:
                # The checkpoint has the values that MLflow missed when a process died.
                resume.history().replay(tracker.log)

        def log(values: dict[str, float], step: int) -> None:
            tracker.log(values, step)
            show_gauges(values)

        keeper = checkpoint_store.Keeper(run, lock, resume) if rank == 0 else None
        context.report, context.log = partial(_report, keeper, until), log
        context.stop_request = _stop_requests(board, rank, lock)
        initial = None
        if resume is None and settings["initial"] is not None:
            initial = read_kept(settings["initial"], config.init_digest)
        with contextlib.suppress(_Enough, Stopped):
            train(config, dataset, context, resume, initial)


def _measure(config: TrainConfig, dataset: Dataset, context: WorkerContext, name: str) -> None:
    """Measure a checkpoint of the run on the test split; rank 0 writes the metrics."""
    from reid_train.training.validation import measure_test

    run = f"{config.output}/{config.name}"
    with checkpoint_store.first_whole(run, [name]) as checkpoint:
        assert checkpoint is not None
        metrics = measure_test(config, dataset, context, checkpoint)
    if context.rank == 0:
        result = {"checkpoint": name, "metrics": metrics}
        open_storage(run).write(TEST, json.dumps(result, indent=2).encode())


def _require_shared_folders(config: TrainConfig, lock: RunLock | None) -> None:
    """Raise `StorageError` if this node lacks a file that the driver has in a local folder."""
    files = {"--data": f"{config.data}/manifest.json"}
    if lock is not None:
        files["--output"] = f"{config.output}/{config.name}/run.json"
    if file := sqlite_file(config.tracking.uri or ""):
        files["--tracking.uri"] = str(file)
    for flag, file in files.items():
        storage, key = open_file(file)
        if isinstance(storage, LocalStorage) and not storage.exists(key):
            advice = "a server's address" if flag == "--tracking.uri" else "an s3:// URL"
            raise StorageError(
                f"node {platform.node()} has no {file}: give {flag} {advice}, or a place that all "
                "nodes share"
            )


@contextlib.contextmanager
def _resume(run: str, rank: int, start: str | None) -> Iterator[Checkpoint | None]:
    """Open the checkpoint to resume from. Rank 0 chooses it, for all ranks."""
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(checkpoint_store.newest_whole(run)) if rank == 0 else None
        name = broadcast_from_rank_zero("" if found is None else found.folder.name)
        if found is None and name:
            found = stack.enter_context(checkpoint_store.first_whole(run, [name]))
        elif not name and start is not None:
            found = stack.enter_context(checkpoint_store.opened(start, START))
        yield found


class _Enough(Exception):
    """Training reached `until`. Every rank raises it at the same report."""


def _report(
    keeper: checkpoint_store.Keeper | None,
    until: int | None,
    metrics: dict[str, float],
    folder: Path | None,
) -> None:
    """Hand metrics, and rank 0's checkpoint, to Ray Train. It uploads while training continues."""

    def upload(checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        assert keeper is not None
        keeper.keep(Path(checkpoint.path), name, metrics)
        # Ray gets a name in its own folder, where it looks for nothing.
        storage: Any = ray.train.get_context().get_storage()
        place = f"{storage.experiment_fs_path}/{name}"
        return ray.train.Checkpoint(place, storage.storage_filesystem)

    ray.train.report(
        metrics,
        checkpoint=None if folder is None else ray.train.Checkpoint.from_directory(folder),
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        checkpoint_upload_fn=upload,
    )
    if until is not None and metrics["epoch"] >= until:
        raise _Enough


def _stop_requests(board: Any, rank: int, lock: RunLock | None) -> Callable[[], StopRequest]:
    """Return a function that says whether the run has to stop, or to save because a node leaves.

    Rank 0 also checks the driver's lock. Workers may outlive a killed driver, and must not log
    steps that the workers of the next one log too.
    """
    stopping = getattr(board, "stopping", None)  # the board of a sweep's trial has none
    checked, saved = time.monotonic(), False

    def ask() -> StopRequest:
        nonlocal checked, saved
        leaving = ray.train.get_preemption_info() is not None  # every rank has to ask
        if rank == 0 and lock is not None and time.monotonic() - checked > LOCK_SECONDS:
            checked = time.monotonic()
            lock.require()
        if rank == 0 and stopping is not None:
            with contextlib.suppress(RayError):
                if ray.get(stopping.remote(), timeout=10):
                    return StopRequest.STOP
        if leaving and not saved:
            saved = True
            return StopRequest.SAVE
        return StopRequest.NONE

    return ask


def _resuming(config: TrainConfig) -> str:
    """The options that continue a run."""
    name, output = (shlex.quote(str(value)) for value in (config.name, config.output))
    return f"--resume --name {name} --output {output}"


def explained(
    error: TrainingFailedError | RayError, config: TrainConfig, *, advise: bool = True
) -> ReidError:
    """Return a failed training's cause in one line; with `advise`, also how to continue the run."""
    if cause := on_purpose(error):
        return cause
    resume = f"with {_resuming(config)}"
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
        retried = isinstance(error, WorkerGroupError)
        often = f" more than {config.checkpoint.max_failures} times, last" if retried else ""
        reason = f"training failed{often} with: {last}"
        advice = f"Continue {resume}"
    return ReidError(f"{reason}. {advice}" if advise else reason)


def use_gpu(device: str, needed: int, *, free: bool = False, warn: bool = True) -> bool:
    """Return whether each worker gets a GPU; with `free`, only those that are free now count."""
    resources = ray.available_resources() if free else ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    if warn and device == "cuda" and gpus < needed:
        logger.warning("%d GPUs are needed and %d are here: waiting for the cluster", needed, gpus)
    if warn and device == "auto" and 0 < gpus < needed:
        logger.warning(
            "%d GPUs are here, fewer than the %d workers: training on CPUs. Lower --workers, or "
            "wait for more GPUs with --device cuda",
            *(gpus, needed),
        )
    return device == "cuda" or (device == "auto" and gpus >= needed)
