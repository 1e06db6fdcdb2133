"""Fixtures that all tests share."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from cluster.local.s3_server import S3Server

# Ray starts its workers at niceness 15: beside a second test process they would hardly run.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(autouse=True)
def own_import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what a test does to `sys.path`, which processes that later tests spawn inherit.

    MLflow puts the code that is stored with a model first there when it loads the model.
    """
    monkeypatch.setattr(sys, "path", [*sys.path])


@dataclass(frozen=True)
class Bucket:
    """An empty bucket on a real S3 server."""

    server: S3Server
    name: str

    @property
    def url(self) -> str:
        return f"s3://{self.name}"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The session's S3 server. The environment does not name it: see `S3Server.environment()`."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A fresh bucket, with the environment variables by which boto3, pyarrow and MLflow find it."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    bucket = Bucket(s3_server, f"test-{uuid.uuid4().hex[:12]}")
    s3_server.create_bucket(bucket.name)
    return bucket
