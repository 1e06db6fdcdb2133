"""Servers, buckets, credentials and disks that fail a command: one line, and exit code 4."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import error_line, train, write_csv

from data_shards.storage import open_storage, retry


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "denies access .* check AWS_ACCESS_KEY_ID"),
        ({"AWS_ACCESS_KEY_ID": "wrong"}, "denies access .* check AWS_ACCESS_KEY_ID"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no credentials for s3://"),
    ],
    ids=["secret", "key", "none"],
)
def test_wrong_credentials_are_reported_and_not_retried(
    say, s3, dataset, tmp_path, monkeypatch, change, expected
):
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in change.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    secrets = [s3.server.environment()["AWS_SECRET_ACCESS_KEY"], "=wrong"]
    for code, said in (
        say("data_shards", "info", f"{s3.url}/data"),
        train(say, "--data", dataset, "--output", f"{s3.url}/runs"),
    ):
        assert code == 4
        assert re.search(expected, error_line(said))
        assert not any(secret in said for secret in secrets)


def test_bucket_that_is_not_there_is_named(say, s3, pictures, dataset):
    folder, rows = pictures
    root = write_csv(folder, "again", rows)
    for code, said in (
        say("data_shards", "info", "s3://no-such-bucket/data"),
        say(
            "data_shards",
            "build",
            "--source",
            "csv",
            "--root",
            root,
            "--out",
            "s3://no-such-bucket",
        ),
        train(say, "--data", "s3://no-such-bucket/data", "--output", f"{s3.url}/runs"),
        train(say, "--data", dataset, "--output", "s3://no-such-bucket"),
    ):
        assert code == 4
        assert "no bucket 'no-such-bucket'" in error_line(said)


def test_server_that_does_not_answer_is_named_at_once_and_given_up_later(say, monkeypatch, caplog):
    monkeypatch.setattr(retry, "RETRY_SECONDS", 3.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    began = time.monotonic()
    code, said = say("data_shards", "info", "s3://bucket/data")
    assert time.monotonic() - began < 40
    assert code == 4
    assert "s3://bucket/data/manifest.json on http://127.0.0.1:9" in caplog.text
    assert "trying again in" in caplog.text
    assert "cannot reach http://127.0.0.1:9" in error_line(said)
    assert "is AWS_ENDPOINT_URL right" in error_line(said)


@pytest.mark.parametrize(
    ("name", "value"), [("AWS_ENDPOINT_URL", "nonsense"), ("AWS_PROFILE", "no-such-profile")]
)
def test_environment_that_makes_no_sense_is_one_line(say, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    code, said = say("data_shards", "info", "s3://bucket/data")
    assert code == 2
    assert value in error_line(said)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk_ends_a_build_and_leaves_nothing_half_done(say, pictures, tiny_disk, tmp_path):
    folder, rows = pictures
    root, out = write_csv(folder, "big", rows), tmp_path / "out"
    arguments = ("build", "--source", "csv", "--root", root, "--out", out, "--jobs", 1)
    code, said = say("data_shards", *arguments, "--work", tiny_disk)
    assert code == 4
    assert "disk full" in error_line(said)
    assert "free some space" in error_line(said)
    assert not (out / "manifest.json").exists()
    assert list(tiny_disk.iterdir()) == []
    assert say("data_shards", *arguments)[0] == 0


def test_verify_names_a_full_temporary_disk(say, s3, dataset, tiny_disk, monkeypatch):
    url = f"{s3.url}/data"
    for path in dataset.rglob("*.*"):
        open_storage(url).upload(path.relative_to(dataset).as_posix(), path)
    monkeypatch.setattr(tempfile, "tempdir", str(tiny_disk))
    code, said = say("data_shards", "verify", url, "--jobs", 1)
    assert code == 4
    assert "disk full" in error_line(said)
