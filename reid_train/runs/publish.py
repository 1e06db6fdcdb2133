"""After the last step: the report, its pictures, and the best checkpoint's registration."""

import contextlib
import json
import logging
import tempfile
from pathlib import Path, PurePosixPath

import numpy as np
from rich.console import Console

from data_shards.dataset import Dataset
from data_shards.errors import DataError, StorageError
from data_shards.progress import Progress, phase, print_places, silent
from data_shards.storage import open_storage
from reid_train.config import TrainConfig
from reid_train.evaluation.metrics import MEAN
from reid_train.model.embedder import Embedder
from reid_train.registry.attached import THRESHOLDS, attach, in_rank_list
from reid_train.registry.load import SUMMARY
from reid_train.registry.registry import Registered, default_name, register, registered_version
from reid_train.report.page import Picture, Row, print_summary, write_page
from reid_train.runs import checkpoint_store
from reid_train.runs.final_test import final_test
from reid_train.runs.run_dir import REPORT, Summary, report_command
from reid_train.tracking.provenance import code_commit
from reid_train.tracking.server import run_page
from reid_train.tracking.tracker import Tracker
from reid_train.training.checkpoint import RANK_LIST, Checkpoint
from reid_train.training.history import History

logger = logging.getLogger(__name__)

THRESHOLDS_FILE = f"{THRESHOLDS}.json"
MEASURES = ("mAP", "rank-1", "rank-5", "rank-10", "mINP")


def publish(
    config: TrainConfig, dataset: Dataset, tracker: Tracker, progress: Progress = silent
) -> tuple[Summary, list[Row]]:
    """Draw, store, track and register the result of a run; return it, and the rows to print."""
    run = f"{config.output}/{config.name}"
    with contextlib.ExitStack() as stack:
        newest = best = stack.enter_context(checkpoint_store.newest_whole(run))
        if newest is None:
            raise DataError(f"the run {run} has no checkpoint")
        history = newest.history()
        scores = checkpoint_store.measured(history)
        stored = checkpoint_store.stored_checkpoints(run)
        ranked = [entry.name for entry in checkpoint_store.by_score(stored, scores)]
        if ranked and ranked[0] != newest.folder.name:
            names = [*ranked, newest.folder.name]
            best = stack.enter_context(checkpoint_store.first_whole(run, names))
        assert best is not None
        page = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reid-report-")))
        before, after = _metrics(history, 0), _metrics(history, best.progress.epoch)
        speed = float(np.median(history.steps["images_per_second"]))
        split = dataset.choose_split(config.evaluation.split)
        test = final_test(config, dataset, best.folder.name, progress)
        tracker.log(test, best.progress.global_step)
        prefix = "validation " if split == "validation" else ""
        rows = [Row(prefix + name, before.get(name), after.get(name)) for name in _shown(after)]
        rows += [Row(f"test {name}", None, test.get(name)) for name in _shown(test)]
        rows.append(Row("training speed", None, speed, "images/s"))
        with phase(progress, "drawing the report"):
            _draw_report(page, config, dataset, split, history, best, rows)
        with phase(progress, "registering the model"):
            registered = _register(config, dataset, best, after, test, tracker)
            if registered and (page / THRESHOLDS_FILE).exists():
                _attach(registered, page / THRESHOLDS_FILE, dataset, split, tracker)
        summary = Summary(
            name=str(config.name),
            metrics=after,
            before=before,
            images_per_second=speed,
            report=f"{run}/{REPORT}/report.html",
            checkpoint=best.folder.name,
            model=registered.uri if registered else None,
            champion=registered.champion if registered else False,
            epochs=config.total_epochs,
            selected_on=split,
            test=test,
        )
        (page / PurePosixPath(SUMMARY).name).write_text(json.dumps(vars(summary), indent=2))
        storage = open_storage(run)
        # The summary comes last: a run that has one has its report.
        for path in sorted(page.iterdir(), key=lambda p: (p.name in SUMMARY, p.name)):
            storage.upload(f"{REPORT}/{path.name}", path)
        tracker.log_artifacts(page, REPORT)
    checkpoint_store.delete_stale_checkpoints(run, scores)
    return summary, rows


def show_metrics(summary: Summary, rows: list[Row], console: Console) -> None:
    """Print what was measured before and after training."""
    print_summary(console, rows, title=f"{summary.name}: before and after training")


def show(summary: Summary, config: TrainConfig, tracker: Tracker, console: Console) -> None:
    """Print where the report, the model and MLflow are."""
    folder = f"{config.output.rstrip('/')}/{summary.name}"
    lines = [f"report     {summary.report}"]
    if summary.selected_on == "validation":
        once = ", then measured once on test" if summary.test else ""
        lines.insert(0, f"best epoch chosen by mAP on validation{once}")
    if "://" in folder:
        lines.append(f"           {report_command(folder)}")
    note = "now the champion" if summary.champion else "the champion stays"
    model = f"{summary.model} ({note})" if summary.model else f"{folder}/{summary.checkpoint}"
    lines.append(f"model      {model}")
    if tracker.uri and tracker.run_id:
        lines.append(f"MLflow     {run_page(tracker.uri, tracker.run_id)}")
    print_places(console, lines)


