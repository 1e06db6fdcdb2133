"""The main command on real Ray, a real S3 server and a real MLflow, as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import psutil
import pytest

import reid_train.cli
from cluster.s3 import S3Server
from data_shards.build import build
from data_shards.dataset import Dataset
from data_shards.storage import Storage, open_storage
from reid_train.checkpoint import Checkpoint
from reid_train.tracking import connect, local_tracking

EPOCHS, STEPS = 4, 6
SMALL = [
    "--workers", "2", "--batch.identities", "4", "--batch.images", "2",
    "--batch.steps-per-epoch", str(STEPS), "--image.height", "64", "--image.width", "32",
    "--optimizer.epochs", str(EPOCHS), "--evaluation.every", "2", "--evaluation.batch", "16",
    "--checkpoint.every-steps", "2", "--tracking.every-steps", "2",
]  # fmt: skip
PATIENCE = 240.0  # seconds; on a busy machine Ray alone takes a minute to start


@dataclass
class Place:
    """A bucket with a dataset, and an MLflow."""

    folder: Path
    data: str
    output: str
    tracking: str

    def command(self, *arguments: str) -> list[str]:
        """`train` into this place."""
        command = [sys.executable, "-m", "reid_train", "train", "--output", self.output]
        return [*command, *arguments]

    def new(self, name: str, *arguments: str) -> list[str]:
        """`train` a small run of that name."""
        given = ["--recipe", "demo", "--data", self.data, "--name", name]
        given += ["--tracking.uri", self.tracking, "--loader.cache", str(self.folder / "cache")]
        return self.command(*given, *SMALL, *arguments)

    def run_folder(self, name: str) -> Storage:
        """What is stored of a run."""
        return open_storage(self.output).child(name)

    def checkpoints(self, name: str) -> set[str]:
        """Folders of a run's checkpoints."""
        keys = [key for key, _ in self.run_folder(name).list("checkpoint_")]
        return {key.partition("/")[0] for key in keys if "/" in key}

    def metric(self, name: str, metric: str) -> dict[int, float]:
        """A metric's values by step, of a run in MLflow; fails if a step is there twice."""
        client = connect(self.tracking)
        run = json.loads(self.run_folder(name).read("run.json"))["mlflow_run_id"]
        history = client.get_metric_history(run, metric)
        values = {point.step: point.value for point in history}
        assert len(values) == len(history), metric
        return values


@pytest.fixture(scope="module")
def place(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("training")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        patch.setenv("OMP_NUM_THREADS", "1")
        s3_server.create_bucket("training")
        place = Place(folder, "s3://training/people", "s3://training/runs", local_tracking(folder))
        options = {"identities": 16, "cameras": 3, "images_per_camera": 3}
        people = folder / "people"
        build("synthetic", people, place.data, options=options, shard_bytes=200_000, jobs=1)
        yield place


def start(command: list[str], log: Path) -> subprocess.Popen:
    with log.open("w") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, cwd=log.parent
        )


def finish(process: subprocess.Popen, log: Path) -> tuple[int, str]:
    try:
        return process.wait(PATIENCE), log.read_text()
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"not done in {PATIENCE} s:\n{log.read_text()}")


