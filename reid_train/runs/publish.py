"""After the last step: the report, its pictures, and the best checkpoint's registration."""

from __future__ import annotations

import json
import logging
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from rich.console import Console

from data_shards.dataset import Dataset
from data_shards.decode import decode
from data_shards.errors import DataError, StorageError
from data_shards.progress import Progress, phase, silent
from data_shards.storage import open_storage
from reid_train.config import TrainConfig
from reid_train.registry.load import SUMMARY
from reid_train.registry.registry import (
    Registered,
    default_name,
    register,
    registered_version,
)
from reid_train.report.page import Picture, write_page
from reid_train.report.summary import Row, print_summary
from reid_train.runs.checkpoint_store import (
    by_score,
    delete_stale_checkpoints,
    first_whole,
    measured,
    newest_whole,
    stored_checkpoints,
)
from reid_train.runs.run_dir import REPORT
from reid_train.tracking.provenance import code_commit
from reid_train.tracking.server import run_page
from reid_train.tracking.tracker import Tracker
from reid_train.training.checkpoint import RANK_LIST, Checkpoint
from reid_train.training.history import History

logger = logging.getLogger(__name__)

MEASURES = ("mAP", "rank-1", "rank-5", "rank-10", "mINP")


@dataclass(frozen=True)
class Summary:
    """The result of a finished run. `metrics` and `before` are fractions by name."""

    name: str
    metrics: dict[str, float]
    before: dict[str, float]
    images_per_second: float
    report: str
    checkpoint: str
    """Name of the best checkpoint, a folder in the run's."""
    model: str | None
    champion: bool
    epochs: int = 0
    """Epochs of the run; 0 in a summary that did not record it."""


def publish(
    config: TrainConfig, dataset: Dataset, tracker: Tracker, progress: Progress = silent
) -> tuple[Summary, list[Row]]:
    """Draw, store, track and register the result of a run that has ended.

    Args:
        config: the run.
        dataset: what it was trained on; the rank list's images are read from it.
        tracker: of the run.
        progress: takes the stages.

    Returns:
        The summary, and the rows of the table that a person is shown.

    Raises:
        DataError: no checkpoint of the run is whole.
    """
    run = f"{config.output}/{config.name}"
    with newest_whole(run) as newest:
        if newest is None:
            raise DataError(f"the run {run} has no checkpoint")
        history = newest.history()
        scores = measured(history)
        ranked = [entry.name for entry in by_score(stored_checkpoints(run), scores)]
        if ranked and ranked[0] != newest.folder.name:
            with first_whole(run, [*ranked, newest.folder.name]) as best:
                assert best is not None
                result = _publish(config, dataset, tracker, progress, history, best)
        else:
            result = _publish(config, dataset, tracker, progress, history, newest)
    delete_stale_checkpoints(run, scores)
    return result


def _publish(
    config: TrainConfig,
    dataset: Dataset,
    tracker: Tracker,
    progress: Progress,
    history: History,
    best: Checkpoint,
) -> tuple[Summary, list[Row]]:
    before, after = _before_and_after(history, best)
    speed = float(np.median(history.steps["images_per_second"]))
    rows = [Row(name, before.get(name), after.get(name)) for name in MEASURES if after]
    rows.append(Row("training speed", None, speed, "images/s"))
    commit = code_commit()
    facts = {
        "dataset": f"{dataset.manifest.name} ({dataset.url})",
        "manifest": dataset.manifest.digest[:12],
        "best epoch": f"{best.progress.epoch} of {config.total_epochs}",
        "workers": str(config.workers),
        **({"commit": commit[:12]} if commit else {}),
    }
    title = config.name or config.recipe
    with tempfile.TemporaryDirectory(prefix="reid-report-") as temporary:
        page = Path(temporary)
        with phase(progress, "drawing the report"):
            pictures = _pictures(config, dataset, best, history, page)
            settings = config.model_dump(mode="json")
            write_page(page / "report.html", title, rows, pictures, settings, facts=facts)
        with phase(progress, "registering the model"):
            registered = _register(config, dataset, best, after, tracker)
        summary = Summary(
            name=title,
            metrics=after,
            before=before,
            images_per_second=speed,
            report=f"{config.output.rstrip('/')}/{title}/{REPORT}/report.html",
            checkpoint=best.folder.name,
            model=registered.uri if registered else None,
            champion=registered.champion if registered else False,
            epochs=config.total_epochs,
        )
        (page / PurePosixPath(SUMMARY).name).write_text(json.dumps(vars(summary), indent=2))
        storage = open_storage(f"{config.output}/{title}")
        # The summary comes last: a run that has one has its report.
        for path in sorted(page.iterdir(), key=lambda p: (p.name in SUMMARY, p.name)):
            storage.upload(f"{REPORT}/{path.name}", path)
        tracker.log_artifacts(page, REPORT)
    return summary, rows


