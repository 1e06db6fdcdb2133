"""Every place that reads or writes, with a real S3 server that fails on the way.

Each fault is caused by a proxy on the request itself. What passes by itself ends with the same
bytes; what does not is one line, the right exit code, and nothing half-written taken for whole.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from proxy import (
    Request,
    S3Proxy,
    flip_answer,
    flip_request,
    lose_answer,
    refuse,
    reset,
    stall,
    trickle,
    truncate,
)

import data_shards.cli
from cluster.local.s3_server import S3Server
from data_shards.building.build import build
from data_shards.cache import ShardCache
from data_shards.dataset import Dataset
from data_shards.errors import DataError, ObjectMissing, StorageError
from data_shards.sources.synthetic import render as synthetic
from data_shards.storage import open_storage, retry, s3
from data_shards.storage.atomic import file_sha256
from reid_train.recipes import recipe
from reid_train.runs.checkpoint_store import download, upload
from reid_train.runs.run_dir import Run, write
from reid_train.training.checkpoint import FILES, SEAL

BUCKET = "places"
DATA = f"s3://{BUCKET}/people"
RUNS = f"s3://{BUCKET}/runs"
SAVED = f"{RUNS}/saved/checkpoint_000001"
OPTIONS = {"identities": 8, "cameras": 2, "images_per_camera": 2}
CONFIG = recipe("demo").replace(data=DATA, output=RUNS, name="saved")


def build_at(url: str, root: Path) -> None:
    build("synthetic", root, url, options=OPTIONS, shard_bytes=60_000, jobs=1)


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[S3Proxy]:
    with S3Proxy(s3_server.endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        patch.setattr(s3, "READ_SECONDS", 3.0)
        patch.setattr(retry, "PAUSE", 0.01)
        patch.setattr(retry, "PAUSE_MOST", 0.3)
        s3_server.create_bucket(BUCKET)
        yield proxy


@pytest.fixture(autouse=True)
def well_behaved(proxy: S3Proxy) -> Iterator[None]:
    proxy.clear()
    yield
    proxy.clear()


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("people")
    synthetic.read(root, **OPTIONS)
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint's files; only their digests matter to a copy."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for name in FILES:
        (folder / name).write_bytes(os.urandom(50_000))
    (folder / SEAL).write_text(json.dumps({name: file_sha256(folder / name) for name in FILES}))
    return folder


@pytest.fixture(scope="module")
def there(proxy: S3Proxy, people: Path, checkpoint: Path) -> Dataset:
    """A dataset, a run and a checkpoint on S3, written when nothing failed."""
    build_at(DATA, people)
    dataset = Dataset.open(DATA)
    write(Run(CONFIG, dataset.manifest.digest, None), new=True)
    upload(f"{RUNS}/saved", checkpoint, "checkpoint_000001")
    return dataset


def contents(url: str) -> dict[str, bytes]:
    storage = open_storage(url)
    return {key: storage.read(key) for key, _ in storage.list()}


def go_down(request: Request, *, proxy: S3Proxy, seconds: float) -> None:
    def outage() -> None:
        with proxy.down():
            time.sleep(seconds)

    threading.Thread(target=outage).start()
    request.hang_up()


BUSY = {
    "500": partial(refuse, status=500, code="InternalError"),
    "503 SlowDown": partial(refuse, status=503, code="SlowDown"),
}
READING: dict[str, Callable[..., None]] = BUSY | {
    "connection reset": partial(reset, after=0),
    "connection reset within the body": partial(reset, after=200),
    "truncated body": partial(truncate, after=200),
    "stall": partial(stall, after=200, seconds=6.0),
    "slow link": partial(trickle, pieces=8, pause=0.1),
}
WRITING: dict[str, Callable[..., None]] = BUSY | {
    "connection reset": partial(reset, after=0),
    "answer lost": lose_answer,
    "flipped bytes": flip_request,
    "slow link": partial(trickle, pieces=1, pause=0.5),
}
READ = ("people/manifest.json", "people/index.parquet", "people/shards/train-000000.tar")
READ += ("saved/run.json", "saved/checkpoint_000001/model")


def read_all(folder: Path) -> tuple[Dataset, ShardCache]:
    """Read a dataset, its shards, a run's note and a checkpoint, each as the project does."""
    dataset = Dataset.open(DATA)
    cache = ShardCache(dataset.storage, folder / "cache", 10**9)
    for shard in dataset.manifest.shards:
        cache.path(shard)
    assert Run.read(RUNS, "saved").config == CONFIG
    download(SAVED, folder / "checkpoint")
    return dataset, cache


