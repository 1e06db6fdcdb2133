"""Fixtures of the tests of data_shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pictures import people
from s3_servers import SECRET

from data_shards.storage import retry


@pytest.fixture
def root(tmp_path) -> Path:
    """A CSV file of people, each with four images."""
    return people(tmp_path / "images")


@pytest.fixture
def credentials(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(retry, "PAUSE", 0.001)
    monkeypatch.setattr(retry, "PAUSE_MOST", 0.01)


@pytest.fixture(scope="module")
def moto_port() -> Iterator[int]:
    from moto.server import ThreadedMotoServer  # takes a second to import

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def bucket(credentials, moto_port, monkeypatch, request) -> str:
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{moto_port}")
    name = "b" + hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:20]
    boto3.session.Session().client("s3").create_bucket(Bucket=name)
    return name
