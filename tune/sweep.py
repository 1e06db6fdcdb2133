"""A sweep from its settings to the registered model: the whole of `python -m tune`."""

import json
import logging
import math
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from data_shards.dataset import Dataset
from data_shards.errors import DataError, ReidError, StorageError
from data_shards.progress import display, make_console, phase, print_places, say
from data_shards.storage import open_storage
from reid_train.config import TrainConfig
from reid_train.runs import preflight, run_lock
from reid_train.runs.checkpoint_store import delete_checkpoints
from reid_train.runs.console import Board, beside_driver
from reid_train.runs.cores import with_cores
from reid_train.runs.init_from import fetch_initial, keep, read_kept
from reid_train.runs.job import UNITS
from reid_train.runs.process import stop_signals
from reid_train.runs.publish import publish
from reid_train.runs.run_dir import REPORT, prepare, report_command
from reid_train.tracking.provenance import code_commit
from reid_train.tracking.server import run_page
from reid_train.tracking.tracker import Tracker
from reid_train.tracking.uris import training_uri
from reid_train.training.history import tracked
from tune import plots, results, runner
from tune.console import watch
from tune.controller import Controller
from tune.plan import Plan
from tune.schedulers import STOPPING, EarlyStopping
from tune.searchers import Searcher
from tune.store import ENDED, Store, Trial

logger = logging.getLogger(__name__)

_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
AGAIN = "Train the first of the ranking again:"
_NOT_METRICS = ("epoch", "step", "time")


@dataclass(frozen=True)
class Outcome:
    """What a sweep found."""

    name: str
    trials: list[Trial]
    entries: list[results.Entry]
    verdict: list[str]
    command: str  # trains the first of the ranking again; "" if too few were searched
    report: str
    model: str | None
    champion: bool


def sweep(plan: Plan, *, console: Console | None = None) -> Outcome:
    """Search, repeat the survivors, rank, draw, track and register; or continue where it was.

    Raises:
        ReidError: anything that the person can mend; the same call continues afterwards.
    """
    console = console or make_console()
    settings, config = plan.settings, prepare(plan.config)
    folder = f"{config.output}/{config.name}"
    sweep_file = Store(open_storage(folder)).noted("sweep")
    begun, digest = sweep_file.get("config"), sweep_file.get("manifest_digest")
    # A sweep that continues stays on the version of the dataset that it was begun with.
    dataset = Dataset.open(config.data, digest, config.loader.node_cache)
    split = dataset.choose_split(config.evaluation.split)
    if not all(len(index) for index in dataset.evaluated(split)):
        raise DataError(f"{config.data} has no query or gallery: a sweep compares by mAP on them")
    config = config.replace(tracking__uri=training_uri(config.tracking.uri, config.output))
    if begun is not None:  # what it was begun with
        config = config.replace(
            cpus_per_worker=config.cpus_per_worker or begun.get("cpus_per_worker", 1),
            init_digest=config.init_digest or begun.get("init_digest"),
        )
    with display(console) as progress, phase(progress, "checking the settings"):
        kept = begun is not None and begun.get("init_from") and config.init_from
        initial = read_kept(folder, config.init_digest) if kept else fetch_initial(config)
        preflight.check_settings(config, dataset)
        preflight.check_network(config, dataset, initial=initial)
    if initial is not None:
        config = config.replace(init_digest=initial.digest)
    Store.open(settings, config, dataset.manifest.digest, create=False)
    config = runner.connect(config)
    at_a_time = runner.slots(config, settings.concurrent)
    config = with_cores(config, at_a_time)
    if initial is not None and not kept:
        keep(initial, folder)
    store = Store.open(settings, config, dataset.manifest.digest)
    base = config.replace(
        output=f"{config.output.rstrip('/')}/{config.name}", evaluation__initial=False
    )
    labels, searched = [trial.label for trial in plan.first], settings.trials - len(plan.first)
    repeats = f", then up to {plan.repeats} repeats with fresh seeds" if plan.repeats else ""
    enough = len(labels) + results.FEW + 1
    few = f". Too few are searched to name a best one: give --trials {enough} or more"
    say(
        console,
        f"{config.name}: {settings.trials} trials, {at_a_time} at a time: {len(labels)} baselines "
        f"({', '.join(labels)}) and {searched} searched{repeats}"
        f"{few if searched <= results.FEW else ''}",
    )
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
        stages = _Stages(plan, config, base, dataset, store, parent, console, at_a_time)
        trials = store.trials()
        trials = stages.search(trials + plan.first[len(trials) :])
        if settings.seeds > 1:
            chosen = results.survivors(trials, base, settings.survivors)
            again = [Trial(0, t.values, t.label, repeats=t.number) for t in chosen]
            trials = stages.repeat(again, trials, later=settings.seeds)
            trials = stages.repeat(results.held(trials, base), trials)
        outcome = stages.conclude(trials)
    _show(outcome, parent, console)
    return outcome