def assert_same(there: Dataset, checkpoint: Path, read: tuple[Dataset, ShardCache], folder: Path):
    dataset, cache = read
    assert dataset.manifest == there.manifest
    for shard in dataset.manifest.shards:
        assert file_sha256(cache.path(shard)) == shard.sha256
    for name in (*FILES, SEAL):
        assert (folder / "checkpoint" / name).read_bytes() == (checkpoint / name).read_bytes()


@pytest.mark.parametrize("fault", READING)
def test_reading_survives_transient_faults(proxy, there, checkpoint, tmp_path, fault, caplog):
    faults = [proxy.add(READING[fault], method="GET", path=path) for path in READ]
    assert_same(there, checkpoint, read_all(tmp_path), tmp_path)
    assert [f.hits for f in faults] == [1] * len(READ)
    if fault != "slow link":
        assert caplog.text.count("trying again in") >= len(READ)


def test_reading_survives_a_server_that_was_away_for_a_while(
    proxy, there, checkpoint, tmp_path, caplog
):
    for path in READ[2:]:
        proxy.add(go_down, method="GET", path=path, proxy=proxy, seconds=1.0)
    assert_same(there, checkpoint, read_all(tmp_path), tmp_path)
    assert "EndpointConnectionError" in caplog.text


def test_bytes_flipped_on_their_way_are_fetched_again(proxy, there, checkpoint, tmp_path, caplog):
    faults = [proxy.add(flip_answer, method="GET", path=path) for path in READ[1:3]]
    assert_same(there, checkpoint, read_all(tmp_path), tmp_path)
    assert [f.hits for f in faults] == [1, 1]
    assert caplog.text.count("fetching it once more") == 2


WRITTEN = ("/build/plan.json", "/shards/train-000000.tar", "/build/train-000000.tar.json")
WRITTEN += ("/index.parquet", "/manifest.json", "/run.json", "/checkpoint_000001/model")


@pytest.mark.parametrize("fault", WRITING)
def test_writing_survives_transient_faults(proxy, there, people, checkpoint, fault):
    where = f"s3://{BUCKET}/{fault.replace(' ', '-')}"
    faults = [
        proxy.add(WRITING[fault], method="PUT", path=where.partition(BUCKET)[2] + ".*" + path)
        for path in WRITTEN
    ]
    build_at(f"{where}/people", people)
    config = CONFIG.replace(output=f"{where}/runs")
    write(Run(config, there.manifest.digest, None), new=True)
    upload(f"{where}/runs/saved", checkpoint, "checkpoint_000001")
    assert [f.hits for f in faults] == [1] * len(WRITTEN)
    assert contents(f"{where}/people") == contents(DATA)
    written = contents(f"{where}/runs/saved/checkpoint_000001")
    assert written == {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert Run.read(f"{where}/runs", "saved").manifest_digest == there.manifest.digest


def test_large_upload_survives_a_fault_in_every_part(proxy, tmp_path, monkeypatch):
    monkeypatch.setattr("data_shards.storage.multipart.PART_BYTES", 5 << 20)
    file = tmp_path / "shard.tar"
    file.write_bytes(os.urandom(18 << 20))
    faults = [
        proxy.add(lose_answer, method="POST", path=r"/large\?uploads"),
        proxy.add(reset, method="PUT", path="/large.*partNumber=1"),
        proxy.add(BUSY["503 SlowDown"], method="PUT", path="/large.*partNumber=2"),
        proxy.add(flip_request, method="PUT", path="/large.*partNumber=3"),
        proxy.add(lose_answer, method="PUT", path="/large.*partNumber=4"),
        proxy.add(lose_answer, method="POST", path="/large.*uploadId"),
    ]
    open_storage(f"s3://{BUCKET}").upload("large", file)
    assert [f.hits for f in faults] == [1] * len(faults)
    open_storage(f"s3://{BUCKET}").download("large", tmp_path / "back", sha256=file_sha256(file))


def say(capsys: pytest.CaptureFixture, *words: object) -> tuple[int, str]:
    capsys.readouterr()
    code = data_shards.cli.main([str(word) for word in words])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == (code != 0)
    return code, "".join(lines)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            {"status": 403, "code": "ExpiredToken"},
            "credentials for s3://places/people/manifest.json have expired",
        ),
        ({"status": 403, "code": "AccessDenied"}, "check AWS_ACCESS_KEY_ID"),
        ({"status": 404, "code": "NoSuchBucket"}, "no bucket 'places'"),
        ({"status": 501, "code": "NotImplemented"}, "does not support GetObject, needed for s3:"),
    ],
)
def test_permanent_error_is_one_line(proxy, there, capsys, monkeypatch, fault, said):
    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.3)
    proxy.add(refuse, method="GET|HEAD", times=None, **fault)
    code, line = say(capsys, "info", DATA)
    assert code == 4
    assert said in line


