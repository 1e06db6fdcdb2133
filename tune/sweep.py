"""A sweep from its settings to the registered model: the whole of `python -m tune`."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ray.train
from rich import box
from rich.console import Console
from rich.table import Table

from data_shards.dataset import Dataset
from data_shards.errors import ConfigError, DataError
from reid_train.config import TrainConfig
from reid_train.runs import preflight
from reid_train.runs.console import beside_driver
from reid_train.runs.publish import publish
from reid_train.runs.ray_checkpoints import forget_missing, ray_storage
from reid_train.runs.run_dir import REPORT, prepare
from reid_train.tracking.provenance import code_commit
from reid_train.tracking.tracker import Tracker
from reid_train.tracking.uris import training_uri
from tune import plots as pictures
from tune import runner
from tune.asha import Halving
from tune.children import begin_child, end_child
from tune.config import Sweep, default_name
from tune.console import TrialBoard, watch
from tune.controller import Study
from tune.patience import decides_while_frozen
from tune.population import Population
from tune.results import Entry, command, held, markdown, ranking, survivors, verdict
from tune.searchers import Chance, Grid, Listed, Proposer, Tpe
from tune.space import Space, build, default, first_points
from tune.store import Book, Trial

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a sweep came to."""

    name: str
    trials: list[Trial]
    entries: list[Entry]
    verdict: list[str]
    command: str
    report: str
    model: str | None
    champion: bool


def sweep(settings: Sweep, config: TrainConfig, *, console: Console | None = None) -> Outcome:
    """Search, repeat the survivors, rank, draw, track and register; or continue where it was.

    Args:
        settings: how to search.
        config: what every trial starts from; `name` is the sweep's.
        console: where progress and the table are shown.

    Raises:
        ReidError: anything that the person can mend; the same call continues afterwards.
    """
    console = console or Console()
    ranges = settings.ranges or default(config)
    settings = Sweep.model_validate(settings.model_dump() | {"ranges": ranges})
    config = prepare(config.replace(name=config.name or default_name(settings, config)))
    space = build(ranges, config)
    first = [
        Trial(i, p.values, p.label, config.seed) for i, p in enumerate(_first(settings, config))
    ]
    proposer = _proposer(settings, space, config, len(first))
    dataset = Dataset.open(config.data)
    if not len(dataset.index("query")) or not len(dataset.index("gallery")):
        raise DataError(f"{config.data} has no query or gallery: a sweep compares by mAP on them")
    preflight.check(config, dataset)
    runner.connect()
    config = runner.resolve_device(
        config.replace(tracking__uri=training_uri(config.tracking.uri, config.output))
    )
    at_a_time = runner.slots(config, settings.concurrent)
    book = Book.open(settings, config, dataset.manifest.digest)
    base = config.replace(
        output=f"{config.output.rstrip('/')}/{config.name}", evaluation__initial=False
    )
    with Tracker.start(
        None if config.tracking.uri == "off" else config.tracking.uri,
        config.tracking.experiment,
        run_name=config.name,
        run_id=book.noted("mlflow").get("run_id"),
    ) as parent:
        if not book.noted("mlflow"):
            book.note("mlflow", {"run_id": parent.run_id})
            parent.log_parameters(config.flat() | settings.model_dump(mode="json"))
        parent.set_tags({"kind": "sweep", "dataset": dataset.url, "commit": code_commit()})
        search = _Search(settings, base, book, parent, console, at_a_time)
        trials = search.run(_with_first(book.trials(), first), proposer, settings.trials)
        if settings.seeds > 1:
            for wanted in (_repeats, _held):
                extra = wanted(trials, base, settings)
                trials = search.run([*trials, *extra], Listed(), len(trials) + len(extra))
        outcome = _conclude(settings, config, base, space, trials, dataset, book, parent)
    _show(outcome, config, console)
    return outcome


@dataclass(frozen=True)
class _Search:
    """What the stages of a sweep share: the search, and the repeats of what survived it."""

    settings: Sweep
    base: TrainConfig
    book: Book
    parent: Tracker
    console: Console
    at_a_time: int

    def run(self, trials: list[Trial], proposer: Proposer, total: int) -> list[Trial]:
        """Run what is queued, what had begun, and what is proposed; all trials are returned."""
        halving = None
        if self.settings.scheduler == "asha":
            halving = Halving(self.settings, self.base, [t for t in trials if t.repeats is None])
        study = Study(
            self.book,
            self.base,
            trials,
            proposer,
            halving,
            on_begin=lambda trial: begin_child(trial, self.base, self.parent.run_id),
            on_end=self._ended,
        )
        if study.over:
            return study.trials
        board = beside_driver(TrialBoard).remote()
        with watch(study, board, self.console, total, self.at_a_time):
            runner.run(study, board, self.at_a_time)
        if not study.over:
            raise KeyboardInterrupt
        return study.trials

    def _ended(self, trial: Trial) -> None:
        end_child(trial, self.base)
        if trial.evaluations:
            self.parent.log({"trial/mAP": trial.score}, trial.number)


