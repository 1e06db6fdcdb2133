"""Run a controller's trials with Ray Tune, each in a process of its own on the cluster."""

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.train import TrainingFailedError
from ray.tune.integration.ray_train import CHECKPOINT_PATH_KEY, TuneReportCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from data_shards.dataset import Dataset
from data_shards.errors import ConfigError, Interrupted, StorageError
from data_shards.progress import silent
from data_shards.ray_utils import start_ray
from reid_train.config import TrainConfig
from reid_train.out_of_memory import out_of_memory
from reid_train.runs.checkpoint_store import stored_evaluations
from reid_train.runs.process import Stop
from reid_train.runs.ray_internals import release
from reid_train.runs.ray_trainer import explained, run_workers, use_gpu
from reid_train.training.checkpoint import UNMEASURED
from tune.controller import Controller
from tune.schedulers import EarlyStopping

_METRICS = {"epoch", "step", "checkpoint", "mAP", "mINP"}


def connect(config: TrainConfig) -> TrainConfig:
    """Connect to the Ray cluster at hand, or start one here; settle `auto` for all trials."""
    # Each trial has processes without a CPU of their own; a small machine would warn of them.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
    start_ray(1, logs=False)
    if config.device != "auto":
        return config
    return config.replace(device="cuda" if use_gpu("auto", config.workers) else "cpu")