def show(
    summary: Summary, rows: list[Row], config: TrainConfig, tracker: Tracker, console: Console
) -> None:
    """Print the table, and where the report, the model and MLflow are."""
    print_summary(console, rows, title=f"{summary.name}: before and after training")
    console.print(f"report     {summary.report}", highlight=False, soft_wrap=True)
    if "://" in config.output:
        folder = f"{config.output.rstrip('/')}/{summary.name}"
        opens = f"python -m reid_train report {shlex.quote(folder)}"
        console.print(f"           {opens}", highlight=False, markup=False, soft_wrap=True)
    if summary.model:
        note = "now the champion" if summary.champion else "the champion stays"
        model = f"{summary.model} ({note})"
    else:
        model = f"{config.output.rstrip('/')}/{summary.name}/{summary.checkpoint}"
    console.print(f"model      {model}", highlight=False, soft_wrap=True)
    if tracker.uri and tracker.run_id:
        page = run_page(tracker.uri, tracker.run_id)
        console.print(f"MLflow     {page}", highlight=False, soft_wrap=True)


def _before_and_after(
    history: History, best: Checkpoint
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the metrics of the untrained network, if it was evaluated, and of the best one."""
    epochs = history.evaluations.get("epoch", [])

    def at(epoch: int) -> dict[str, float]:
        if epoch not in epochs:
            return {}
        row = epochs.index(epoch)
        return {k: column[row] for k, column in history.evaluations.items() if k != "epoch"}

    return at(0), at(best.progress.epoch)


def _pictures(
    config: TrainConfig, dataset: Dataset, best: Checkpoint, history: History, folder: Path
) -> list[Picture]:
    from reid_train.report.curves import draw_curves  # matplotlib takes a second to import
    from reid_train.report.factors import draw_factors, save_factors

    pictures = []
    with np.load(best.folder / RANK_LIST, allow_pickle=False) as rank_list:
        if "query" in rank_list:
            path = folder / "rank_list.png"
            _draw_rank_list(path, dataset, dict(rank_list), config.image)
            caption = "Queries from the highest average precision to the lowest."
            pictures.append(Picture(path, caption))
    path = folder / "curves.png"
    draw_curves(path, history.columns())
    pictures.append(Picture(path, "Losses, accuracy, learning rate and speed during training."))
    steps, values = history.factors()
    if len(steps):
        save_factors(folder / "factors.parquet", history.tensor_names, steps, values)
        path = folder / "factors.png"
        names, kinds = history.tensor_names, history.tensor_kinds
        draw_factors(path, names, steps, values, kinds=kinds)
        pictures.append(Picture(path, "The regularization factor λ of every tensor over time."))
    return pictures


def _draw_rank_list(path: Path, dataset: Dataset, rank_list: dict, image) -> None:
    from reid_train.report.ranks import draw_rank_list

    query, gallery = dataset.index("query"), dataset.index("gallery")

    def picture(split: str, row: int) -> np.ndarray:
        index = dataset.index(split)
        shard = dataset.manifest.shards[index.shard[row]]
        data = dataset.storage.read_range(shard.name, int(index.offset[row]), int(index.size[row]))
        return decode(data)

    rows, matches = rank_list["query"], rank_list["gallery"]
    draw_rank_list(
        path,
        [picture("query", row) for row in rows],
        [[picture("gallery", match) for match in row] for row in matches],
        gallery.pid[matches] == query.pid[rows][:, None],
        query_pid=query.pid[rows],
        query_camid=query.camid[rows],
        gallery_camid=gallery.camid[matches],
        similarity=rank_list["similarity"],
    )


def _register(
    config: TrainConfig,
    dataset: Dataset,
    best: Checkpoint,
    metrics: dict[str, float],
    tracker: Tracker,
) -> Registered | None:
    if tracker.run_id is None or tracker.uri is None or config.tracking.model_name == "off":
        return None
    try:
        name = config.tracking.model_name or default_name(
            dataset.manifest.name, best.origin.evaluation_digest, tracker.uri
        )
        return registered_version(name, tracker.run_id, metrics, tracker.uri) or register(
            best.folder,
            name,
            metrics,
            manifest_digest=best.origin.manifest_digest,
            evaluation_digest=best.origin.evaluation_digest,
            run_id=tracker.run_id,
            tracking_uri=tracker.uri,
        )
    except StorageError as error:
        logger.warning("model not registered: %s. Register it with --resume", error)
        return None
