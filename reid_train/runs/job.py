"""One training from its configuration to the registered model: the whole of `train`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from data_shards.dataset import Dataset
from data_shards.progress import Display, display, make_console, phase
from data_shards.ray_utils import start_ray
from data_shards.storage import open_storage
from reid_train.config import TrainConfig
from reid_train.runs import preflight, run_lock
from reid_train.runs.checkpoint_store import newest_whole, stored_checkpoints
from reid_train.runs.run_dir import (
    Run,
    Summary,
    prepare,
    same_dataset,
    same_split,
    same_training,
    taken,
    write,
)
from reid_train.tracking.provenance import (
    code_commit,
    different_versions,
    library_versions,
    submitted_job,
)
from reid_train.tracking.server import has_run, last_step
from reid_train.tracking.tracker import Tracker
from reid_train.tracking.uris import training_uri

if TYPE_CHECKING:
    from reid_train.report.page import Row

UNITS = {"training": "steps", "ranking": "pairs"}  # all other stages count images


def run(
    config: TrainConfig,
    *,
    resume: bool = False,
    console: Console | None = None,
    where: bool = True,
) -> Summary:
    """Train, measure, draw, track and register.

    Args:
        config: what to do; `data` and `output` are needed.
        resume: continue the run `config.name` from its newest checkpoint.
        console: where progress and the table are shown.
        where: show where the report, the model and MLflow are, too.

    Raises:
        ReidError: anything that the person can mend. What was stored before is kept.
    """
    console = console or make_console()
    config = prepare(config)
    with display(console, units=UNITS) as shown:
        saved = Run.read(config.output, str(config.name)) if resume else None
        with phase(shown, "opening the dataset"):
            digest = saved.manifest_digest if saved else None
            dataset = Dataset.open(config.data, digest, config.loader.node_cache)
        config = config.replace(tracking__uri=training_uri(config.tracking.uri, config.output))
        if saved is None:
            if Run.exists(config.output, str(config.name)):
                raise taken(config)
        else:
            same_training(saved.config, config)
            same_dataset(saved, dataset)
            same_split(saved, config, dataset)
            if changed := different_versions(saved.versions):
                shown.print(
                    f"since the run was started, {changed}: its next steps may differ in their "
                    "last digits from those of a run that was not interrupted"
                )
        # All that needs neither PyTorch nor Ray comes first: they take seconds to load.
        with phase(shown, "checking the settings"):
            preflight.check_settings(config, dataset, saved)
            summary = _complete(config, saved) if saved else None
        if summary is not None:
            shown.print(f"run {config.name} has finished; nothing to do")
            return summary
        with phase(shown, "loading PyTorch and Ray"):
            from reid_train.runs.publish import show, show_metrics
        tracker, summary, rows = _train(config, dataset, saved, shown)
    show_metrics(summary, rows, console)
    if where:
        show(summary, config, tracker, console)
    return summary


def _train(
    config: TrainConfig, dataset: Dataset, saved: Run | None, shown: Display
) -> "tuple[Tracker, Summary, list[Row]]":
    """Train what is not trained yet, then draw, track and register it."""
    from reid_train.runs.cores import with_cores
    from reid_train.runs.init_from import fetch_initial, keep
    from reid_train.runs.publish import publish
    from reid_train.runs.ray_trainer import fit

    with phase(shown, "checking the network"):
        initial = fetch_initial(config) if saved is None else None
        preflight.check_network(config, dataset, saved, initial)
    folder = open_storage(config.output).child(str(config.name))
    with run_lock.held(folder, str(config.name)) as lock:
        finished = saved is not None and _is_finished(config, folder.url)
        if not finished:
            with phase(shown, "starting Ray"):  # before the name is taken, since it may fail
                start_ray(config.workers * (config.cpus_per_worker or 1))
                config = with_cores(config)
        if initial is not None:
            config = config.replace(init_digest=initial.digest)
            keep(initial, folder.url)
        with _tracked(config, dataset, saved) as tracker:
            if finished:  # send the values that MLflow does not have
                with newest_whole(folder.url) as newest:
                    if newest is not None:
                        newest.history().replay(tracker.log)
            else:
                if saved and not stored_checkpoints(folder.url):
                    shown.print(f"{folder.url} has no checkpoint: training starts at step 1")
                fit(config, dataset, tracker.run_id, lock, shown)
            return tracker, *publish(config, dataset, tracker, shown)


@contextmanager
def _tracked(config: TrainConfig, dataset: Dataset, saved: Run | None) -> Iterator[Tracker]:
    """Start or reopen the MLflow run, then write `run.json`, which takes the name of a new run.

    If MLflow cannot start a run, nothing has been written, and the same command may be repeated.
    """
    uri = None if config.tracking.uri == "off" else config.tracking.uri
    run_id = saved.mlflow_run_id if saved else None
    if saved and run_id and uri != saved.config.tracking.uri and not has_run(uri, run_id):
        run_id = None  # the run moved to another MLflow
    experiment = config.tracking.experiment
    with Tracker.start(uri, experiment, run_name=config.name, run_id=run_id) as tracker:
        digest = dataset.manifest.digest
        write(Run(config, digest, tracker.run_id, library_versions()), new=saved is None)
        if run_id is None:
            tracker.log_parameters(config.flat())
        tracker.set_tags(
            {
                "dataset": dataset.url,
                "manifest_digest": digest,
                "evaluation_digest": dataset.manifest.evaluation_digest,
                "selected_on": dataset.choose_split(config.evaluation.split),
                "commit": code_commit(),
                "ray_job": submitted_job(),
            }
        )
        yield tracker


def _is_finished(config: TrainConfig, run: str) -> bool:
    """Return whether a run that is resumed has its last checkpoint, and it is not damaged."""
    stored = stored_checkpoints(run)
    if not stored or stored[0].epoch < config.total_epochs:
        return False
    with newest_whole(run) as newest:
        return newest is not None and newest.progress.epoch >= config.total_epochs


def _complete(config: TrainConfig, saved: Run) -> Summary | None:
    """Return a finished run's summary; None if training, report, model or values are missing."""
    run = f"{config.output}/{config.name}"
    summary = Summary.read(run)
    if summary is None or summary.epochs != config.total_epochs or not _is_finished(config, run):
        return None
    if config.tracking.uri == "off":
        return summary
    if summary.model is None and config.tracking.model_name != "off":
        return None
    sent = last_step(config.tracking.uri, saved.mlflow_run_id, "loss/total")
    return summary if sent == stored_checkpoints(run)[0].step else None