def slots(config: TrainConfig, concurrent: int | None) -> int:
    """How many trials run at a time, so that the workers of all of them fit the cluster.

    A trial's own process takes no CPU, and its workers are placed all or none.
    """
    kind, each = ("GPU", 1) if config.device == "cuda" else ("CPU", config.cpus_per_worker or 1)
    nodes = [int(node["Resources"].get(kind, 0)) for node in ray.nodes() if node["Alive"]]
    room = sum(count // each for count in nodes)
    if config.workers > room:
        advice = "lower --workers-per-trial" + (" or --cpus-per-worker" if each > 1 else "")
        raise ConfigError(
            f"a trial of {config.workers} workers needs {config.workers * each} {kind}s and the "
            f"cluster has {sum(nodes)}: {advice}, or add nodes"
        )
    return min(room // config.workers, concurrent or room)


def run(
    controller: Controller,
    board: Any,
    at_a_time: int,
    stopping: EarlyStopping | None = None,
    stop: Stop | None = None,
    manifest_digest: str | None = None,
) -> None:
    """Run trials, `at_a_time` of them together, until nothing is left to try.

    `board` is the sweep's `Board` actor, on which trials show their progress. `stop` asks to end.
    All trials train on the version of the dataset with this digest, by default on the newest.

    Raises:
        Interrupted: SIGTERM or SIGINT ended it; the sweep can be continued from its store.
        StorageError: the store, or the storage of a trial, fails; it can be continued, too.
        ReidError: another error that a person can mend.
    """
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    # The newer output prints a table at each result, whatever its verbosity.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # The first warns that the files which the first variable turns off are missing, the second
    # each time that MLflow takes half a second.
    for noisy in ("ray.tune.analysis.experiment_analysis", "ray.tune.utils.util"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # A request must name something; the process itself needs no CPU of its own.
    task = tune.with_resources(tune.with_parameters(run_trial, board=board), {"memory": 1 << 20})
    ending = _Ending(stop := stop or Stop())
    with tempfile.TemporaryDirectory(prefix="reid-tune-") as folder:
        # Ray Tune's own pickled state is never read again: a sweep continues from its store.
        tuner = tune.Tuner(
            task,
            tune_config=tune.TuneConfig(
                search_alg=_NextTrial(controller, ending, manifest_digest),
                scheduler=_Results(controller, stopping, ending),
                num_samples=-1,
                max_concurrent_trials=at_a_time,
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=folder,
                verbose=0,
                stop=ending,
                # The controller runs lost trials again, also those lost as they start.
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )
        tuner.fit()
    if ending.error is not None:
        raise ending.error
    if stop.signal is not None and not controller.over:
        raise Interrupted(
            f"stopped by {stop.signal.name}; the same command continues the sweep", stop.signal
        )


def run_trial(task: dict[str, Any], board: Any) -> None:
    """Train, and report each evaluation to Ray Tune.

    The `task` is what `_NextTrial.suggest` returns. A failure that the configuration causes is
    reported as a result named `failure`, one of storage or of a node's disk as `storage`. A lost
    machine raises, and the trial is run again: it resumes from the last checkpoint of its run.
    """
    config = TrainConfig.from_json(task["config"])
    # The sweep's board as a run uses its own: states are shown under the trial's name.
    show = SimpleNamespace(remote=partial(board.show.remote, trial=config.name or ""))
    try:
        digest = task["manifest_digest"]
        dataset = Dataset.open(config.data, digest, config.loader.node_cache)
        if digest not in (None, dataset.digest):
            raise StorageError(f"{config.data} no longer has the version that the sweep trains on")
        run_workers(
            config,
            dataset,
            task["run_id"],
            board=SimpleNamespace(show=show, progress=SimpleNamespace(remote=silent)),
            callbacks=[_EvaluationReport()],
            start=task["start"],
            initial=config.output,
            until=task["until"],
        )
        # A driver that was killed may have missed a report: the checkpoints that are kept have it.
        result: dict[str, Any] = {"kept": stored_evaluations(f"{config.output}/{config.name}")}
    except StorageError as error:
        result = {"storage": str(error)}
    except TrainingFailedError as error:
        # Only its sweep continues a trial, so no advice on how to do it.
        cause = explained(error, config, advise=False)
        result = {"storage" if isinstance(cause, StorageError) else "failure": str(cause)}
    tune.report(result)


class _EvaluationReport(TuneReportCallback):
    """Reports evaluations to Ray Tune, not the checkpoints between them."""

    def after_report(self, run_context, metrics, checkpoint) -> None:
        if checkpoint is not None and metrics[0]["mAP"] > UNMEASURED:
            found = {k: v for k, v in metrics[0].items() if k != CHECKPOINT_PATH_KEY}
            found["checkpoint"] = PurePosixPath(checkpoint.path).name
            super().after_report(run_context, [found], None)


class _Unsaved:
    """Leaves the controller out of the state that Ray Tune pickles."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Ending(_Unsaved, tune.Stopper):
    """Ends the run after a signal, or an error in the controller, such as a full disk.

    Ray Tune would take such an error for the trial's, or print it in a traceback of its own.
    """

    def __init__(self, stop: Stop):
        self._stop = stop
        self.error: Exception | None = None

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Keep an error of the block until Ray Tune has ended."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.error is not None or self._stop.signal is not None


class _NextTrial(_Unsaved, Searcher):
    """Hands the controller's next trial to Ray Tune."""

    def __init__(self, controller: Controller, ending: _Ending, manifest_digest: str | None = None):
        super().__init__()
        self._controller, self._ending = controller, ending
        self._manifest_digest = manifest_digest

    def suggest(self, trial_id: str) -> Any:
        controller, trial = self._controller, None
        if not self._ending.stop_all():
            with self._ending.guard():
                trial = controller.next()
        if trial is None:
            # None: another may come, for example a lost one that has to run again.
            return Searcher.FINISHED if controller.over else None
        base, start = controller.base, trial.start
        return {
            "number": trial.number,
            "part": trial.part,
            "config": trial.config(base).to_json(),
            "manifest_digest": self._manifest_digest,
            "run_id": trial.mlflow_run_id,
            "start": start and f"{base.output}/{start}",
            "until": trial.until,
        }

    def on_trial_complete(self, trial_id: str, result=None, error=False) -> None:
        """The scheduler's events carry the trial; this one does not."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing is saved here, or restored."""

    restore = save


class _Results(_Unsaved, FIFOScheduler):
    """Hands what Ray Tune reports of trials to the controller, and its decision back."""

    def __init__(self, controller: Controller, stopping: EarlyStopping | None, ending: _Ending):
        super().__init__()
        self._controller, self._stopping, self._ending = controller, stopping, ending

    def on_trial_add(self, tune_controller, trial) -> None:
        if self._stopping is not None:
            with self._ending.guard():
                self._stopping.add(tune_controller, trial.config["number"], trial)

    def on_trial_result(self, tune_controller, trial, result: dict[str, Any]) -> str:
        number, stopping, stops = trial.config["number"], self._stopping, False
        lags = partial(stopping.lags, tune_controller, number) if stopping else lambda _: False
        with self._ending.guard():
            if "storage" in result:  # other trials would fail for the same reason
                raise StorageError(
                    f"{self._controller.trials[number].name}: {result['storage']}. The same "
                    "command continues the sweep"
                )
            if "failure" in result:
                self._controller.fail(number, result["failure"])
            else:
                one = {k: v for k, v in result.items() if k in _METRICS or k.startswith("rank-")}
                stops = self._controller.result(number, result.get("kept", [one]), lags)
        return TrialScheduler.STOP if stops else TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller, trial, result: dict[str, Any]) -> None:
        # Trials also complete when the run ends early: theirs is not the end of a training.
        if not self._ending.stop_all():
            with self._ending.guard():
                self._controller.finish(trial.config["number"])

    def on_trial_error(self, tune_controller, trial) -> None:
        number, controller = trial.config["number"], self._controller
        file = Path(trial.error_file or os.devnull)
        text = re.sub(r"\x1b\[[0-9;]*m", "", file.read_text()) if file.exists() else ""
        last = text.strip().rpartition("\n")[2].strip()
        with self._ending.guard():
            controller.lost(number, out_of_memory(text) or last or "its process was lost")
            release(f"{controller.base.output}/{controller.trials[number].run_name}")


def _name(trial) -> str:
    return f"{trial.config['number']:03d}-{trial.config['part']}-{trial.trial_id}"
