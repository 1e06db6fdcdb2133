"""A run under Ray Train: workers, storage, restarts, and the run's folder.

`<output>/<name>/` holds `run.json` (what the run is), the checkpoints that Ray Train keeps (the
best by mAP and the last) and its own snapshot of them; `--resume` continues from there.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from rich.console import Console

from data_shards.cache import ShardCache
from data_shards.dataset import Dataset
from data_shards.errors import ConfigError, DataError, ObjectExists, ObjectMissing, ReidError
from data_shards.storage import open_storage
from reid_train.config import TrainConfig
from reid_train.loop import train
from reid_train.progress import Board, watch
from reid_train.tracking import Tracker
from reid_train.worker import Worker

logger = logging.getLogger(__name__)

RESUMABLE = {
    "workers",
    "device",
    "loader",
    "checkpoint",
    "tracking",
    "evaluation",
    "output",
    "data",
}
"""Sections that may differ when a run is resumed: they do not change what is computed."""


@dataclass(frozen=True)
class Run:
    """A run as its folder's `run.json` describes it."""

    config: TrainConfig
    manifest_digest: str
    mlflow_run_id: str | None

    def to_json(self) -> bytes:
        """The run as JSON."""
        values = {
            "config": self.config.model_dump(mode="json"),
            "manifest_digest": self.manifest_digest,
            "mlflow_run_id": self.mlflow_run_id,
        }
        return json.dumps(values, indent=2).encode()

    @classmethod
    def read(cls, output: str, name: str) -> Run:
        """Read `<output>/<name>/run.json`.

        Raises:
            ConfigError: there is no such run, or it cannot be read.
        """
        where = f"{output.rstrip('/')}/{name}/run.json"
        try:
            values = json.loads(open_storage(output).read(f"{name}/run.json"))
            config = TrainConfig.from_json(json.dumps(values["config"]), where)
            return cls(config, values["manifest_digest"], values["mlflow_run_id"])
        except ObjectMissing as error:
            raise ConfigError(f"no run to resume: {where} is not there") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{where} is damaged: {error}") from error


def prepare(config: TrainConfig) -> TrainConfig:
    """Fill in what is decided on the driver: the name, and paths that hold in any folder.

    Raises:
        ConfigError: no data or no output was given.
    """
    for flag in ("data", "output"):
        if not getattr(config, flag):
            raise ConfigError(f"--{flag} is missing: give a folder or an s3://bucket/prefix")
    weights = config.model.weights
    return config.replace(
        name=config.name or f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}",
        data=_absolute(config.data),
        output=_absolute(config.output),
        model__weights=_absolute(weights) if Path(weights).exists() else weights,
        loader__cache=config.loader.cache.expanduser().absolute(),
    )


def same_training(old: TrainConfig, new: TrainConfig) -> None:
    """Refuse to resume a run as something else.

    Raises:
        ConfigError: names the settings that differ.
    """
    before, after = old.flat(), new.flat()
    changed = [
        name
        for name in before
        if before[name] != after[name]
        and name.split(".")[0] not in RESUMABLE
        and name != "optimizer.epochs"
    ]
    if changed:
        raise ConfigError(
            f"run {old.name} cannot be resumed with other settings of {', '.join(changed)}: "
            "leave them as they were, or start a new run under another --name"
        )


def claim(config: TrainConfig, dataset: Dataset, saved: Run | None) -> None:
    """Take the run's folder, or check that a resumed run is the same as before.

    Args:
        config: as `prepare` returned it.
        dataset: what it trains on.
        saved: the run that is resumed; None for a new one.

    Raises:
        ConfigError: the name is taken, or the resumed run had other settings.
        DataError: the resumed run had another dataset.
    """
    run = Run(config, dataset.manifest.digest, None)
    if saved is not None:
        same_training(saved.config, config)
        if saved.manifest_digest != run.manifest_digest:
            raise DataError(
                f"run {config.name} was trained on the dataset with manifest "
                f"{saved.manifest_digest[:12]}, but {config.data} has "
                f"{run.manifest_digest[:12]}: give it that dataset, or start a new run"
            )
        return
    try:
        _write(run, create_once=True)
    except ObjectExists as error:
        raise ConfigError(
            f"run {config.name} exists in {config.output}: continue it with --resume, or give "
            "another --name"
        ) from error


