"""Whole trainings on real Ray whose S3 server fails on the way."""

from __future__ import annotations

import contextlib
import io
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray
import small_network
import torch
from proxy import (
    Request,
    S3Proxy,
    flip_answer,
    flip_request,
    lose_answer,
    refuse,
    reset,
    truncate,
)
from rich.console import Console
from safetensors.torch import load_file
from torchvision.models import resnet

from cluster.local.s3_server import S3Server
from data_shards.building.build import build
from data_shards.errors import StorageError
from data_shards.storage import Storage, open_storage
from reid_train.recipes import recipe
from reid_train.runs.job import run
from reid_train.tracking.server import connect
from reid_train.tracking.uris import local_tracking
from reid_train.training.checkpoint import MODEL, TRAINING, Checkpoint

pytestmark = pytest.mark.slow

BUCKET = "faults"
SMALL = recipe("demo").replace(
    workers=1,
    image__height=32,
    image__width=32,
    batch__identities=4,
    batch__images=2,
    batch__steps_per_epoch=3,
    optimizer__epochs=2,
    evaluation__initial=False,
    evaluation__every=1,
    loader__workers=1,
    data=f"s3://{BUCKET}/people",
    output=f"s3://{BUCKET}/runs",
)
RAY_ON_A_BUSY_MACHINE = {
    "OMP_NUM_THREADS": "1",
    "RAY_worker_niceness": "0",  # or whatever else runs here goes first
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "240",
}
CANARIES = {
    "MLFLOW_TRACKING_PASSWORD": "canary-mlflow-4f1c",
    "WANDB_API_KEY": "canary-key-77aa",
    "DATABASE_PASSWORD": "canary-database-0b9e",
}


def go_down(request: Request, *, proxy: S3Proxy, seconds: float) -> None:
    """Reset this connection and refuse all others for a while."""

    def outage() -> None:
        with proxy.down():
            time.sleep(seconds)

    threading.Thread(target=outage).start()
    request.hang_up()


@dataclass
class Place:
    """A bucket behind a proxy, an MLflow whose artifacts are in it, and Ray."""

    proxy: S3Proxy
    folder: Path
    secret: str

    def train(self, name: str, *, resume: bool = False, **changes: object) -> str:
        """Train, in this process and its Ray; returns what was shown."""
        shown = io.StringIO()
        config = SMALL.replace(
            name=name,
            tracking__uri=local_tracking(self.folder),
            loader__cache=self.folder / "cache" / name,
            **changes,
        )
        run(config, resume=resume, console=Console(file=shown, width=200))
        return shown.getvalue()

    def stored(self, name: str) -> Storage:
        """What is stored of a run."""
        return open_storage(SMALL.output).child(name)

    def checkpoints(self, name: str) -> list[str]:
        """Folders of a run's checkpoints, the oldest first."""
        keys = (key for key, _ in self.stored(name).list("checkpoint_") if "/" in key)
        return sorted({key.partition("/")[0] for key in keys})

    def tensors(self, name: str) -> dict:
        """Weights, θ and moments of a run's last checkpoint."""
        last = self.stored(name).child(self.checkpoints(name)[-1])
        tensors = {}
        for file in (MODEL, TRAINING):
            last.download(file, self.folder / file)
            tensors |= load_file(self.folder / file)
        return tensors

    def opened(self, name: str, checkpoint: str) -> Checkpoint:
        """One of a run's checkpoints; raises if it is not whole."""
        folder = self.folder / "opened" / checkpoint
        for key, _ in self.stored(name).child(checkpoint).list():
            self.stored(name).child(checkpoint).download(key, folder / key)
        return Checkpoint.open(folder)

    def ray_logs(self) -> str:
        """All that Ray's processes wrote."""
        session = Path(ray._private.worker._global_node.get_session_dir_path())  # type: ignore
        files = [path for path in (session / "logs").rglob("*") if path.is_file()]
        return "\n".join(path.read_text(errors="replace") for path in files)