@dataclass(frozen=True)
class _Stages:
    """The stages of a sweep: the search, the repeats of its survivors, and the report."""

    plan: Plan
    config: TrainConfig
    base: TrainConfig
    dataset: Dataset
    store: Store
    parent: Tracker
    console: Console
    at_a_time: int

    @property
    def split(self) -> str:
        """What trials are measured on: "validation" or "test"."""
        return self.dataset.choose_split(self.base.evaluation.split)

    def search(self, trials: list[Trial]) -> list[Trial]:
        """Run the first points and what is proposed, and what had begun; return all trials."""
        made = sum(trial.repeats is not None for trial in trials)
        total, later = max(self.plan.settings.trials, len(trials) - made), self.plan.repeats
        if len(trials) - made == total:  # a search that is extended may have other repeats
            later = max(later - made, 0)
        return self._run(trials, self.plan.searcher, total + made, later)

    def _run(self, trials: list[Trial], searcher: Searcher, total: int, later: int) -> list[Trial]:
        """Run `total` trials, of which some have ended; up to `later` repeats follow."""
        controller = Controller(self.store, self.base, trials, searcher, self._begin, self._end)
        if not controller.over:
            self._train(controller, total, later)
        # Not earlier: workers may still write, and members start from the checkpoints of others.
        # Trials that ended before are included, because their driver may have been killed.
        for trial in controller.trials:
            if trial.state in ENDED:
                free(trial, self.base.output)
        return controller.trials

    def _train(self, controller: Controller, total: int, later: int) -> None:
        """Run a controller's trials until all have ended."""
        stopping = None
        if self.plan.settings.scheduler in STOPPING:
            originals = [trial for trial in controller.trials if trial.repeats is None]
            stopping = EarlyStopping(self.plan.settings, self.base, originals)
        board = beside_driver(Board).remote()
        try:
            with (
                stop_signals() as stop,
                watch(controller, board, self.console, total, self.at_a_time, stop, later),
            ):
                digest = self.dataset.manifest.digest
                runner.run(controller, board, self.at_a_time, stopping, stop, digest)
        except ReidError:
            # MLflow shows what was cut short as killed; continuing opens the runs again.
            for trial in controller.trials:
                if trial.state == "running":
                    self._reopened(trial).finish("KILLED")
            raise

    def repeat(self, wanted: Sequence[Trial], trials: list[Trial], later: int = 0) -> list[Trial]:
        """Run each of the wanted with every seed that is still missing; return all trials."""
        known = {(t.repeats, t.label, t.seed) for t in trials}
        seeds = range(self.base.seed + 1, self.base.seed + 1 + self.plan.settings.seeds)
        seeded = [replace(trial, seed=seed) for trial in wanted for seed in seeds]
        new = [t for t in seeded if (t.repeats, t.label, t.seed) not in known]
        trials = trials + [replace(t, number=number) for number, t in enumerate(new, len(trials))]
        return self._run(trials, Searcher(), len(trials), later)

    def _begin(self, trial: Trial) -> None:
        """Give a trial its MLflow run, or reopen it; it is trained even if MLflow fails."""
        if self.parent.run_id is None:
            return
        tracking, known = self.base.tracking, trial.mlflow_run_id
        try:
            tracker = Tracker.start(
                tracking.uri, tracking.experiment, run_name=trial.name, run_id=known
            )
        except StorageError as error:
            logger.warning("%s is not tracked: %s", trial.name, error)
            return
        trial.mlflow_run_id = tracker.run_id
        if known is None:
            tracker.log_parameters(trial.config(self.base).flat())
        # A population changes values while it trains; parameters are fixed, so these are metrics.
        numbers = {n: float(v) for n, v in trial.values.items() if isinstance(v, int | float)}
        step = int(trial.evaluations[-1]["step"]) if trial.evaluations else 0
        tracker.log({f"setting/{name}": value for name, value in numbers.items()}, step)
        tags = {"mlflow.parentRunId": self.parent.run_id, "trial": trial.number}
        tracker.set_tags(tags | {"point": trial.label or "search"})
        tracker.close()

    def _end(self, trial: Trial) -> None:
        """Log what a stopped worker may have left unsent, the state and its reason."""
        tracker = self._reopened(trial)
        for evaluation in trial.evaluations:
            metrics = {
                name: value
                for name, value in evaluation.items()
                if name not in _NOT_METRICS and isinstance(value, float) and math.isfinite(value)
            }
            tracker.log(tracked(metrics, self.split), int(evaluation["step"]))
        tracker.set_tags({"state": trial.state, "reason": trial.reason or None})
        tracker.finish(_STATUS[trial.state])
        if trial.state == "finished" and not trial.changes:
            free(trial, self.base.output)
        if trial.evaluations:
            self.parent.log(tracked({"trial/mAP": trial.score}, self.split), trial.number)

    def _reopened(self, trial: Trial) -> Tracker:
        """A trial's MLflow run; what is not tracked gets a tracker that does nothing."""
        uri = self.base.tracking.uri if trial.mlflow_run_id else None
        return Tracker(uri, trial.mlflow_run_id, system_metrics=False)

    def conclude(self, trials: list[Trial]) -> Outcome:
        """Rank, register the best, draw, and store the report."""
        base, storage = self.base, self.store.storage
        entries = results.ranking(trials, base)
        if not entries:
            raise DataError(common_cause(trials))
        best = entries[0].best
        summary = self._publish(best)
        sentences = results.verdict(entries)
        if summary.get("selected_on") == "validation":
            sentences.append("Trials were compared by mAP on the validation split.")
            if summary["test"]:
                mean = summary["test"]["mAP"]
                sentences.append(f"On test, {best.name} was measured once: mAP {100 * mean:.1f}.")
        again = ""
        if not results.too_few(entries):
            again = results.command(best.best_config(base), self.config.output)
        if again and len(best.changes) > 1:
            sentences.append(
                f"{best.name} changed its settings while it trained (see its `changes`); the "
                "command below trains with the last ones from the start."
            )
        with tempfile.TemporaryDirectory(prefix="reid-sweep-") as temporary:
            folder = Path(temporary)
            sentences += plots.draw(folder, trials, entries, base, self.plan.space, storage)
            text = "\n".join(sentences) + f"\n\n{results.markdown(entries, trials)}"
            if again:
                text += f"\n{AGAIN}\n\n    {again}\n"
            (folder / "ranking.md").write_text(text)
            for path in sorted(folder.iterdir()):
                storage.upload(f"{REPORT}/{path.name}", path)
            self.parent.log_artifacts(folder, REPORT)
        name, model, champion = str(self.config.name), summary["model"], summary["champion"]
        scores = {"mAP": entries[0].mean, "best/mAP": best.score}
        scores = tracked(scores, self.split) | summary.get("test", {})
        self.parent.log(scores, len(trials))
        self.parent.set_tags({"best": best.name, "verdict": " ".join(sentences), "model": model})
        report = f"{base.output}/{REPORT}"
        return Outcome(name, trials, entries, sentences, again, report, model, champion)

    def _publish(self, best: Trial) -> dict:
        """The best trial's report and registered model; once, however often a sweep continues.

        A model that was not registered, because MLflow was away, is registered now.
        """
        noted, with_mlflow = self.store.noted("published"), self.parent.run_id is not None
        registers = with_mlflow and self.config.tracking.model_name != "off"
        assert best.best is not None
        if noted.get("run") != best.best["run"] or (registers and noted["model"] is None):
            if with_mlflow and best.mlflow_run_id is None:  # MLflow was away when it began
                self._begin(best)
                self._end(best)
                self.store.save(best)
            with self._reopened(best) as tracker, display(self.console, units=UNITS) as shown:
                summary, _ = publish(best.best_config(self.base), self.dataset, tracker, shown)
            noted = json.loads(json.dumps(vars(summary))) | {"run": best.best["run"]}
            self.store.note("published", noted)
        return noted