def test_missing_objects_are_named(proxy, there, tmp_path):
    proxy.add(refuse, path="shards/train-000000", times=None, status=404, code="NoSuchKey")
    cache = ShardCache(there.storage, tmp_path / "cache", 10**9)
    with pytest.raises(ObjectMissing, match=r"people/shards/train-000000\.tar does not exist"):
        cache.path(there.manifest.shards[0])
    proxy.add(refuse, path="people/index.parquet", times=None, status=404, code="NoSuchKey")
    with pytest.raises(DataError, match=r"no dataset at s3://places/people: .*index\.parquet"):
        Dataset.open(DATA)


def test_server_that_stays_down_is_named_and_leaves_nothing(proxy, there, tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.5)
    cache = ShardCache(there.storage, tmp_path / "cache", 10**9)
    with proxy.down(), pytest.raises(StorageError, match=r"cannot reach .* server running"):
        cache.path(there.manifest.shards[0])
    assert list(cache.folder.glob("*.tar")) == []
    assert cache.path(there.manifest.shards[0]).stat().st_size == there.manifest.shards[0].bytes


def test_bytes_that_stay_flipped_are_an_error_and_not_kept(proxy, there, tmp_path, capsys):
    fault = proxy.add(flip_answer, method="GET", path="shards/train-000000", times=None)
    cache = ShardCache(there.storage, tmp_path / "cache", 10**9)
    with pytest.raises(DataError, match=r"train-000000\.tar is damaged"):
        cache.path(there.manifest.shards[0])
    assert fault.hits == 2
    assert list(cache.folder.glob("*.tar")) == []


def test_build_without_permission_leaves_no_dataset_and_resumes(proxy, there, people, capsys):
    where = f"s3://{BUCKET}/forbidden"
    words = ("build", "--source", "synthetic", "--root", people, "--out", where, "--jobs", 1)
    words += (
        "--shard-bytes",
        60_000,
        *(f"--{k.replace('_', '-')}={v}" for k, v in OPTIONS.items()),
    )
    denied = proxy.add(
        refuse, method="PUT", path="forbidden/shards", skip=2, times=None,
        status=403, code="AccessDenied",
    )  # fmt: skip
    code, line = say(capsys, *words)
    assert code == 4
    assert f"denies access to {where}/shards/" in line
    assert denied.hits == 1, "what is refused is not asked again"
    assert not open_storage(where).exists("manifest.json")
    proxy.clear()
    assert say(capsys, *words)[0] == 0
    assert contents(where) == contents(DATA)
    sent = [path for method, path in proxy.seen if method == "PUT" and "/shards/" in path]
    assert len(sent) == len(there.manifest.shards) - 2, "finished shards are not sent again"


def test_upload_that_is_cut_off_lacks_its_seal(proxy, checkpoint):
    proxy.add(refuse, method="PUT", path="cut/.*history", status=403, code="AccessDenied")
    with pytest.raises(StorageError, match="denies access"):
        upload(f"{RUNS}/cut", checkpoint, "checkpoint_000001")
    assert SEAL not in contents(f"{RUNS}/cut/checkpoint_000001")


def test_mlflow_keeps_artifacts_on_s3_through_transient_faults(proxy, tmp_path, monkeypatch):
    from reid_train.tracking.server import connect
    from reid_train.tracking.uris import local_tracking

    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", proxy.endpoint)
    client = connect(local_tracking(tmp_path))
    experiment = client.create_experiment("e", artifact_location=f"s3://{BUCKET}/mlflow")
    run = client.create_run(experiment).info.run_id
    (tmp_path / "model.bin").write_bytes(os.urandom(100_000))
    faults = [
        proxy.add(BUSY["503 SlowDown"], method="PUT", path="mlflow/.*model.bin"),
        proxy.add(reset, method="PUT", path="mlflow/.*model.bin"),
        proxy.add(truncate, method="GET", path="mlflow/.*model.bin", after=5000),
    ]
    client.log_artifact(run, str(tmp_path / "model.bin"))
    back = Path(client.download_artifacts(run, "model.bin", str(tmp_path)))
    assert [fault.hits for fault in faults] == [1] * len(faults)
    assert back.read_bytes() == (tmp_path / "model.bin").read_bytes()