@pytest.fixture(scope="module")
def place(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("faults")
    with S3Proxy(s3_server.endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        environment = s3_server.environment() | CANARIES | RAY_ON_A_BUSY_MACHINE
        for name in ("AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL"):
            environment[name] = proxy.endpoint
        for name, value in environment.items():
            patch.setenv(name, value)
        here = str(Path(__file__).parent)
        patch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
        patch.setattr(resnet, "resnet18", resnet.resnet18)
        small_network.install()
        s3_server.create_bucket(BUCKET)
        options = {"identities": 8, "cameras": 2, "images_per_camera": 4}
        build("synthetic", folder / "raw", SMALL.data, options=options, shard_bytes=60_000, jobs=1)
        client = connect(local_tracking(folder))
        client.create_experiment("reid", artifact_location=f"s3://{BUCKET}/mlflow")
        ray.init(
            address="local",
            num_cpus=3,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"worker_process_setup_hook": "small_network.install"},
        )
        try:
            yield Place(proxy, folder, s3_server.environment()["AWS_SECRET_ACCESS_KEY"])
        finally:
            ray.shutdown()


@pytest.fixture(autouse=True)
def well_behaved(place: Place) -> Iterator[None]:
    place.proxy.clear()
    yield
    place.proxy.clear()


@dataclass
class Quiet:
    """A run of two epochs that nothing happened to."""

    shown: str
    tensors: dict[str, torch.Tensor]
    titles: bytes
    """Command lines of all processes below this one, seen while it ran."""


@pytest.fixture(scope="module")
def quiet(place: Place) -> Quiet:
    place.proxy.clear()
    titles, ended = set[bytes](), threading.Event()

    def watch() -> None:
        while not ended.wait(0.3):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(OSError):
                    titles.add(Path(f"/proc/{process.pid}/cmdline").read_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        shown = place.train("quiet")
    finally:
        ended.set()
        watcher.join()
    return Quiet(shown, place.tensors("quiet"), b"\n".join(titles))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_no_secret_is_in_anything_that_was_written(place, quiet):
    bucket = open_storage(f"s3://{BUCKET}")
    session = Path(ray._private.worker._global_node.get_session_dir_path())  # type: ignore
    written = {
        "the bucket": (bucket.read(key) for key, _ in bucket.list()),
        "MLflow's database": [(place.folder / "mlflow.db").read_bytes()],
        "Ray's session": (path.read_bytes() for path in session.rglob("*") if path.is_file()),
        "process titles": [quiet.titles],
        "the terminal": [quiet.shown.encode()],
    }
    known = {"process titles": b"RayTrainWorker", "Ray's session": b"worker"}
    secrets = [place.secret, *CANARIES.values()]
    for where, contents in written.items():
        everything = b"\n".join(contents)
        assert known.get(where, b"quiet") in everything, f"{where} was not searched"
        for secret in secrets:
            assert secret.encode() not in everything, f"a secret is in {where}"


def test_run_on_a_failing_server_ends_with_the_same_bytes(place, quiet):
    add, checkpoint = place.proxy.add, r"runs/failing/checkpoint_[^/]*/"
    faults = [
        add(truncate, method="GET", path="people/index.parquet", after=100),
        add(refuse, method="GET", path=r"people/shards/train", status=503, code="SlowDown"),
        add(reset, method="GET", path=r"people/shards/train", skip=1, after=20_000),
        add(flip_answer, method="GET", path=r"people/shards/", skip=3),
        add(refuse, method="PUT", path="runs/failing/run.json", status=500, code="InternalError"),
        add(refuse, method="PUT", path=checkpoint + "model", status=503, code="SlowDown", times=2),
        add(reset, method="PUT", path=checkpoint + "training"),
        add(flip_request, method="PUT", path=checkpoint + "history"),
        add(lose_answer, method="PUT", path=checkpoint + "checkpoint.json"),
        add(reset, method="PUT", path="runs/failing/report/report.html"),
        add(refuse, method="PUT", path="/mlflow/", status=503, code="SlowDown", times=2),
    ]
    outage = add(go_down, method="PUT", path=checkpoint + "rank_list", proxy=place.proxy, seconds=5)
    place.train("failing")
    assert [fault.hits for fault in faults] == [fault.times for fault in faults]
    assert outage.hits == 1
    assert same(place.tensors("failing"), quiet.tensors)
    for name in place.checkpoints("failing"):
        place.opened("failing", name)
    summary = json.loads(place.stored("failing").read("report/summary.json"))
    assert summary["model"], "it is registered"


def test_refused_write_stops_the_run_and_it_resumes_when_allowed(place, quiet):
    path = r"runs/denied/checkpoint_[^/]*/model"
    denied = place.proxy.add(
        refuse, method="PUT", path=path, skip=1, times=None, status=403, code="AccessDenied"
    )
    with pytest.raises(StorageError, match=r"denies access to s3://faults/runs/denied/checkpoint_"):
        place.train("denied")
    assert denied.hits == 1, "what is refused is not asked again"
    place.opened("denied", place.checkpoints("denied")[0])
    place.proxy.clear()
    place.train("denied", resume=True)
    assert same(place.tensors("denied"), quiet.tensors)
    for name in place.checkpoints("denied"):
        place.opened("denied", name)


def test_torn_newest_checkpoint_is_passed_over_for_the_one_before(place, quiet):
    before, newest = place.checkpoints("quiet")
    assert place.opened("quiet", before).progress.global_step == 3
    stored = place.stored("quiet")
    whole = stored.read(f"{newest}/{MODEL}")
    stored.write(f"{newest}/{MODEL}", whole[: len(whole) // 2])
    place.train("quiet", resume=True, workers=2)
    logs = place.ray_logs()
    assert f"passing over {newest}, which is damaged" in logs
    last = place.opened("quiet", place.checkpoints("quiet")[-1])
    assert last.progress.global_step == 6
