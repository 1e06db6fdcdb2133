"""A run's folder, `<output>/<name>/`: its `run.json`, and what may change on `--resume`.

The folder also holds the checkpoints (`checkpoint_store.py`), the lock (`run_lock.py`) and the
report. A name is taken once; `--resume` continues the run that has it.
"""

import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Self

from data_shards.dataset import Dataset
from data_shards.errors import ConfigError, DataError, ObjectExists, ObjectMissing
from data_shards.storage import open_storage
from reid_train.config import TrainConfig
from reid_train.registry.load import SUMMARY

REPORT = "report"  # folder of a run or a sweep
PAGE = "report.html"  # only a run's report has a page; a sweep's has pictures and a table
RESUMABLE = {"workers", "min_workers", "device", "loader", "checkpoint", "tracking", "evaluation"}
RESUMABLE |= {"cpus_per_worker", "data", "output"}
"""Sections that may change when a run is resumed: they do not change what is computed."""
EPOCHS = "optimizer.epochs"
EXTENDABLE = {EPOCHS, "optimizer.skip_nonfinite"}
"""Settings that may change too: they decide how long a run is, not what its steps are. The number
of epochs may not change with a cosine schedule, because each learning rate depends on it."""


@dataclass(frozen=True)
class Run:
    """A run as its `run.json` describes it."""

    config: TrainConfig
    manifest_digest: str
    mlflow_run_id: str | None
    versions: Mapping[str, str] = field(default_factory=dict)  # when last started; {} if unknown

    def to_json(self) -> bytes:
        """Return the run as JSON."""
        values = vars(self) | {"config": self.config.model_dump(mode="json")}
        return json.dumps(values, indent=2).encode()

    @staticmethod
    def exists(output: str, name: str) -> bool:
        """Return whether there is `<output>/<name>/run.json`."""
        return open_storage(output).exists(f"{name}/run.json")

    @classmethod
    def read(cls, output: str, name: str) -> Self:
        """Read `<output>/<name>/run.json`."""
        where = f"{output.rstrip('/')}/{name}/run.json"
        try:
            values = json.loads(open_storage(output).read(f"{name}/run.json"))
            # Runs of older versions had one core a worker and did not record it.
            config = {"cpus_per_worker": 1} | values["config"]
            config = TrainConfig.from_json(json.dumps(config), where)
            versions = dict(values.get("versions", {}))
            return cls(config, values["manifest_digest"], values["mlflow_run_id"], versions)
        except ObjectMissing as error:
            raise ConfigError(f"there is no run {name}: {where} is missing") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{where} is damaged: {error}. Restore it, or start a new run under another --name"
            ) from error


@dataclass(frozen=True)
class Summary:
    """The result of a finished run. `metrics`, `before` and `test` are fractions by name.

    `metrics` are the best checkpoint's on the split that chose it, and `before` the untrained
    network's. `test` is what it has on test if validation chose it.
    """

    name: str
    metrics: dict[str, float]
    before: dict[str, float]
    images_per_second: float
    report: str
    checkpoint: str  # name of the best one, a folder in the run's
    model: str | None
    champion: bool
    epochs: int = 0  # of the run; 0 in a summary that did not record it
    selected_on: str = "test"  # or "validation"
    test: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, run: str) -> Self | None:
        """Read the summary of a run; None if it has none."""
        try:
            return cls(**json.loads(open_storage(run).read(SUMMARY)))
        except (ObjectMissing, ValueError, TypeError):
            return None


def fetch_report(run: str, to: Path) -> Path:
    """Copy the report of a run or a sweep to a folder; return its page, or else the folder."""
    storage = open_storage(run)
    names = [PurePosixPath(key).name for key, _ in storage.list(f"{REPORT}/")]
    if not names:
        raise ConfigError(
            f"{run} has no report: only a finished run or sweep has one. Give its --output and "
            "--name with a slash between; one that was interrupted continues by its own command"
        )
    for name in names:
        storage.download(f"{REPORT}/{name}", to / name)
    return to / PAGE if PAGE in names else to


def report_command(run: str) -> str:
    """The command that copies the report of a run or a sweep at a URL to this machine."""
    return f"python -m reid_train report {shlex.quote(run)}"


def prepare(config: TrainConfig) -> TrainConfig:
    """Fill in what the driver decides: the name, and paths that are valid in any folder."""
    for flag in ("data", "output"):
        if not getattr(config, flag):
            raise ConfigError(f"--{flag} is missing: give a folder or an s3://bucket/prefix")
    weights, cache, source = config.model.weights, config.loader.cache, config.init_from
    return config.replace(
        name=config.name or f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}",
        data=open_storage(config.data).url,
        output=open_storage(config.output).url,
        init_from=open_storage(source).url if source and Path(source).exists() else source,
        # A folder named "imagenet" or "none" here is not what is meant.
        model__weights=open_storage(weights).url if Path(weights).is_file() else weights,
        # `~` is the home of each node, not of the driver.
        loader__cache=cache if cache.parts[:1] == ("~",) else cache.absolute(),
    )


def same_training(old: TrainConfig, new: TrainConfig) -> None:
    """Raise a `ConfigError` if a run may not be resumed with the new settings; it names them."""
    before, after = old.flat(), new.flat()
    differ = [name for name in before if before[name] != after[name]]
    free = RESUMABLE | EXTENDABLE
    if changed := [name for name in differ if not {name, name.split(".")[0]} & free]:
        raise ConfigError(
            f"run {old.name} cannot be resumed with other settings of {', '.join(changed)}: "
            "leave them out, or start a new run under another --name"
        )
    if before[EPOCHS] != after[EPOCHS] and new.optimizer.schedule == "cosine":
        raise ConfigError(
            f"run {old.name} cannot be resumed with --{EPOCHS} {after[EPOCHS]} instead of "
            f"{before[EPOCHS]}: its schedule is cosine, whose learning rates depend on the number "
            f"of epochs; resume it with --{EPOCHS} {before[EPOCHS]}, or start a new run under "
            "another --name"
        )


def same_dataset(saved: Run, dataset: Dataset) -> None:
    """Raise a `DataError` if a run was trained on another dataset."""
    if saved.manifest_digest != dataset.manifest.digest:
        raise DataError(
            f"run {saved.config.name} was trained on the dataset with manifest "
            f"{saved.manifest_digest[:12]}, but {dataset.url} has {dataset.manifest.digest[:12]}: "
            "give it that dataset, or start a new run"
        )


def same_split(saved: Run, config: TrainConfig, dataset: Dataset) -> None:
    """Raise a `ConfigError` if a run would choose its best checkpoint on another split."""
    before, now = (dataset.choose_split(c.evaluation.split) for c in (saved.config, config))
    if before != now:
        raise ConfigError(
            f"run {config.name} was measured on {before}, and its evaluations have to compare: "
            f"resume it with --evaluation.split {before}, or start a new run under another --name"
        )


def write(run: Run, *, new: bool = False) -> None:
    """Write `run.json`, which takes the name of a new run if it is free."""
    storage = open_storage(run.config.output)
    try:
        storage.write(f"{run.config.name}/run.json", run.to_json(), create_once=new)
    except ObjectExists as error:
        raise taken(run.config) from error


def taken(config: TrainConfig) -> ConfigError:
    """The error if a new run has the name of one that exists."""
    return ConfigError(
        f"run {config.name} exists in {config.output}: continue it with --resume (and with a "
        "larger --optimizer.epochs, if it has finished), or give another --name"
    )
