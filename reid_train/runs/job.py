"""One training from its configuration to the registered model: the whole of `train`."""

from __future__ import annotations

from pathlib import PurePosixPath

from rich.console import Console

from data_shards.dataset import Dataset
from data_shards.progress import Display, display, make_console, phase
from data_shards.storage import open_storage
from reid_train.config import TrainConfig
from reid_train.report.summary import Row
from reid_train.runs import preflight, run_lock
from reid_train.runs.console import UNITS
from reid_train.runs.publish import Summary, publish, show
from reid_train.runs.ray_trainer import fit
from reid_train.runs.run_dir import Run, claim, prepare, record, tidy
from reid_train.tracking.provenance import code_commit, submitted_job
from reid_train.tracking.tracker import Tracker
from reid_train.tracking.uris import training_uri


def run(config: TrainConfig, *, resume: bool = False, console: Console | None = None) -> Summary:
    """Train, measure, draw, track and register.

    Args:
        config: what to do; `data` and `output` are needed.
        resume: continue the run `config.name` from its last checkpoint.
        console: where progress and the table are shown.

    Returns:
        What the run came to.

    Raises:
        ReidError: anything that the person can mend; nothing that was there is lost.
    """
    console = console or make_console()
    with display(console, units=UNITS) as progress:
        summary, rows, config = _run(config, resume, progress)
    show(summary, rows, config, console)
    return summary


def _run(
    config: TrainConfig, resume: bool, progress: Display
) -> tuple[Summary, list[Row], TrainConfig]:
    """Check the settings, take the run's name, and train."""
    config = prepare(config)
    with phase(progress, "opening the dataset"):
        dataset = Dataset.open(config.data)
        saved = Run.read(config.output, config.name or "") if resume else None
        preflight.check(config, dataset, saved)
    config = config.replace(tracking__uri=training_uri(config.tracking.uri, config.output))
    claim(config, dataset, saved)
    folder = open_storage(config.output).child(str(config.name))
    with run_lock.held(folder, str(config.name)) as own:
        summary, rows = _train(config, dataset, saved, own, progress)
    return summary, rows, config


def _train(
    config: TrainConfig,
    dataset: Dataset,
    saved: Run | None,
    own: run_lock.Claim,
    progress: Display,
) -> tuple[Summary, list[Row]]:
    """The run itself, its name and its lease taken."""
    with Tracker.start(
        None if config.tracking.uri == "off" else config.tracking.uri,
        config.tracking.experiment,
        run_name=config.name,
        run_id=saved.mlflow_run_id if saved else None,
    ) as tracker:
        record(Run(config, dataset.manifest.digest, tracker.run_id))
        if saved is None or saved.mlflow_run_id is None:
            tracker.log_parameters(config.flat())
        tracker.set_tags(
            {
                "dataset": dataset.url,
                "manifest_digest": dataset.manifest.digest,
                "evaluation_digest": dataset.manifest.evaluation_digest,
                "commit": code_commit(),
                "ray_job": submitted_job(),
            }
        )
        result = fit(config, dataset, tracker.run_id, own, progress=progress)
        kept = [result.checkpoint, *(best for best, _ in result.best_checkpoints or ())]
        tidy(config, {PurePosixPath(checkpoint.path).name for checkpoint in kept if checkpoint})
        return publish(config, result, dataset, tracker, progress)