def free(trial: Trial, folder: str) -> None:
    """Delete the checkpoints of an ended trial that its sweep in `folder` no longer needs.

    One that finished may still rank first, and its last checkpoint has the history of its λ. One
    that was stopped or failed is neither ranked nor resumed.
    """
    needed = [trial.best, trial.evaluations[-1]] if trial.state == "finished" else []
    for run in trial.runs:
        names = {e["checkpoint"] for e in needed if e and e["run"] == run}
        delete_checkpoints(f"{folder}/{run}", names)


def common_cause(trials: Sequence[Trial]) -> str:
    """One line on trials of which none was trained to its end."""
    failed = [trial for trial in trials if trial.state == "failed"]
    # The same cause has other numbers in each trial: steps, values, bytes.
    kinds = [re.sub(r"\d[\d.,e+-]*", "0", trial.reason) for trial in failed]
    ((kind, count),) = Counter(kinds).most_common(1)
    example = failed[kinds.index(kind)]
    share = "all" if count == len(failed) else f"{count} of them"
    return (
        f"none of {len(trials)} trials was trained to its end; {len(failed)} failed, {share} as "
        f"{example.name}: {example.reason}"
    )


def _show(outcome: Outcome, parent: Tracker, console: Console) -> None:
    """Print the ranking, the verdict, and where to look."""
    table = Table(title=f"{outcome.name}: ranking", title_justify="left", box=box.SIMPLE_HEAD)
    for name in results.HEADER[:-1]:
        table.add_column(name, justify="left" if name == "trial" else "right", no_wrap=True)
    table.add_column(results.HEADER[-1], overflow="fold")
    repeated = sum(bool(entry.repeats) for entry in outcome.entries)
    for number, row in enumerate(results.rows(outcome.entries), 1):
        table.add_row(*row, end_section=number == repeated)
    console.print(table)
    say(console, "\n".join(outcome.verdict))
    lines = [""]
    if outcome.command:
        lines += [AGAIN, f"  {outcome.command}", ""]
    lines.append(f"pictures   {outcome.report}")
    if "://" in outcome.report:
        lines.append(f"           {report_command(outcome.report.removesuffix(f'/{REPORT}'))}")
    if outcome.model:
        note = "now the champion" if outcome.champion else "the champion stays"
        lines.append(f"model      {outcome.model} ({note})")
    if parent.uri and parent.run_id:
        lines.append(f"MLflow     {run_page(parent.uri, parent.run_id)}")
    print_places(console, lines)
