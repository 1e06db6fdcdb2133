"""What is checked before a run takes its name, and what is done for one that has finished."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ray.train import TrainingFailedError
from rich.console import Console
from tiny import build_dataset, config, make_worker

from data_shards.building.versions import add
from data_shards.dataset import Dataset
from data_shards.errors import ConfigError, DataError, ReidError, StorageError
from reid_train.config import TrainConfig
from reid_train.registry.load import SUMMARY
from reid_train.runs import cores, final_test, job, preflight, ray_trainer
from reid_train.runs.checkpoint_store import Keeper, newest_whole
from reid_train.runs.run_dir import Run
from reid_train.tracking.tracker import Tracker
from reid_train.tracking.uris import local_tracking
from reid_train.training.loop import train

pytestmark = pytest.mark.usefixtures("small_and_quick")


@pytest.fixture
def settings(tiny_dataset: Dataset, tmp_path: Path) -> TrainConfig:
    return config(
        data=tiny_dataset.url,
        output=str(tmp_path / "runs"),
        name="läuft",
        tracking__uri="off",
        optimizer__frozen_epochs=0,
        loader__cache=tmp_path / "cache",
        model__weights="none",
    )


@pytest.fixture
def fitted(monkeypatch, tmp_path) -> list[TrainConfig]:
    """The configurations that were trained; the training is in this process, without Ray."""
    calls: list[TrainConfig] = []

    def fit(config, dataset, run_id, lock, display) -> None:
        calls.append(config)
        run = f"{config.output}/{config.name}"
        worker, _ = make_worker(dataset, tmp_path)
        with newest_whole(run) as resume:
            keeper = Keeper(run, lock, resume)

            def report(metrics, folder) -> None:
                keeper.keep(folder, f"checkpoint_{len(calls)}_{metrics['step']}", metrics)

            worker.report = report
            train(config, dataset, worker, resume)

    monkeypatch.setattr(ray_trainer, "fit", fit)
    monkeypatch.setattr(job, "start_ray", lambda cpus: None)
    monkeypatch.setattr(cores, "with_cores", with_cores)
    return calls


def with_cores(config: TrainConfig) -> TrainConfig:
    return config.replace(cpus_per_worker=config.cpus_per_worker or 3)


def run(settings: TrainConfig, *, resume: bool = False) -> str:
    """What is printed."""
    screen = io.StringIO()
    job.run(settings, resume=resume, console=Console(file=screen, width=200))
    return screen.getvalue()


def test_finished_run_is_not_trained_again(settings, fitted):
    assert "before and after training" in run(settings)
    assert run(settings, resume=True).strip().endswith("run läuft has finished; nothing to do")
    assert len(fitted) == 1


def test_finished_run_says_so_without_loading_pytorch_and_ray(settings, fitted):
    run(settings)
    words = ["train", "--resume", "--name", "läuft", "--output", settings.output]
    asked = f"""