def _first(settings: Sweep, config: TrainConfig):
    """The first points, after checks of the settings against each other.

    Raises:
        ConfigError: they do not fit.
    """
    points = first_points(config, settings.constant_factors)
    if settings.trials <= len(points):
        raise ConfigError(
            f"--trials {settings.trials} leaves nothing to search: the first {len(points)} are "
            "the paper's configuration and the baselines (fewer with --constant-factors)"
        )
    every = config.evaluation.every
    if settings.interval is not None and settings.interval % every:
        raise ConfigError(f"--interval must be a multiple of --evaluation.every, {every}")
    if settings.scheduler == "population" and settings.seeds > 1:
        raise ConfigError(
            "--seeds repeats fixed configurations, and a population changes them under way"
        )
    grace = settings.grace if settings.scheduler == "asha" else None
    if grace is not None and decides_while_frozen(grace, config):
        logger.warning(
            "--grace %d stops trials while the backbone is frozen (%d epochs), by an mAP that "
            "hardly depends on what is searched: leave it out, or give a larger one",
            grace,
            config.optimizer.frozen_epochs,
        )
    return points


def _proposer(settings: Sweep, space: Space, config: TrainConfig, first: int) -> Proposer:
    if settings.scheduler == "population":
        interval = settings.interval or config.evaluation.every
        return Population(settings.trials - first, interval, space, config, first)
    if settings.searcher == "grid":
        return Grid(settings, space, config, first)
    return (Chance if settings.searcher == "random" else Tpe)(settings, space, config)


def _with_first(trials: list[Trial], first: Sequence[Trial]) -> list[Trial]:
    """The book's trials and the first points that were not begun."""
    return [*trials, *first[len(trials) :]]


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


def _conclude(
    settings: Sweep,
    config: TrainConfig,
    base: TrainConfig,
    space: Space,
    trials: list[Trial],
    dataset: Dataset,
    book: Book,
    parent: Tracker,
) -> Outcome:
    """Rank, register the best, draw, and store the report."""
    entries = ranking(trials, base)
    if not entries:
        reasons = {trial.reason for trial in trials if trial.reason}
        raise DataError(f"no trial came to its end: {'; '.join(sorted(reasons))}")
    best = entries[0].best
    summary = _publish(best, base, dataset, book)
    said = verdict(entries)
    if len(best.changes) > 1:
        said.append(
            f"{best.name} changed its settings under way (see its `changes`); the command below "
            "trains with the last ones from the start."
        )
    again = command(best.best_config(base), config.output)
    with tempfile.TemporaryDirectory(prefix="reid-sweep-") as temporary:
        folder = Path(temporary)
        pictures.draw(folder, trials, entries, base, space, book.storage)
        text = (
            "\n".join(said)
            + f"\n\n{markdown(entries, trials)}\nTrain the best again:\n\n    {again}\n"
        )
        (folder / "ranking.md").write_text(text)
        for path in sorted(folder.iterdir()):
            book.storage.upload(f"{REPORT}/{path.name}", path)
        parent.log_artifacts(folder, REPORT)
    parent.log({"mAP": entries[0].mean, "best/mAP": best.score}, len(trials))
    parent.set_tags({"best": best.name, "verdict": " ".join(said), "model": summary["model"]})
    return Outcome(
        name=config.name or "",
        trials=trials,
        entries=entries,
        verdict=said,
        command=again,
        report=f"{base.output}/{REPORT}",
        model=summary["model"],
        champion=summary["champion"],
    )


def _publish(best: Trial, base: TrainConfig, dataset: Dataset, book: Book) -> dict:
    """The best trial's report and place in the registry; once, however often a sweep continues."""
    noted = book.noted("published")
    assert best.best is not None
    if noted.get("run") != best.best["run"]:
        config = best.best_config(base)
        run = f"{base.output}/{config.name}"
        forget_missing(run)
        place = ray_storage(run)
        result = ray.train.Result.from_path(place["storage_path"], place["storage_filesystem"])
        uri = base.tracking.uri if best.mlflow_run_id else None
        with Tracker(uri, best.mlflow_run_id, system_metrics=False) as tracker:
            summary, _ = publish(config, result, dataset, tracker)
        noted = json.loads(json.dumps(vars(summary))) | {"run": best.best["run"]}
        book.note("published", noted)
    return noted


def _show(outcome: Outcome, config: TrainConfig, console: Console) -> None:
    """Print the ranking, what it says, and where to look."""
    table = Table(title=f"{outcome.name}: ranking", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("", justify="right")
    table.add_column("trial")
    table.add_column("mAP (%)", justify="right", no_wrap=True)
    table.add_column("trainings", justify="right")
    table.add_column("settings", overflow="fold")
    for place, entry in enumerate(outcome.entries, 1):
        trainings = str(len(entry.scores))
        table.add_row(str(place), entry.trial.name, entry.measured(), trainings, entry.title)
    console.print(table)
    lines = [*outcome.verdict, "", "Train the best again:", f"  {outcome.command}", ""]
    lines.append(f"pictures   {outcome.report}")
    if outcome.model:
        note = "now the champion" if outcome.champion else "the champion stays"
        lines.append(f"model      {outcome.model} ({note})")
    uri = config.tracking.uri
    if uri and uri.startswith("sqlite:"):
        lines.append(f"MLflow     mlflow ui --backend-store-uri {uri}")
    elif uri not in (None, "off"):
        lines.append(f"MLflow     {uri}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
