"""A sweep from its settings to the registered model: the whole of `python -m tune`."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Console

from data_shards.dataset import Dataset
from data_shards.errors import DataError, ReidError, StorageError
from data_shards.progress import make_console
from reid_train.config import TrainConfig
from reid_train.runs import preflight, run_lock
from reid_train.runs.console import Board, beside_driver
from reid_train.runs.run_dir import prepare
from reid_train.tracking.provenance import code_commit
from reid_train.tracking.tracker import Tracker
from reid_train.tracking.uris import training_uri
from tune import runner
from tune.conclude import Outcome, conclude, show
from tune.config import Sweep
from tune.console import watch
from tune.controller import Controller
from tune.plan import Plan
from tune.results import FEW, held, survivors
from tune.schedulers import STOPPING, EarlyStopping
from tune.searchers import Searcher
from tune.store import Store, Trial

logger = logging.getLogger(__name__)

_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_NOT_METRICS = ("epoch", "step", "time")


def sweep(plan: Plan, *, console: Console | None = None) -> Outcome:
    """Search, repeat the survivors, rank, draw, track and register; or continue where it was.

    Args:
        plan: what to do, from `make_plan`.
        console: where progress and the table are shown.

    Raises:
        ReidError: anything that the person can mend; the same call continues afterwards.
    """
    console = console or make_console()
    settings, config = plan.settings, prepare(plan.config)
    dataset = Dataset.open(config.data)
    if not len(dataset.index("query")) or not len(dataset.index("gallery")):
        raise DataError(f"{config.data} has no query or gallery: a sweep compares by mAP on them")
    config = config.replace(tracking__uri=training_uri(config.tracking.uri, config.output))
    preflight.check(config, dataset)
    Store.open(settings, config, dataset.manifest.digest, create=False)
    runner.connect()
    config = runner.resolve_device(config)
    at_a_time = runner.slots(config, settings.concurrent)
    store = Store.open(settings, config, dataset.manifest.digest)
    base = config.replace(
        output=f"{config.output.rstrip('/')}/{config.name}", evaluation__initial=False
    )
    console.print(_announcement(plan, at_a_time), soft_wrap=True, markup=False, highlight=False)
    with (
        run_lock.held(store.storage, str(config.name)),
        Tracker.start(
            None if config.tracking.uri == "off" else config.tracking.uri,
            config.tracking.experiment,
            run_name=config.name,
            run_id=store.noted("mlflow").get("run_id"),
        ) as parent,
    ):
        if not store.noted("mlflow"):
            store.note("mlflow", {"run_id": parent.run_id})
            parent.log_parameters(config.flat() | settings.model_dump(mode="json"))
        parent.set_tags({"kind": "sweep", "dataset": dataset.url, "commit": code_commit()})
        search = _Search(settings, base, store, parent, console, at_a_time)
        trials = store.trials()
        trials += plan.first[len(trials) :]
        trials = search.run(trials, plan.searcher, settings.trials)
        if settings.seeds > 1:
            for wanted in (_repeats, _held):
                extra = wanted(trials, base, settings)
                trials = search.run([*trials, *extra], Searcher(), len(trials) + len(extra))
        outcome = conclude(config, base, plan.space, trials, dataset, store, parent)
    show(outcome, parent, console)
    return outcome


def _announcement(plan: Plan, at_a_time: int) -> str:
    """What will be trained, and a hint if hardly anything is searched."""
    text = (
        f"{plan.config.name}: {plan.settings.trials} trials, {at_a_time} at a time: "
        f"{len(plan.first)} baselines ({', '.join(trial.label for trial in plan.first)}) and "
        f"{plan.searched} searched"
    )
    hint = f". Few are searched: give more --trials than {plan.settings.trials} for a best one"
    return text + (hint if plan.searched <= FEW else "")


@dataclass(frozen=True)
class _Search:
    """What the stages of a sweep share: the search, and the repeats of its survivors."""

    settings: Sweep
    base: TrainConfig
    store: Store
    parent: Tracker
    console: Console
    at_a_time: int

    def run(self, trials: list[Trial], searcher: Searcher, total: int) -> list[Trial]:
        """Run what is queued, what had begun, and what is proposed; return all trials."""
        controller = Controller(
            self.store,
            self.base,
            trials,
            searcher,
            on_begin=lambda trial: _begin_child(trial, self.base, self.parent.run_id),
            on_end=self._ended,
        )
        if controller.over:
            return controller.trials
        stopping = None
        if self.settings.scheduler in STOPPING:
            originals = [trial for trial in trials if trial.repeats is None]
            stopping = EarlyStopping(self.settings, self.base, originals)
        board = beside_driver(Board).remote()
        try:
            with watch(controller, board, self.console, total, self.at_a_time):
                runner.run(controller, board, self.at_a_time, stopping)
        except ReidError:
            self._release(controller.trials)
            raise
        return controller.trials

    def _release(self, trials: Sequence[Trial]) -> None:
        """Let MLflow show what was cut short as killed; continuing opens the runs again."""
        for trial in trials:
            if trial.state == "running" and trial.mlflow_run_id is not None:
                uri = self.base.tracking.uri
                Tracker(uri, trial.mlflow_run_id, system_metrics=False).finish("KILLED")

    def _ended(self, trial: Trial) -> None:
        _end_child(trial, self.base)
        if trial.evaluations:
            self.parent.log({"trial/mAP": trial.score}, trial.number)


def _repeats(trials: Sequence[Trial], base: TrainConfig, settings: Sweep) -> list[Trial]:
    """Trainings with fresh seeds that are still missing."""
    chosen = survivors(trials, base, settings.survivors)
    wanted = [Trial(0, t.values, t.label, repeats=t.number) for t in chosen]
    return _missing(wanted, trials, base.seed, settings.seeds)


def _held(trials: Sequence[Trial], base: TrainConfig, settings: Sweep) -> list[Trial]:
    """Trainings of the best adaptive configuration with λ held that are still missing."""
    wanted = held(trials, base)
    return _missing([wanted] if wanted else [], trials, base.seed, settings.seeds)


def _missing(wanted: list[Trial], trials: Sequence[Trial], seed: int, seeds: int) -> list[Trial]:
    """Each of the wanted with every seed that it was not trained with, numbered."""
    known = {(t.repeats, t.label, t.seed) for t in trials}
    seeded = [replace(t, seed=seed + i) for t in wanted for i in range(1, seeds + 1)]
    new = [t for t in seeded if (t.repeats, t.label, t.seed) not in known]
    return [replace(t, number=len(trials) + i) for i, t in enumerate(new)]


def _begin_child(trial: Trial, base: TrainConfig, parent: str | None) -> None:
    """Give a trial its MLflow run, or reopen it; it is trained even if MLflow does not answer.

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
    # A population changes values while it trains; parameters are fixed, so these are metrics.
    numbers = {n: v for n, v in trial.values.items() if isinstance(v, (int, float))}
    step = int(trial.evaluations[-1]["step"]) if trial.evaluations else 0
    tracker.log({f"setting/{name}": float(value) for name, value in numbers.items()}, step)
    tracker.set_tags(
        {"mlflow.parentRunId": parent, "trial": trial.number, "point": trial.label or "search"}
    )
    tracker.close()


def _end_child(trial: Trial, base: TrainConfig) -> None:
    """Log what a stopped worker may have left unsent, the state and its reason; end the run."""
    if trial.mlflow_run_id is None:
        return
    tracker = Tracker(base.tracking.uri, trial.mlflow_run_id, system_metrics=False)
    for evaluation in trial.evaluations:
        metrics = {
            name: value
            for name, value in evaluation.items()
            if name not in _NOT_METRICS and isinstance(value, float) and math.isfinite(value)
        }
        tracker.log(metrics, int(evaluation["step"]))
    tracker.set_tags({"state": trial.state, "reason": trial.reason or None})
    tracker.finish(_STATUS[trial.state])  # type: ignore[arg-type]
