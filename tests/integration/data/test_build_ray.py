"""Building on a Ray cluster of two nodes: the bytes of a local build, whatever dies meanwhile."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import ray
from ray.cluster_utils import Cluster as Nodes

from cluster.local.s3_server import S3Server
from data_shards.building import on_ray
from data_shards.building.build import build
from data_shards.building.on_ray import ray_results
from data_shards.building.parallel import Cluster
from data_shards.errors import ConfigError, DataError
from data_shards.sources.synthetic import render as synthetic
from data_shards.storage import LocalStorage, open_storage

OPTIONS = {"identities": 12, "cameras": 2, "images_per_camera": 3}
SETTINGS = {"name": "people", "shard_bytes": 40_000}


@pytest.fixture(scope="module")
def nodes(s3_server: S3Server) -> Iterator[Nodes]:
    """A cluster of two nodes with a CPU each, whose workers can reach S3."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        patch.setenv("RAY_ADDRESS", "")
        nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1})
        nodes.add_node(num_cpus=1)
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # they lack this module
        yield nodes
        ray.shutdown()
        nodes.shutdown()


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server, nodes: Nodes, tmp_path_factory) -> str:
    """Drawn people in a bucket, with their CSV file."""
    root = tmp_path_factory.mktemp("people")
    folder = synthetic.read(root, **OPTIONS)[0].path.parent
    s3_server.create_bucket("on-ray")
    storage = open_storage("s3://on-ray/raw")
    for key, _ in LocalStorage(folder).list():
        storage.write(key, (folder / key).read_bytes())
    build("csv", folder / "people.csv", "s3://on-ray/local", jobs=1, **SETTINGS)
    return "s3://on-ray"


def contents(url: str) -> dict[str, bytes]:
    storage = open_storage(url)
    return {key: storage.read(key) for key, _ in storage.list()}


def test_cluster_writes_the_bytes_of_a_local_build(bucket, nodes):
    where = {"address": nodes.address, "jobs": 2}
    manifest = build(
        "csv", f"{bucket}/raw/people.csv", f"{bucket}/ray", **SETTINGS, **where
    ).manifest
    assert len(manifest.shards) >= 4
    assert contents(f"{bucket}/ray") == contents(f"{bucket}/local")


def modified(below: str) -> dict[str, object]:
    pages = boto3.session.Session().client("s3").list_objects_v2(Bucket="on-ray", Prefix=below)
    return {entry["Key"]: entry["LastModified"] for entry in pages.get("Contents", ())}


def test_build_whose_driver_is_killed_continues(bucket, nodes):
    url = f"{bucket}/killed"
    command = [sys.executable, "-m", "data_shards", "build", "--source", "csv", "--out", url]
    command += ["--root", f"{bucket}/raw/people.csv", "--workers", "1", "--address", nodes.address]
    command += [f"--{key.replace('_', '-')}={value}" for key, value in SETTINGS.items()]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    storage, deadline = open_storage(url), time.monotonic() + 240
    while not storage.exists("build/train-000000.tar.json"):
        assert process.poll() is None, "the build ended before it could be killed"
        assert time.monotonic() < deadline
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not storage.exists("manifest.json")
    noted = [key for key, _ in storage.list("build/") if key.endswith("tar.json")]
    shards = [f"killed/shards/{Path(key).name.removesuffix('.json')}" for key in noted]
    before = modified("killed/shards/")
    where = {"address": nodes.address, "jobs": 2}
    build("csv", f"{bucket}/raw/people.csv", url, **SETTINGS, **where)
    after = modified("killed/shards/")
    assert {key: after[key] for key in shards} == {key: before[key] for key in shards}
    assert contents(url) == contents(f"{bucket}/local")


def results(function, items, nodes: Nodes, shared: tuple[Path, ...] = ()) -> list:
    return list(ray_results(function, items, 2, Cluster(nodes.address, shared)))


def die_once(folder: Path, number: int) -> int:
    mark = folder / str(number)
    if number % 3 == 0 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def test_killed_workers_are_replaced(nodes, tmp_path):
    square = functools.partial(die_once, tmp_path)
    assert results(square, range(6), nodes) == [0, 1, 4, 9, 16, 25]


def hang_once(folder: Path, number: int) -> int:
    mark = folder / str(number)
    if number == 1 and not mark.exists():
        mark.touch()
        time.sleep(600)
    return -number


def test_straggler_is_started_once_more(nodes, tmp_path, monkeypatch):
    monkeypatch.setattr(on_ray, "LEAST_SECONDS", 1.0)
    hang = functools.partial(hang_once, tmp_path)
    assert results(hang, range(4), nodes) == [0, -1, -2, -3]


def refuse(number: int) -> int:
    raise DataError(f"image {number} is damaged")


def test_error_of_a_task_is_one_line(nodes):
    with pytest.raises(DataError, match=r"^image 0 is damaged$"):
        results(refuse, [0], nodes)


def test_node_without_the_local_folder_is_named(nodes, tmp_path):
    with pytest.raises(ConfigError, match=rf"node \S+ has no {tmp_path}/gone: give an s3:// URL"):
        results(abs, [1], nodes, (tmp_path / "gone",))


def wait_a_little(number: int) -> int:
    time.sleep(0.5)
    return number


def test_tasks_of_a_lost_node_are_done_on_another(nodes):
    lost = nodes.add_node(num_cpus=2)
    found = ray_results(wait_a_little, range(10), 4, Cluster(nodes.address))
    assert next(found) == 0
    nodes.remove_node(lost, allow_graceful=False)
    assert list(found) == list(range(1, 10))
