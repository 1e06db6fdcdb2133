"""Building on a real S3 server, which checks signatures and keeps its data on disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pytest

from data_shards.building.build import build
from data_shards.cli import main
from data_shards.errors import ObjectExists, ObjectMissing, StorageError
from data_shards.sources.synthetic import render as synthetic
from data_shards.storage import open_storage
from data_shards.storage import s3 as s3_module
from data_shards.storage.atomic import file_sha256
from data_shards.verify import verify

OPTIONS = {"identities": 16, "cameras": 3, "images_per_camera": 4}
SMALL = 60_000  # bytes of a shard: some 40 of them


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("people")
    synthetic.read(root, **OPTIONS)
    return root


def contents(url: str) -> dict[str, bytes]:
    storage = open_storage(url)
    return {key: storage.read(key) for key, _ in storage.list()}


def test_bucket_and_folder_hold_the_same_bytes(s3, people, tmp_path):
    settings = {"options": OPTIONS, "shard_bytes": 300_000}
    build("synthetic", people, f"{s3.url}/people", jobs=2, **settings)
    build("synthetic", people, str(tmp_path / "out"), jobs=1, **settings)
    assert contents(f"{s3.url}/people") == contents(str(tmp_path / "out"))
    assert verify(f"{s3.url}/people", decode_images=True, jobs=1)[1] == []


def modified(bucket: str) -> dict[str, object]:
    pages = boto3.session.Session().client("s3").list_objects_v2(Bucket=bucket)
    return {entry["Key"]: entry["LastModified"] for entry in pages.get("Contents", ())}


def test_killed_build_continues(s3, people, tmp_path):
    url = f"{s3.url}/people"
    command = [sys.executable, "-m", "data_shards", "build", "--source", "synthetic"]
    command += ["--root", str(people), "--out", url, "--shard-bytes", str(SMALL), "--jobs", "2"]
    command += [f"--{k.replace('_', '-')}={v}" for k, v in OPTIONS.items()]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    storage, deadline = open_storage(url), time.monotonic() + 40
    while not all(storage.exists(f"build/train-00000{n}.tar.json") for n in range(3)):
        assert process.poll() is None, "the build ended before it could be killed"
        assert time.monotonic() < deadline
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = modified(s3.name)
    assert not storage.exists("manifest.json")
    noted = [key for key in finished if key.endswith("tar.json")]
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    after = modified(s3.name)
    shards = [key.replace("build/", "shards/").removesuffix(".json") for key in noted]
    assert len(shards) >= 3
    assert {key: after[key] for key in shards} == {key: finished[key] for key in shards}
    build("synthetic", people, str(tmp_path / "whole"), options=OPTIONS, shard_bytes=SMALL, jobs=1)
    assert contents(url) == contents(str(tmp_path / "whole"))


def test_large_file_goes_in_parts_and_its_upload_resumes(s3, tmp_path, monkeypatch):
    monkeypatch.setattr("data_shards.storage.multipart.PART_BYTES", 5 << 20)
    monkeypatch.setattr("data_shards.storage.multipart.PART_THREADS", 1)
    file, storage = tmp_path / "shard.tar", open_storage(s3.url)
    file.write_bytes(os.urandom(12 << 20))
    client, sent = s3_module._client(), []
    send = client.upload_part

    def send_some(**request):
        if len(sent) == 2:
            raise s3_module.boto.NoCredentialsError
        sent.append(request["PartNumber"])
        return send(**request)

    with monkeypatch.context() as context:
        context.setattr(client, "upload_part", send_some)
        with pytest.raises(StorageError):
            storage.upload("k", file)
        assert not storage.exists("k")
        sent[:] = []
        storage.upload("k", file)
    assert sent == [3]
    storage.download("k", tmp_path / "back", sha256=file_sha256(file))


def test_create_once_holds(s3):
    storage = open_storage(s3.url)
    storage.write("k", b"first", create_once=True)
    with pytest.raises(ObjectExists):
        storage.write("k", b"second", create_once=True)
    assert storage.read("k") == b"first"


def test_damage_in_the_bucket_is_found(s3, people, capsys):
    url = f"{s3.url}/people"
    build("synthetic", people, url, options=OPTIONS, shard_bytes=SMALL, jobs=1)
    storage = open_storage(url)
    whole = storage.read("shards/train-000000.tar")
    storage.write("shards/train-000000.tar", whole[:-1000])
    storage.write("shards/train-000001.tar", storage.read("shards/train-000002.tar"))
    storage.delete("shards/gallery-000000.tar")
    assert main(["verify", url, "--jobs", "1"]) == 3
    complaint = capsys.readouterr().err
    assert "train-000000.tar is truncated" in complaint
    assert "train-000001.tar is" in complaint
    assert "gallery-000000.tar is missing" in complaint


def test_wrong_password_is_reported_and_not_shown(s3, people, monkeypatch, capsys):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-password")
    command = ["build", "--source", "synthetic", "--root", str(people), "--out", s3.url]
    assert main(command) == 4
    complaint = capsys.readouterr().err
    assert "denies access" in complaint
    assert "wrong-password" not in complaint


def test_missing_bucket_and_missing_object_have_different_errors(s3):
    with pytest.raises(StorageError, match="no bucket 'nowhere'") as caught:
        open_storage("s3://nowhere/people").exists("k")
    assert not isinstance(caught.value, ObjectMissing)
    with pytest.raises(ObjectMissing):
        open_storage(s3.url).read("k")