def wait_for(condition: Callable[[], object], process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def ray_workers(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes that train, below a driver."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if child.cmdline()[:1] == ["ray::RayTrainWorker"]:
                found.append(child)
        except psutil.Error:
            continue
    return found


@dataclass
class Ended:
    """A run that has ended: what it said, and what it came to."""

    name: str
    code: int
    said: str


@pytest.fixture(scope="module")
def survivor(place: Place) -> Ended:
    """A run whose second worker is killed on the way."""
    log = place.folder / "survivor.log"
    process = start(place.new("survivor"), log)
    snapshot = "checkpoint_manager_snapshot.json"
    wait_for(lambda: place.run_folder("survivor").exists(snapshot), process, log)
    ray_workers(process)[-1].kill()
    return Ended("survivor", *finish(process, log))


def test_killed_worker_is_replaced_and_the_run_ends(survivor):
    assert survivor.code == 0, survivor.said
    assert "continuing at epoch" in survivor.said


def test_every_step_is_tracked_once_though_some_were_taken_twice(place, survivor):
    steps = set(range(1, EPOCHS * STEPS + 1))
    for name in ("loss/total", "loss/cross_entropy", "loss/triplet", "loss/penalty"):
        assert place.metric("survivor", name).keys() == steps, name
    losses = [place.metric("survivor", f"loss/{part}") for part in ("cross_entropy", "triplet")]
    penalty, total = (place.metric("survivor", f"loss/{part}") for part in ("penalty", "total"))
    for step in steps:
        assert total[step] == pytest.approx(losses[0][step] + losses[1][step] + penalty[step])
    assert place.metric("survivor", "learning_rate").keys() == steps
    assert place.metric("survivor", "mAP").keys() == {0, 2 * STEPS, 4 * STEPS}
    assert max(place.metric("survivor", "factor/median").values()) <= 0.0025


def test_table_and_places_are_shown(place, survivor):
    for part in ("mAP", "rank-1", "mINP", "images/s", "untrained: mAP", "now the champion"):
        assert part in survivor.said, part
    assert f"{place.output}/survivor/report/report.html" in survivor.said
    assert f"mlflow ui --backend-store-uri {place.tracking}" in survivor.said


def test_report_is_stored_and_tracked(place, survivor):
    names = ("report.html", "summary.json", "curves.png", "rank_list.png", "factors.png")
    folder = place.run_folder("survivor")
    stored = {key.removeprefix("report/"): size for key, size in folder.list("report/")}
    assert stored.keys() == {*names, "factors.parquet"}
    assert min(stored.values()) > 200
    run = json.loads(folder.read("run.json"))["mlflow_run_id"]
    tracked = {
        Path(item.path).name for item in connect(place.tracking).list_artifacts(run, "report")
    }
    assert tracked == stored.keys()


def test_tracked_run_says_what_it_was(place, survivor):
    run_id = json.loads(place.run_folder("survivor").read("run.json"))["mlflow_run_id"]
    run = connect(place.tracking).get_run(run_id)
    manifest = Dataset.open(place.data).manifest
    assert run.info.status == "FINISHED"
    assert run.data.params["regularization.mode"] == "adaptive"
    assert run.data.params["batch.identities"] == "4"
    assert run.data.tags["manifest_digest"] == manifest.digest
    assert run.data.tags["evaluation_digest"] == manifest.evaluation_digest
    assert not [name for name in run.data.params if "secret" in name.lower()]


def test_best_and_last_checkpoint_are_kept_and_no_other(place, survivor, tmp_path):
    names = sorted(place.checkpoints("survivor"))
    summary = json.loads(place.run_folder("survivor").read("report/summary.json"))
    opened = []
    for name in names:
        storage = place.run_folder("survivor").child(name)
        for key, _ in storage.list():
            if not key.endswith("/") and key:
                storage.download(key, tmp_path / name / key)
        opened.append(Checkpoint.open(tmp_path / name))
    assert 1 <= len(opened) <= 2
    assert opened[-1].progress.global_step == EPOCHS * STEPS
    curve = place.metric("survivor", "mAP")
    assert summary["metrics"]["mAP"] == max(curve[2 * STEPS], curve[4 * STEPS])
    assert summary["before"]["mAP"] == curve[0]
    assert summary["metrics"]["mAP"] in [curve[c.progress.global_step] for c in opened]


def test_registered_model_embeds_images(place, survivor, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.tracking)
    mlflow.set_tracking_uri(place.tracking)
    model = mlflow.pyfunc.load_model("models:/reid-synthetic@champion")
    images = np.random.default_rng(0).integers(0, 256, (3, 128, 64, 3), np.uint8)
    embeddings = model.predict(images)
    assert embeddings.shape == (3, 512 + 2 * 256)
    assert embeddings.dtype == np.float32
    assert len(np.unique(embeddings, axis=0)) == 3


def test_models_lists_what_was_registered(place, survivor, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["reid_train", "models", "--tracking-uri", place.tracking]
    monkeypatch.setattr(sys, "argv", arguments)
    assert reid_train.cli.main() == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "reid-synthetic" in line)
    assert "champion" in line
    assert Dataset.open(place.data).manifest.digest[:12] in line


def test_second_run_of_that_name_is_refused(place, survivor, capsys, monkeypatch):
    before = place.run_folder("survivor").read("run.json")
    monkeypatch.setattr(sys, "argv", place.new("survivor")[2:])
    assert reid_train.cli.main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "run survivor exists in s3://training/runs: continue it with --resume" in error
    assert place.run_folder("survivor").read("run.json") == before


@pytest.mark.parametrize(
    ("change", "code", "expected"),
    [
        (["--data", "s3://training/others"], 3, "was trained on the dataset with manifest"),
        (["--optimizer.learning-rate", "0.1"], 2, "other settings of optimizer.learning_rate"),
    ],
    ids=["dataset", "setting"],
)
def test_run_is_not_resumed_as_another(
    place, survivor, tmp_path, capsys, monkeypatch, change, code, expected
):
    options = {"identities": 16, "cameras": 3, "images_per_camera": 3, "seed": 1}
    build("synthetic", tmp_path, "s3://training/others", options=options, jobs=1)
    before = place.checkpoints("survivor")
    command = place.command("--resume", "--name", "survivor", *change)
    monkeypatch.setattr(sys, "argv", command[2:])
    assert reid_train.cli.main() == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert expected in error
    assert place.checkpoints("survivor") == before


@pytest.fixture(scope="module")
def resumed(place: Place) -> tuple[list[psutil.Process], Ended]:
    """A run whose driver and everything below it is killed, and which is then resumed."""
    log = place.folder / "resumed.log"
    process = start(place.new("resumed"), log)
    wait_for(lambda: len(place.checkpoints("resumed")) >= 2, process, log)
    below = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(below, timeout=30)
    process = start(place.command("--resume", "--name", "resumed"), log)
    return alive, Ended("resumed", *finish(process, log))


def test_killed_driver_takes_its_cluster_along(resumed):
    alive, _ = resumed
    assert alive == []


def test_killed_run_is_resumed_and_ends(place, resumed):
    _, run = resumed
    assert run.code == 0, run.said
    assert "continuing at epoch" in run.said
    assert place.metric("resumed", "mAP").keys() == {0, 2 * STEPS, 4 * STEPS}
    assert place.metric("resumed", "loss/total").keys() == set(range(1, EPOCHS * STEPS + 1))


def test_resumed_run_comes_to_what_an_uninterrupted_one_does(place, survivor, resumed):
    losses = [place.metric(name, "loss/total") for name in ("survivor", "resumed")]
    for step, loss in losses[0].items():
        assert losses[1][step] == pytest.approx(loss, rel=1e-3), step


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
    shutil.rmtree(folder)


def test_full_disk_in_the_cache_ends_the_run_at_once_in_one_line(place, tiny_disk, tmp_path):
    command = place.new("full", "--loader.cache", str(tiny_disk), "--tracking.uri", "off")
    log = tmp_path / "full.log"
    code, said = finish(start(command, log), log)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 4, said
    assert len(errors) == 1
    assert "disk full" in errors[0]
    assert str(tiny_disk) in errors[0]
    assert "Traceback" not in said
    assert "continuing" not in said