import sys
from reid_train.cli import main
code = main({words!r})
print(code, [name for name in ("torch", "ray", "numba") if name in sys.modules])
"""
    made = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert "run läuft has finished; nothing to do\n0 []\n" in made.stdout, made.stderr


@pytest.mark.parametrize(
    ("change", "expected"),
    [("--batch.identities=16", "give --batch.identities 6"), ("--data=nothing", "no dataset at")],
)
def test_mistakes_are_found_before_pytorch_is_loaded(settings, change, expected):
    words = ["train", "--recipe", "people_small", "--data", settings.data, "--name", "new"]
    words += ["--output", settings.output, "--tracking.uri", "off", change]
    asked = f"import sys; from reid_train.cli import main; main({words!r})"
    asked += "; print('torch' in sys.modules)"
    made = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert expected in made.stderr
    assert "PyTorch" not in made.stdout
    assert made.stdout.endswith("False\n")


def test_finished_run_without_its_report_gets_it(settings, fitted):
    run(settings)
    summary = Path(settings.output, "läuft", SUMMARY)
    before = json.loads(summary.read_text())
    summary.unlink()
    run(settings, resume=True)
    assert json.loads(summary.read_text()) == before
    assert len(fitted) == 1


def test_cores_of_a_worker_are_recorded(settings, fitted):
    run(settings)
    assert [config.cpus_per_worker for config in fitted] == [3]
    file = Path(settings.output, "läuft", "run.json")
    assert Run.read(settings.output, "läuft").config.cpus_per_worker == 3
    values = json.loads(file.read_text())
    del values["config"]["cpus_per_worker"]  # as an older version wrote it, with one core
    file.write_text(json.dumps(values))
    assert Run.read(settings.output, "läuft").config.cpus_per_worker == 1


def test_report_without_a_rank_list_shows_no_images(settings, fitted):
    run(settings.replace(evaluation__rank_list=False))
    report = Path(settings.output, "läuft", "report")
    assert {path.name for path in report.glob("*.png")} == {
        "curves.png",
        "factors.png",
        "thresholds.png",
    }


def test_resuming_a_run_without_checkpoints_starts_over_with_a_warning(settings, fitted):
    run(settings)
    for folder in Path(settings.output, "läuft").glob("checkpoint_*"):
        shutil.rmtree(folder)
    assert "läuft has no checkpoint: training starts at step 1" in run(settings, resume=True)
    assert len(fitted) == 2


def test_finished_run_is_extended(settings, fitted):
    run(settings)
    more = settings.replace(optimizer__epochs=2, optimizer__schedule="constant")
    with pytest.raises(ConfigError, match="other settings"):
        run(more, resume=True)
    constant = settings.replace(name="constant", optimizer__schedule="constant")
    run(constant)
    run(constant.replace(optimizer__epochs=2), resume=True)
    assert [config.total_epochs for config in fitted] == [1, 1, 2]
    assert "nothing to do" in run(constant.replace(optimizer__epochs=2), resume=True)


def test_run_resumes_on_the_version_that_it_began_on(settings, fitted, tiny_dataset, tmp_path):
    data, more = str(tmp_path / "data"), tmp_path / "more"
    shutil.copytree(tiny_dataset.url, data)
    settings = settings.replace(data=data, optimizer__schedule="constant")
    run(settings)
    added = Dataset.open(build_dataset(more, ("train",)))
    assert add(data, "csv", more / "table.csv", ids="new", jobs=1).images == len(added.whole)
    assert len(Dataset.open(data).identities) == 12
    run(settings.replace(optimizer__epochs=2), resume=True)
    assert len(fitted) == 2
    folder = Path(settings.output, "läuft")
    assert Run.read(settings.output, "läuft").manifest_digest == tiny_dataset.digest
    with newest_whole(str(folder)) as newest:
        assert newest.progress.epoch == 2
        assert newest.origin.manifest_digest == tiny_dataset.digest
        assert newest.origin.identities == 6


def test_name_is_free_until_mlflow_has_the_run(settings, fitted, monkeypatch):
    start = Tracker.start

    def away(*arguments, **options):
        raise StorageError("MLflow is away")

    monkeypatch.setattr(Tracker, "start", away)
    for _ in range(2):
        with pytest.raises(StorageError, match="MLflow is away"):
            run(settings)
    assert not list(Path(settings.output).rglob("*.json"))
    monkeypatch.setattr(Tracker, "start", start)
    run(settings)


def test_name_is_free_if_ray_does_not_start(settings, fitted, monkeypatch):
    def refuse(cpus: int) -> None:
        raise ReidError("Ray on this machine does not start")

    monkeypatch.setattr(job, "start_ray", refuse)
    with pytest.raises(ReidError, match="does not start"):
        run(settings)
    assert not list(Path(settings.output).rglob("*.json"))


def test_run_resumed_with_other_libraries_says_so(settings, fitted):
    run(settings)
    file = Path(settings.output, "läuft", "run.json")
    values = json.loads(file.read_text())
    assert "became" not in run(settings, resume=True)
    file.write_text(json.dumps(values | {"versions": values["versions"] | {"torch": "2.0.1"}}))
    assert f"torch 2.0.1 became {torch.__version__.split('+')[0]}" in run(settings, resume=True)
    file.write_text(json.dumps({name: values[name] for name in values if name != "versions"}))
    assert "nothing to do" in run(settings, resume=True)  # a run of an older version has none


def test_mlflow_file_that_was_moved_is_missed_and_not_made_again(settings, fitted, tmp_path):
    tracked = settings.replace(tracking__uri=local_tracking(tmp_path), tracking__model_name="off")
    run(tracked)
    (tmp_path / "mlflow.db").rename(tmp_path / "moved.db")
    with pytest.raises(StorageError, match=r"MLflow's file .*mlflow.db is not there any more"):
        run(tracked, resume=True)
    assert not (tmp_path / "mlflow.db").exists()
    moved = tracked.replace(tracking__uri=f"sqlite:///{tmp_path}/moved.db")
    run(moved, resume=True)
    assert len(fitted) == 1


def test_taken_name_is_refused_before_mlflow_is_called(settings, fitted, monkeypatch):
    run(settings)
    monkeypatch.setattr(Tracker, "start", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(ConfigError, match="continue it with --resume"):
        run(settings)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"batch__identities": 16},
            "16 people a batch, but the training split has 6: give --batch.identities 6 or fewer",
        ),
        (
            {"batch__images": 8, "batch__small_identities": "drop"},
            "4 people a batch, but the training split has 0 with 8 images or more: .* at least 2",
        ),
        (
            {"tracking__uri": "sqlite:///x.db", "tracking__model_name": "a/b:c"},
            "--tracking.model-name 'a/b:c': MLflow does not accept / : in",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_flag(settings, fitted, changes, expected):
    with pytest.raises(ReidError, match=expected):
        run(settings.replace(**changes))
    assert not Path(settings.output).exists()


def test_dataset_that_cannot_be_measured_is_refused(settings, fitted, monkeypatch):
    monkeypatch.setattr(Dataset, "why_not_measurable", lambda *_: "all images are of one camera")
    with pytest.raises(DataError, match="cannot be measured: all images are of one camera"):
        run(settings)
    assert not Path(settings.output).exists()


def test_dataset_without_query_and_gallery_is_not_measured(tmp_path):
    dataset = Dataset.open(build_dataset(tmp_path / "train-only", ("train",)))
    preflight.require_measurable(dataset)


# A validation split


@pytest.fixture
def validated(settings, tmp_path: Path) -> TrainConfig:
    """Settings with a dataset that has a validation split."""
    return settings.replace(data=build_dataset(tmp_path / "validated", validation=0.34))


def raises(kind: type[Exception]) -> None:
    raise kind("a worker was lost")


@pytest.fixture
def tested(monkeypatch, tmp_path) -> list[str]:
    """The checkpoints that were measured on test, in this process."""
    calls: list[str] = []

    def run_workers(config, dataset, run_id, *, board, test) -> None:
        calls.append(test)
        worker, _ = make_worker(dataset, tmp_path)
        ray_trainer._measure(config, dataset, worker, test)

    monkeypatch.setattr(final_test, "run_workers", run_workers)
    monkeypatch.setattr(final_test, "start_ray", lambda cpus: None)
    monkeypatch.setattr(final_test, "beside_driver", lambda _: SimpleNamespace(remote=object))
    monkeypatch.setattr(final_test, "watch", lambda *_: nullcontext())
    return calls


def test_validation_chooses_and_test_is_measured_once(validated, fitted, tested):
    printed = run(validated)
    folder = Path(validated.output, "läuft")
    summary = json.loads((folder / SUMMARY).read_text())
    assert summary["selected_on"] == "validation"
    assert tested == [summary["checkpoint"]]
    assert summary["test"]["mAP"] > 0
    assert "validation mAP" in printed
    assert "test mAP" in printed
    assert "chosen by mAP on validation, then measured once on test" in printed
    assert "mAP on the validation split" in (folder / "report/report.html").read_text()
    (folder / SUMMARY).unlink()
    run(validated, resume=True)
    assert json.loads((folder / SUMMARY).read_text()) == summary
    assert len(tested) == 1


def test_run_that_ended_before_its_test_is_only_measured(validated, fitted, tested, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(final_test, "run_workers", lambda *_, **__: raises(TrainingFailedError))
        with pytest.raises(ReidError, match=r"is trained, but .* was not measured on the test"):
            run(validated)
    assert "test mAP" in run(validated, resume=True)
    assert len(fitted) == len(tested) == 1


def test_papers_protocol_chooses_on_test(validated, fitted, tested):
    printed = run(validated.replace(evaluation__split="test"))
    assert "validation" not in printed
    assert tested == []


def test_run_keeps_the_split_that_it_was_measured_on(validated, fitted, tested):
    run(validated)
    with pytest.raises(ConfigError, match=r"resume it with --evaluation\.split validation"):
        run(validated.replace(evaluation__split="test"), resume=True)


def test_split_that_is_not_there_is_refused_before_the_name_is_taken(settings, fitted):
    with pytest.raises(ConfigError, match="has no validation split"):
        run(settings.replace(evaluation__split="validation"))
    assert not Path(settings.output).exists()
