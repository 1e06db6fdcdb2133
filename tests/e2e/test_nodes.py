"""Training over nodes that share nothing but S3."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes import Nodes, nodes

from cluster.local.s3_server import S3Server
from cluster.plan.command import Plan
from cluster.plan.estimate import count, download, plans
from data_shards.building.build import build
from data_shards.dataset import Dataset
from data_shards.storage import open_storage
from reid_train.runs.run_dir import Run
from reid_train.training.checkpoint import Checkpoint

pytestmark = pytest.mark.slow

DATA, OUTPUT = "s3://nodes/people", "s3://nodes/runs"
STEPS, EPOCHS = 3, 2
TINY = ["--recipe", "demo", "--image.height", "32", "--image.width", "16", "--data", DATA]
TINY += ["--batch.identities", "4", "--batch.images", "2", "--evaluation.every", "1"]
TINY += ["--batch.steps-per-epoch", str(STEPS), "--optimizer.epochs", str(EPOCHS)]
# A run with cosine rates could not be extended.
TINY += ["--optimizer.schedule", "step"]
CACHED = re.compile(r"RayTrainWorker pid=\d+(?:, ip=([\d.]+))?\).* cached (\S+) in")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    """Two nodes with two CPUs each, and an S3 server with a dataset, which all of them reach."""
    with (
        # Ray's sockets are in it, and their paths must be short.
        tempfile.TemporaryDirectory(prefix="n-") as temporary,
        nodes(Path(temporary)) as cluster,
        S3Server(cluster.folder / "s3", host=cluster.host) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        server.create_bucket("nodes")
        given = {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 32}
        given |= {
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "RAY_DEDUP_LOGS": "0",
            "RAY_worker_niceness": "0",
        }
        for name, value in (server.environment() | given).items():
            patch.setenv(name, value)
        options = {"identities": 12, "cameras": 2, "images_per_camera": 4}
        raw = cluster.folder / "raw"
        build("synthetic", raw, DATA, options=options, shard_bytes=50_000, jobs=1)
        cluster.start_head()
        patch.setenv("RAY_ADDRESS", cluster.address)
        for number in (1, 2):
            cluster.start_node(number)
        cluster.wait_for(3)
        yield cluster


def train(name: str, workers: int, *more: str) -> str:
    """Train, and return the output."""
    command = [sys.executable, "-m", "reid_train", "train", *TINY, "--output", OUTPUT]
    command += ["--name", name, "--workers", str(workers), "--tracking.uri", "off", *more]
    done = subprocess.run(
        command, env=os.environ, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def losses(name: str, folder: Path) -> list[float]:
    """Losses by step, from the run's last checkpoint."""
    storage = open_storage(f"{OUTPUT}/{name}")
    last = max(key.partition("/")[0] for key, _ in storage.list("checkpoint_") if "/" in key)
    for key, _ in storage.list(f"{last}/"):
        if not key.endswith("/"):
            storage.download(key, folder / key)
    return Checkpoint.open(folder / last).history().steps["loss/total"]


@pytest.fixture(scope="module")
def output(cluster: Nodes) -> str:
    """The output of a training of four workers on two nodes."""
    return train("both", 4)


def test_a_node_downloads_a_shard_at_most_once_and_no_other_than_planned(cluster, output):
    found = Counter(CACHED.findall(output))
    config = Run.read(OUTPUT, "both").config
    dataset = Dataset.open(DATA)
    plan = plans(config, dataset)
    options = Plan(config, gpus=4, gpu_type="cpu", gpus_per_node=2)
    evaluations = count(config, dataset, plan).evaluations
    assert sum(found.values()) == download(options, dataset, plan, evaluations).shards
    if cluster.separate:
        assert len({ip for ip, _ in found}) == 2
        assert set(found.values()) == {1}


def test_two_nodes_take_the_steps_that_one_worker_takes(output, tmp_path):
    train("single", 1)
    single, both = (losses(name, tmp_path / name) for name in ("single", "both"))
    assert len(both) == STEPS * EPOCHS
    assert both == pytest.approx(single, rel=1e-3)


def test_checkpoint_of_a_node_that_is_gone_is_continued_on_another(cluster, output, tmp_path):
    cluster.stop_node(1)
    cluster.wait_for(2)
    output = train("both", 2, "--resume", "--optimizer.epochs", str(EPOCHS + 1))
    assert f"in epoch {EPOCHS + 1}" in output
    assert len(losses("both", tmp_path)) == STEPS * (EPOCHS + 1)
