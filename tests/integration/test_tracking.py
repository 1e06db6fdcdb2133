"""What a run leaves in a real MLflow, and what is said of one that does not fit."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from data_shards.errors import ConfigError, StorageError
from reid_train.config import TrainConfig
from reid_train.tracking.server import connect, require_experiment
from reid_train.tracking.tracker import Tracker
from reid_train.tracking.uris import local_tracking


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tracking")


@pytest.fixture(scope="module")
def uri(folder: Path) -> str:
    """An MLflow whose database is there."""
    uri = local_tracking(folder)
    Tracker.start(uri, "reid", run_name="first").close()
    return uri


@pytest.fixture
def run(uri: str) -> Iterator[Tracker]:
    with Tracker.start(uri, "reid", run_name="tracked") as started:
        yield started


def test_resumed_run_has_each_step_once_in_mlflow(uri, run):
    for steps in (range(0, 5), range(3, 8)):
        with Tracker(uri, run.run_id, system_metrics=False) as tracker:
            for step in steps:
                tracker.log({"loss/total": float(step), "λ/min": 0.1}, step)
    history = MlflowClient(uri).get_metric_history(run.run_id, "loss/total")
    assert [(point.step, point.value) for point in history] == [(s, float(s)) for s in range(8)]


def test_run_keeps_parameters_tags_artifacts_and_system_metrics(
    uri, folder, run, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    (tmp_path / "curves.png").write_bytes(b"picture")
    run.log_parameters(TrainConfig(recipe="test").flat())
    run.set_tags({"manifest_digest": "m" * 64, "commit": None})
    run.log_artifacts(tmp_path, "report")
    client = MlflowClient(uri)
    with Tracker(uri, run.run_id, interval=0.05) as worker:
        worker.log({"loss/total": 1.0}, 0)
        for _ in range(100):
            if any(name.startswith("system/") for name in client.get_run(run.run_id).data.metrics):
                break
            worker._closing.wait(0.1)
    data = client.get_run(run.run_id).data
    assert data.params["model.backbone"] == "resnet50"
    assert data.tags["manifest_digest"] == "m" * 64
    assert any(name.startswith("system/cpu") for name in data.metrics)
    assert [item.path for item in client.list_artifacts(run.run_id, "report")] == [
        "report/curves.png"
    ]
    place = str(client.get_run(run.run_id).info.artifact_uri)
    assert place.startswith((folder / "artifacts").as_uri())


@pytest.mark.parametrize("revision", ["0000", "bd07f7e963c5"], ids=["newer", "older"])
def test_a_database_of_another_mlflow_is_named(uri, tmp_path, revision):
    source = Path(uri.removeprefix("sqlite:///"))
    with sqlite3.connect(source) as database, sqlite3.connect(tmp_path / "mlflow.db") as copy:
        database.backup(copy)
        copy.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    with pytest.raises(StorageError, match="mlflow db upgrade sqlite:///") as raised:
        require_experiment(local_tracking(tmp_path), "reid")
    assert "\n" not in str(raised.value)


def test_a_deleted_experiment_is_found_before_a_run_starts(uri):
    client = connect(uri)
    require_experiment(uri, "short-lived")
    client.delete_experiment(client.create_experiment("short-lived"))
    with pytest.raises(ConfigError, match=r"is deleted\. Restore it"):
        require_experiment(uri, "short-lived")