def _shown(metrics: dict[str, float]) -> list[str]:
    """The metrics of a table: the usual ones, and those of each dataset in a merged one."""
    each = [name for name in metrics if "/" in name]
    return [*MEASURES, *sorted(each, key=lambda name: MEAN in name)] if metrics else []


def _metrics(history: History, epoch: int) -> dict[str, float]:
    """Return the metrics after some epochs; none if the network was not evaluated then."""
    epochs = history.evaluations.get("epoch", [])
    if epoch not in epochs:
        return {}
    row = epochs.index(epoch)
    return {k: column[row] for k, column in history.evaluations.items() if k != "epoch"}


def _draw_report(
    folder: Path,
    config: TrainConfig,
    dataset: Dataset,
    split: str,
    history: History,
    best: Checkpoint,
    rows: list[Row],
) -> None:
    """Write `report.html`, its pictures, and λ as a table."""
    from reid_train.report.curves import draw_curves  # matplotlib takes a second to import
    from reid_train.report.factors import draw_factors, save_factors
    from reid_train.report.pictures import draw_examples
    from reid_train.report.roc import draw_thresholds

    chosen_on = f"the {split} split"
    with np.load(best.folder / RANK_LIST, allow_pickle=False) as chosen:
        embedder = Embedder.from_folder(best.folder, "cpu") if "query" in chosen else None
        pictures = draw_examples(folder, dataset, split, chosen, embedder)
    thresholds = in_rank_list(best.folder / RANK_LIST)
    if thresholds and thresholds.impostors:
        (folder / THRESHOLDS_FILE).write_text(json.dumps(thresholds.to_json()))
        path = folder / "thresholds.png"
        draw_thresholds(path, thresholds)
        caption = f"Similarities of pairs of {chosen_on}, and which are taken for one person."
        pictures.append(Picture(path, caption))
    path = folder / "curves.png"
    draw_curves(path, history.columns())
    caption = f"Losses, accuracy on {chosen_on}, learning rate and speed during training."
    pictures.append(Picture(path, caption))
    steps, values = history.factors()
    if len(steps):
        names, path = history.tensor_names, folder / "factors.png"
        save_factors(folder / "factors.parquet", names, steps, values)
        draw_factors(path, names, steps, values, kinds=history.tensor_kinds)
        pictures.append(Picture(path, "The regularization factor λ of every tensor over time."))
    facts = {
        "dataset": f"{dataset.manifest.name} ({dataset.url})",
        "manifest": dataset.manifest.digest[:12],
        "best epoch": f"{best.progress.epoch} of {config.total_epochs}",
        "chosen by": f"mAP on {chosen_on}",
        "workers": str(config.workers),
    }
    if commit := code_commit():
        facts["commit"] = commit[:12]
    settings = config.model_dump(mode="json")
    write_page(folder / "report.html", str(config.name), rows, pictures, settings, facts=facts)


def _register(
    config: TrainConfig,
    dataset: Dataset,
    best: Checkpoint,
    metrics: dict[str, float],
    test: dict[str, float],
    tracker: Tracker,
) -> Registered | None:
    if tracker.run_id is None or tracker.uri is None or config.tracking.model_name == "off":
        return None
    uri, run_id, origin = tracker.uri, tracker.run_id, best.origin
    validation, digest = None, None
    if dataset.choose_split(config.evaluation.split) == "validation":
        metrics, validation, digest = test, metrics, dataset.manifest.validation_digest
    try:
        name = config.tracking.model_name or default_name(
            dataset.manifest.name, origin.evaluation_digest, uri, validation_digest=digest
        )
        return registered_version(name, run_id, metrics, uri, validation=validation) or register(
            best.folder,
            name,
            metrics,
            manifest_digest=origin.manifest_digest,
            evaluation_digest=origin.evaluation_digest,
            validation=validation,
            validation_digest=digest,
            run_id=run_id,
            dataset=dataset.manifest.name,
            run=str(config.name),
            tracking_uri=uri,
        )
    except StorageError as error:
        logger.warning(
            "model not registered: %s. To register it, continue: a run with --resume, a sweep with "
            "the same command",
            error,
        )
        return None


def _attach(
    registered: Registered, path: Path, dataset: Dataset, split: str, tracker: Tracker
) -> None:
    """Log the thresholds beside the registered version."""
    try:
        attach(registered.uri, path, THRESHOLDS, {"split": split}, tracker.uri)
    except StorageError as error:
        logger.warning(
            "thresholds not registered: %s. Register them with python -m reid_train evaluate "
            "--model %s --data %s --split %s",
            *(error, registered.uri, dataset.url, split),
        )