def record(run: Run) -> None:
    """Write `run.json` anew, once it is known where the run is tracked."""
    _write(run)


def _write(run: Run, *, create_once: bool = False) -> None:
    storage = open_storage(run.config.output)
    storage.write(f"{run.config.name}/run.json", run.to_json(), create_once=create_once)


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
    use_gpu = _use_gpu(config)
    board = Board.remote()  # type: ignore[attr-defined]
    trainer = _Trainer(
        _train_worker,
        train_loop_config={
            "config": config.to_json(),
            "manifest_digest": dataset.manifest.digest,
            "run_id": run_id,
            "board": board,
        },
        scaling_config=ScalingConfig(num_workers=config.workers, use_gpu=use_gpu),
        run_config=RunConfig(
            name=config.name,
            storage_path=config.output,
            failure_config=FailureConfig(max_failures=config.checkpoint.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_score_attribute="mAP"),
        ),
    )
    with watch(board, console):
        try:
            return trainer.fit()
        except TrainingFailedError as error:
            raise _explained(error, config) from error


def start_ray(cpus: int) -> None:
    """Connect to the Ray cluster at hand, or start one here with at least `cpus` CPUs."""
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level="WARNING")
    else:
        ray.init(address="local", num_cpus=max(cpus, os.cpu_count() or 1), logging_level="WARNING")


def _train_worker(settings: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    config = TrainConfig.from_json(settings["config"])
    context = ray.train.get_context()
    rank, board = context.get_world_rank(), settings["board"]
    dataset = Dataset.open(config.data)
    if dataset.manifest.digest != settings["manifest_digest"]:
        raise DataError(f"{config.data} changed while the run was going on")
    run_id = settings["run_id"] if rank == 0 else None
    uri = config.tracking.uri if run_id else None
    with Tracker(uri, run_id) as tracker:
        worker = Worker(
            rank=rank,
            world=context.get_world_size(),
            device=get_device(),  # type: ignore[arg-type]
            cache=ShardCache(dataset.storage, config.loader.cache, config.loader.cache_bytes),
            report=_report,
            log=tracker.log,
            show=lambda state: board.show.remote(state),
        )
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            train(config, dataset, worker)
        else:
            with checkpoint.as_directory() as folder:
                train(config, dataset, worker, Path(folder))


def _report(metrics: dict[str, float], folder: Path | None) -> None:
    """Hand metrics and a checkpoint to Ray Train, which uploads it while training goes on."""
    checkpoint = None if folder is None else ray.train.Checkpoint.from_directory(folder)
    mode = ray.train.CheckpointUploadMode.ASYNC
    ray.train.report(metrics, checkpoint=checkpoint, checkpoint_upload_mode=mode)


class _PermanentErrors(DefaultFailurePolicy):
    """Retries what a machine may have caused; an error raised on purpose would only recur."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if _on_purpose(training_failed_error):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class _Trainer(TorchTrainer):
    """TorchTrainer that does not retry errors raised on purpose: Ray has no public setting."""

    def _initialize_and_run_controller(self, **arguments):
        policy = _PermanentErrors(self.run_config.failure_config)
        return super()._initialize_and_run_controller(**arguments | {"failure_policy": policy})


def _on_purpose(error: TrainingFailedError) -> ReidError | None:
    """The first worker's `ReidError`, if there is one."""
    if isinstance(error, WorkerGroupError):
        for failure in error.worker_failures.values():
            cause = getattr(failure, "cause", failure)
            if isinstance(cause, ReidError):
                return cause
    return None


def _explained(error: TrainingFailedError, config: TrainConfig) -> ReidError:
    cause = _on_purpose(error)
    if cause is not None:
        return cause
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return ReidError(
        f"training failed more than {config.checkpoint.max_failures} times, last with: {text[-1]}. "
        f"Continue with --resume --name {config.name} --output {config.output}"
    )


def _use_gpu(config: TrainConfig) -> bool:
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if config.device == "cuda" and gpus < config.workers:
        logger.warning(
            "%d GPUs are needed and %d are here: waiting for the cluster", config.workers, gpus
        )
    return config.device == "cuda" or (config.device == "auto" and gpus >= config.workers)


def _absolute(location: str) -> str:
    return location if "://" in location else str(Path(location).expanduser().absolute())
