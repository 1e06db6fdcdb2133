"""The run of a soak: a dataset behind a proxy, and the main command, given as often as it takes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from mlflow.entities import Metric
from proxy import S3Proxy
from soak_watch import Watch, alive, bytes_below

from cluster.local.s3_server import S3Server
from data_shards.building.build import build
from data_shards.dataset import Dataset
from data_shards.storage import open_storage
from reid_train.registry.load import SUMMARY
from reid_train.tracking.server import connect
from reid_train.tracking.uris import local_tracking
from reid_train.training.checkpoint import HISTORY, MODEL, SEAL, TRAINING
from reid_train.training.history import History

BUCKET = "soak"
DATA, OUTPUT = f"s3://{BUCKET}/people", f"s3://{BUCKET}/runs"
STEPS = 20
"""Optimizer steps of an epoch."""
PATIENCE = 480.0
"""Seconds until a run that makes no step is given up."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAY_worker_niceness": "0",  # or whatever else runs here goes first
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "240",
    "RAY_agent_register_timeout_ms": "300000",
}


@dataclass
class Place:
    """A dataset behind a proxy, and an MLflow, all in one folder."""

    folder: Path
    server: S3Server
    proxy: S3Proxy
    flags: list[str]
    room: int = 0
    """Bytes of the shard cache."""

    @property
    def tracking(self) -> str:
        return local_tracking(self.folder)

    def command(self, name: str, *more: str) -> list[str]:
        """What a user gives to train."""
        command = [sys.executable, "-m", "reid_train", "train", *self.flags, "--name", name]
        command += ["--data", DATA, "--output", OUTPUT, "--workers", "2", "--device", "cpu"]
        command += ["--loader.cache", str(self.cache(name)), "--tracking.uri", self.tracking]
        command += ["--loader.cache-bytes", str(self.room), "--tracking.model-name", "off"]
        command += ["--batch.steps-per-epoch", str(STEPS), "--tracking.every-steps", "5"]
        return [*command, "--checkpoint.max-failures", "-1", *more]

    def cache(self, name: str) -> Path:
        return self.folder / "cache" / name

    def stored(self, name: str) -> int:
        """Bytes of a run's folder, asked of the server itself and not of its proxy."""
        pages = self.server.client().get_paginator("list_objects_v2")
        listed = pages.paginate(Bucket=BUCKET, Prefix=f"runs/{name}/")
        return sum(item["Size"] for page in listed for item in page.get("Contents", ()))


@dataclass
class Run:
    """The main command, given as often as it takes."""

    place: Place
    name: str
    more: list[str]
    watch: Watch = field(init=False)
    pids: list[int] = field(default_factory=list)
    """Of all drivers, one after another."""

    def __post_init__(self) -> None:
        self._client = connect(self.place.tracking)
        self._tracked: str | None = None
        folders = self.place.cache(self.name), self.place.folder / "tmp"
        cache, temporary = folders
        self.watch = Watch(
            self.step,
            lambda: (bytes_below(cache), self.place.stored(self.name), bytes_below(temporary)),
        )

    @property
    def pid(self) -> int:
        return self.pids[-1]

    def log(self, number: int = -1) -> Path:
        """What a driver said."""
        return self.place.folder / f"{self.name}-{number % len(self.pids)}.log"

    def start(self, *more: str) -> None:
        """Give the command."""
        root = str(Path(__file__).parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | ENVIRONMENT
        # Ray's own folder stays where it is: the paths of its sockets must be short.
        environment |= {"PYTHONPATH": os.pathsep.join(paths), "RAY_TMPDIR": "/tmp"}
        environment["TMPDIR"] = str(self.place.folder / "tmp")
        environment.pop("RAY_ADDRESS", None)
        path = self.place.folder / f"{self.name}-{len(self.pids)}.log"
        with path.open("w") as file:
            self.process = subprocess.Popen(
                self.place.command(self.name, *self.more, *more),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        self.pids.append(self.process.pid)
        self.watch.follow(self.process.pid)

    def resume(self) -> None:
        self.start("--resume")

    def end(self) -> int:
        return self.process.wait(PATIENCE)

    def step(self) -> int:
        """The last step that MLflow has."""
        return max((point.step for point in self.tracked("loss/total")), default=0)

    def tracked(self, metric: str) -> list[Metric]:
        """What MLflow has of a metric."""
        if self._tracked is None:
            if (experiment := self._client.get_experiment_by_name("reid")) is None:
                return []
            where = f"attributes.run_name = '{self.name}'"
            if not (found := self._client.search_runs([experiment.experiment_id], where)):
                return []
            self._tracked = found[0].info.run_id
        return self._client.get_metric_history(self._tracked, metric)

    def workers(self) -> list[psutil.Process]:
        while self.process.poll() is None:
            if found := self.watch.workers():
                return found
            time.sleep(0.2)
        raise psutil.NoSuchProcess(self.pid, msg=f"no worker to kill: {self.said()}")

    def left(self) -> list[psutil.Process]:
        return self.watch.left(self.pid)

    def said(self, number: int = -1) -> str:
        """The last line of a driver."""
        return (self.log(number).read_text(errors="replace").strip().splitlines() or [""])[-1]

    def finish(self) -> None:
        """End what is left of the run, its own processes alone."""
        for process in [*self.watch.left(0), *self.watch.known.values()]:
            with contextlib.suppress(psutil.Error):
                if alive(process):
                    process.kill()

    def result(self) -> dict[str, object]:
        """All that the run came to, but for how fast it was: equal means bitwise equal."""
        stored = open_storage(OUTPUT).child(self.name)
        names = {key.partition("/")[0] for key, _ in stored.list("checkpoint_") if "/" in key}
        last = stored.child(max(names))
        seal = json.loads(last.read(SEAL))
        path = self.place.folder / f"{self.name}.safetensors"
        last.download(HISTORY, path)
        history = History.load(path)
        losses = {k: v for k, v in history.steps.items() if k != "images_per_second"}
        return {
            "weights": seal[MODEL],
            "θ and Adam's moments": seal[TRAINING],
            "losses": losses,
            "λ": [values.tobytes() for values in history.factors()],
            "evaluations": history.evaluations,
            "metrics": json.loads(stored.read(SUMMARY))["metrics"],
        }


@contextlib.contextmanager
def place(folder: Path, flags: list[str], **people: int) -> Iterator[Place]:
    """A dataset on an S3 server behind a proxy, and an environment that leads to it."""
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    before = dict(os.environ)
    with S3Server(folder / "s3") as server, S3Proxy(server.endpoint) as proxy:
        os.environ |= server.environment()
        os.environ["AWS_ENDPOINT_URL"] = os.environ["MLFLOW_S3_ENDPOINT_URL"] = proxy.endpoint
        try:
            server.create_bucket(BUCKET)
            build("synthetic", folder / "raw", DATA, options=people, shard_bytes=200_000, jobs=1)
            shards = Dataset.open(DATA).manifest.shards
            largest = sorted(shard.bytes for shard in shards)[-5:]
            whole = sum(shard.bytes for shard in shards)
            yield Place(folder, server, proxy, flags, max(int(0.45 * whole), sum(largest)))
        finally:
            os.environ.clear()
            os.environ.update(before)
