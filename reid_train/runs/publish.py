"""After the last step: the best checkpoint's report, pictures, and place in the registry."""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import ray.train
from rich.console import Console

from data_shards.dataset import Dataset
from data_shards.decode import decode
from data_shards.errors import StorageError
from data_shards.progress import Progress, phase, silent
from data_shards.storage import open_storage
from reid_train.config import TrainConfig
from reid_train.registry.registry import SUMMARY, Registered, register
from reid_train.report.page import Picture, write_page
from reid_train.report.summary import Row, print_summary
from reid_train.runs.ray_checkpoints import first_whole
from reid_train.runs.run_dir import REPORT
from reid_train.tracking.provenance import code_commit
from reid_train.tracking.tracker import Tracker
from reid_train.training.checkpoint import RANK_LIST, Checkpoint
from reid_train.training.context import UNMEASURED
from reid_train.training.history import History

logger = logging.getLogger(__name__)

MEASURES = ("mAP", "rank-1", "rank-5", "rank-10", "mINP")


@dataclass(frozen=True)
class Summary:
    """What a finished run came to; `metrics` and `before` are fractions by name."""

    name: str
    metrics: dict[str, float]
    before: dict[str, float]
    images_per_second: float
    report: str
    checkpoint: str
    """Name of the best, a folder in the run's."""
    model: str | None
    champion: bool


def publish(
    config: TrainConfig,
    result: ray.train.Result,
    dataset: Dataset,
    tracker: Tracker,
    progress: Progress = silent,
) -> tuple[Summary, list[Row]]:
    """Draw, store, track and register the result of a run.

    Args:
        config: the run.
        result: Ray Train's, with the best and the last checkpoint.
        dataset: what it was trained on; the rank list's images are read from it.
        tracker: the run's.
        progress: shows the phases.

    Returns:
        The summary, and the rows of the table that a person is shown.
    """
    with tempfile.TemporaryDirectory(prefix="reid-report-") as temporary:
        folder = Path(temporary)
        page = folder / REPORT
        page.mkdir()
        title = config.name or config.recipe
        with phase(progress, "drawing the report"):
            chosen = first_whole(_best(result))
            best = Checkpoint.open(_fetch(chosen, folder / "best"))
            last = Checkpoint.open(_fetch(result.checkpoint, folder / "last"))
            history = last.history()
            before, after = _before_and_after(history, best)
            speed = float(np.median(history.steps["images_per_second"]))
            rows = [Row(name, before.get(name), after.get(name)) for name in MEASURES if after]
            rows.append(Row("training speed", None, speed, "images/s"))
            pictures = _pictures(config, dataset, best, history, page)
            commit = code_commit()
            facts = {
                "dataset": f"{dataset.manifest.name} ({dataset.url})",
                "manifest": dataset.manifest.digest[:12],
                "best epoch": f"{best.progress.epoch} of {config.total_epochs}",
                "workers": str(config.workers),
                **({"commit": commit[:12]} if commit else {}),
            }
            values = config.model_dump(mode="json")
            write_page(page / "report.html", title, rows, pictures, values, facts=facts)
        with phase(progress, "registering the model"):
            registered = _register(config, dataset, best, after, tracker)
        with phase(progress, "storing the report"):
            summary = Summary(
                name=title,
                metrics=after,
                before=before,
                images_per_second=speed,
                report=f"{config.output.rstrip('/')}/{title}/{REPORT}/report.html",
                checkpoint=PurePosixPath(chosen.path).name,
                model=registered.uri if registered else None,
                champion=registered.champion if registered else False,
            )
            (folder / SUMMARY).write_text(json.dumps(vars(summary), indent=2))
            storage = open_storage(config.output)
            for path in sorted(page.iterdir()):
                storage.upload(f"{title}/{REPORT}/{path.name}", path)
            tracker.log_artifacts(page, REPORT)
    return summary, rows


def show(summary: Summary, rows: list[Row], config: TrainConfig, console: Console) -> None:
    """Print the table, and where to look next."""
    print_summary(console, rows, title=f"{summary.name}: before and after training")
    console.print(f"report     {summary.report}", highlight=False, soft_wrap=True)
    if summary.model:
        note = "now the champion" if summary.champion else "the champion stays"
        model = f"{summary.model} ({note})"
    else:
        model = f"{config.output.rstrip('/')}/{summary.name}/{summary.checkpoint}"
    console.print(f"model      {model}", highlight=False, soft_wrap=True)
    if config.tracking.uri and config.tracking.uri.startswith("sqlite:"):
        command = f"mlflow ui --backend-store-uri {config.tracking.uri}"
        console.print(f"MLflow     {command}", highlight=False, soft_wrap=True)
    elif config.tracking.uri not in (None, "off"):
        console.print(f"MLflow     {config.tracking.uri}", highlight=False, soft_wrap=True)


def _best(result: ray.train.Result) -> list[ray.train.Checkpoint]:
    """The checkpoints by descending mAP; the last one alone if none was measured."""
    measured = [
        (metrics["mAP"], position, checkpoint)
        for position, (checkpoint, metrics) in enumerate(result.best_checkpoints or [])
        if metrics["mAP"] > UNMEASURED
    ]
    if measured:
        return [entry[2] for entry in sorted(measured, key=lambda e: e[:2], reverse=True)]
    assert result.checkpoint is not None
    return [result.checkpoint]


def _fetch(checkpoint: ray.train.Checkpoint | None, folder: Path) -> Path:
    assert checkpoint is not None
    checkpoint.to_directory(folder)
    return folder


def _before_and_after(
    history: History, best: Checkpoint
) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of the untrained network, if it was measured, and of the best checkpoint."""
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
            caption = "From the query with the best result to the one with the worst."
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
        return register(
            best.folder,
            config.tracking.model_name or f"reid-{dataset.manifest.name}",
            metrics,
            manifest_digest=best.origin.manifest_digest,
            evaluation_digest=best.origin.evaluation_digest,
            run_id=tracker.run_id,
            tracking_uri=tracker.uri,
        )
    except StorageError as error:
        # The training is whole, and so is its report; only this is left to do.
        logger.warning("model not registered: %s; --resume registers it", error)
        return None
