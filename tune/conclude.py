"""The end of a sweep: rank, register the best, draw, store the report, and show it."""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_shards.dataset import Dataset
from data_shards.errors import DataError
from reid_train.config import TrainConfig
from reid_train.runs.publish import publish
from reid_train.runs.run_dir import REPORT
from reid_train.tracking.server import run_page
from reid_train.tracking.tracker import Tracker
from tune import plots
from tune.results import Entry, command, markdown, ranking, verdict
from tune.space import Space
from tune.store import Store, Trial


@dataclass(frozen=True)
class Outcome:
    """What a sweep found."""

    name: str
    trials: list[Trial]
    entries: list[Entry]
    verdict: list[str]
    command: str
    report: str
    model: str | None
    champion: bool


def conclude(
    config: TrainConfig,
    base: TrainConfig,
    space: Space,
    trials: list[Trial],
    dataset: Dataset,
    store: Store,
    parent: Tracker,
) -> Outcome:
    """Rank, register the best, draw, and store the report.

    Raises:
        DataError: no trial was trained to its end.
    """
    entries = ranking(trials, base)
    if not entries:
        raise DataError(common_cause(trials))
    best = entries[0].best
    summary = _publish(best, base, dataset, store)
    sentences = verdict(entries)
    if len(best.changes) > 1:
        sentences.append(
            f"{best.name} changed its settings while it trained (see its `changes`); the command "
            "below trains with the last ones from the start."
        )
    again = command(best.best_config(base), config.output)
    with tempfile.TemporaryDirectory(prefix="reid-sweep-") as temporary:
        folder = Path(temporary)
        sentences += plots.draw(folder, trials, entries, base, space, store.storage)
        text = "\n".join(sentences) + f"\n\n{markdown(entries, trials)}\n"
        (folder / "ranking.md").write_text(f"{text}Train the best again:\n\n    {again}\n")
        for path in sorted(folder.iterdir()):
            store.storage.upload(f"{REPORT}/{path.name}", path)
        parent.log_artifacts(folder, REPORT)
    parent.log({"mAP": entries[0].mean, "best/mAP": best.score}, len(trials))
    parent.set_tags({"best": best.name, "verdict": " ".join(sentences), "model": summary["model"]})
    return Outcome(
        name=config.name or "",
        trials=trials,
        entries=entries,
        verdict=sentences,
        command=again,
        report=f"{base.output}/{REPORT}",
        model=summary["model"],
        champion=summary["champion"],
    )


def common_cause(trials: Sequence[Trial]) -> str:
    """One line on trials of which none was trained to its end."""
    failed = [trial for trial in trials if trial.state == "failed"]
    # The same cause has other numbers in each trial: steps, values, bytes.
    kinds = Counter(re.sub(r"\d[\d.,e+-]*", "0", trial.reason) for trial in failed)
    (kind, count), *others = kinds.most_common()
    example = next(t for t in failed if re.sub(r"\d[\d.,e+-]*", "0", t.reason) == kind)
    share = "all" if not others else f"{count} of them"
    return (
        f"none of {len(trials)} trials was trained to its end; {len(failed)} failed, {share} as "
        f"{example.name}: {example.reason}"
    )


def _publish(best: Trial, base: TrainConfig, dataset: Dataset, store: Store) -> dict:
    """The best trial's report and registered model; once, however often a sweep continues."""
    noted = store.noted("published")
    assert best.best is not None
    if noted.get("run") != best.best["run"]:
        config = best.best_config(base)
        uri = base.tracking.uri if best.mlflow_run_id else None
        with Tracker(uri, best.mlflow_run_id, system_metrics=False) as tracker:
            summary, _ = publish(config, dataset, tracker)
        noted = json.loads(json.dumps(vars(summary))) | {"run": best.best["run"]}
        store.note("published", noted)
    return noted


def show(outcome: Outcome, parent: Tracker, console: Console) -> None:
    """Print the ranking, the verdict, and where to look."""
    title = Text(f"{outcome.name}: ranking")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("", justify="right")
    table.add_column("trial")
    table.add_column("mAP (%)", justify="right", no_wrap=True)
    table.add_column("trainings", justify="right")
    table.add_column("settings", overflow="fold")
    for place, entry in enumerate(outcome.entries, 1):
        trainings = str(len(entry.scores))
        row = (str(place), entry.trial.name, entry.measured(), trainings, Text(entry.title))
        table.add_row(*row)
    console.print(table)
    lines = [*outcome.verdict, "", "Train the best again:", f"  {outcome.command}", ""]
    lines.append(f"pictures   {outcome.report}")
    if "://" in outcome.report:
        folder = shlex.quote(outcome.report.removesuffix(f"/{REPORT}"))
        lines.append(f"           python -m reid_train report {folder}")
    if outcome.model:
        note = "now the champion" if outcome.champion else "the champion stays"
        lines.append(f"model      {outcome.model} ({note})")
    if parent.uri and parent.run_id:
        lines.append(f"MLflow     {run_page(parent.uri, parent.run_id)}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
