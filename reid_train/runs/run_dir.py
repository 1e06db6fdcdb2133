"""A run's folder, `<output>/<name>/`, and what its `run.json` says of it.

Beside `run.json` lie the checkpoints that Ray Train keeps (the two best by mAP and the last), Ray's
own snapshot of them, and the report. A name is taken once; `--resume` continues the run that has
it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from data_shards.dataset import Dataset
from data_shards.errors import ConfigError, DataError, ObjectExists, ObjectMissing
from data_shards.storage import LocalStorage, open_storage
from reid_train.config import TrainConfig

REPORT = "report"
"""Folder of a run that holds its report."""
RESUMABLE = {
    "workers",
    "min_workers",
    "device",
    "loader",
    "checkpoint",
    "tracking",
    "evaluation",
    "output",
    "data",
}
"""Sections that may differ when a run is resumed: they do not change what is computed."""
EPOCHS = "optimizer.epochs"
EXTENDABLE = {EPOCHS, "optimizer.skip_nonfinite"}
"""Settings that may differ too: they say how far a run goes, not what its steps are. With a cosine
schedule the number of epochs does not: each epoch's learning rate depends on it."""


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

    @staticmethod
    def exists(output: str, name: str) -> bool:
        """Whether there is `<output>/<name>/run.json`."""
        return open_storage(output).exists(f"{name}/run.json")

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
    weights, cache = config.model.weights, config.loader.cache
    return config.replace(
        name=config.name or f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}",
        data=_absolute(config.data),
        output=_absolute(config.output),
        model__weights=_absolute(weights) if Path(weights).exists() else weights,
        # A node's own home, not the driver's, is meant by `~`.
        loader__cache=cache if cache.parts[:1] == ("~",) else cache.absolute(),
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
        and name not in EXTENDABLE
    ]
    if changed:
        raise ConfigError(
            f"run {old.name} cannot be resumed with other settings of {', '.join(changed)}: "
            "leave them as they were, or start a new run under another --name"
        )
    if before[EPOCHS] != after[EPOCHS] and new.optimizer.schedule == "cosine":
        raise ConfigError(
            f"run {old.name} cannot be resumed with --{EPOCHS} {after[EPOCHS]} instead of "
            f"{before[EPOCHS]}: its schedule is cosine, whose learning rates depend on the number "
            f"of epochs; resume it with --{EPOCHS} {before[EPOCHS]}, or start a new run under "
            "another --name"
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


def tidy(config: TrainConfig, kept: Collection[str]) -> None:
    """Remove the checkpoints that workers which died left behind, often half uploaded.

    Args:
        config: of a run that has ended.
        kept: names of the folders to keep.
    """
    folder = open_storage(config.output).child(str(config.name))
    for key, _ in list(folder.list("checkpoint_")):
        name, inside, _ = key.partition("/")
        if inside and name not in kept:
            folder.delete(key)
    if isinstance(folder, LocalStorage):  # a copy that was killed left what it does not list
        for path in folder.root.glob("checkpoint_*"):
            if path.is_dir() and path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)


def _write(run: Run, *, create_once: bool = False) -> None:
    storage = open_storage(run.config.output)
    storage.write(f"{run.config.name}/run.json", run.to_json(), create_once=create_once)


def _absolute(location: str) -> str:
    """The one name of a place: without a slash at its end, to which a run's name is added."""
    return open_storage(location).url
