"""The main command as a user gives it: real Ray workers, a real S3 server, real MLflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest

from cluster.local.s3_server import S3Server
from data_shards.building.build import build
from data_shards.building.parallel import cores
from data_shards.storage import open_storage
from reid_train.registry.load import load
from reid_train.runs.init_from import read_kept
from reid_train.runs.run_dir import Run
from reid_train.tracking.server import connect
from reid_train.tracking.uris import local_tracking

BUCKET = "training"
OUTPUT = f"s3://{BUCKET}/runs"
TINY = ["--recipe", "demo", "--image.height", "32", "--image.width", "16"]
TINY += ["--batch.identities", "4", "--batch.images", "2", "--batch.steps-per-epoch", "3"]
TINY += ["--optimizer.epochs", "2", "--evaluation.every", "1"]
# A run with cosine rates could not be extended.
TINY += ["--optimizer.schedule", "step"]
TINY += ["--model.backbone", "timm:test_resnet"]


@pytest.fixture(scope="module")
def work(s3_server: S3Server, tmp_path_factory):
    """Two datasets on S3, MLflow in a folder, and a run named `first` of two epochs."""
    folder: Path = tmp_path_factory.mktemp("training")
    s3_server.create_bucket(BUCKET)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        patch.setenv("MLFLOW_TRACKING_URI", local_tracking(folder))
        for seed in (0, 1):
            options = {"identities": 8, "cameras": 2, "images_per_camera": 4, "seed": seed}
            build("synthetic", folder / "raw", f"s3://{BUCKET}/{seed}", options=options, jobs=1)
        done = train("first", cache=folder / "cache")
        assert done.returncode == 0, done.stderr[-2000:]
        yield folder, done.stdout


def train(
    name: str, *more: str, data: str = "0", workers: int = 2, cache: Path
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "reid_train", "train", *TINY, "--name", name]
    command += ["--workers", str(workers)]
    command += ["--data", f"s3://{BUCKET}/{data}", "--output", OUTPUT]
    command += ["--loader.cache", str(cache), *more]
    return subprocess.run(
        command, env=os.environ, capture_output=True, text=True, timeout=800, check=False
    )


def first_run():
    """MLflow's client and its run named `first`."""
    client = connect(os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("reid")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'first'")
    return client, run


def test_run_ends_with_a_report_on_s3_and_a_table(work):
    _, said = work
    assert "first: before and after training" in said
    storage = open_storage(f"{OUTPUT}/first/report")
    names = {key for key, _ in storage.list()}
    assert {"report.html", "rank_list.png", "curves.png", "factors.png", "summary.json"} <= names
    summary = json.loads(storage.read("summary.json"))
    assert 0 < summary["metrics"]["mAP"] <= 1
    assert summary["champion"]


def test_finished_run_on_s3_is_a_model(work):
    embedder = load(f"{OUTPUT}/first")
    assert embedder.config.name == "first"


def test_mlflow_has_parameters_steps_metrics_and_artifacts(work):
    client, run = first_run()
    assert run.info.status == "FINISHED"
    assert run.data.params["regularization.amplitude"] == "0.005"
    losses = client.get_metric_history(run.info.run_id, "loss/total")
    assert [point.step for point in losses] == [1, 2, 3, 4, 5, 6]
    assert len(client.get_metric_history(run.info.run_id, "mAP")) == 3
    assert {"factor/min", "factor/median", "factor/max"} <= run.data.metrics.keys()
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id, "report")}
    assert {"report/report.html", "report/factors.parquet"} <= artifacts


def test_registered_champion_gives_embeddings(work):
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    model = mlflow.pyfunc.load_model("models:/reid-synthetic@champion")
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 20, 3), np.uint8)
    embeddings = model.predict(images)
    assert embeddings.shape == (3, 96 + 96)
    assert np.isfinite(embeddings).all()


def test_a_name_is_taken_once(work):
    folder, _ = work
    again = train("first", cache=folder / "cache")
    assert again.returncode == 2
    assert "continue it with --resume" in again.stderr
    assert "Traceback" not in again.stderr


def test_resumed_run_trains_more_epochs_on_one_worker_and_counts_its_steps_on(work):
    folder, _ = work
    epochs = ["--optimizer.epochs", "3"]
    more = train("first", "--resume", *epochs, workers=1, cache=folder / "cache")
    assert more.returncode == 0, more.stderr[-2000:]
    client, run = first_run()
    losses = client.get_metric_history(run.info.run_id, "loss/total")
    assert [point.step for point in losses] == list(range(1, 10))


def test_workers_share_the_cores_and_the_run_records_how(work):
    # After the test above, which resumed it on one worker.
    assert first_run()[1].data.params["cpus_per_worker"] == str(max(1, cores() // 2))
    assert Run.read(OUTPUT, "first").config.cpus_per_worker == cores()


def test_a_run_on_other_people_starts_from_a_registered_model(work):
    folder, _ = work
    source, more = "models:/reid-synthetic@champion", ["--optimizer.epochs", "1"]
    more += ["--init-from", source, "--model.weights", "none", "--tracking.model-name", "off"]
    tuned = train("tuned", *more, data="1", workers=1, cache=folder / "cache")
    assert tuned.returncode == 0, tuned.stderr[-2000:]
    config = Run.read(OUTPUT, "tuned").config
    assert config.init_from == source
    kept = read_kept(f"{OUTPUT}/tuned", config.init_digest)
    first = load(source).network.state_dict()
    assert all(value.equal(first[name]) for name, value in kept.weights.items())


def test_run_is_not_resumed_on_another_dataset(work):
    folder, _ = work
    other = train("first", "--resume", data="1", cache=folder / "cache")
    assert other.returncode == 3
    assert "give it that dataset, or start a new run" in other.stderr
