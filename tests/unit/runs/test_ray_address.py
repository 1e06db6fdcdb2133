"""RAY_ADDRESS is checked before Ray is asked to connect, which could take minutes."""

from __future__ import annotations

import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from data_shards import ray_utils
from data_shards.errors import ConfigError, ReidError
from data_shards.ray_utils import require_ray_cluster


@pytest.mark.parametrize("address", [None, "", "auto", "local"])
def test_no_address_is_not_checked(monkeypatch, address):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    asked: list[object] = []
    connect = "create_connection"
    monkeypatch.setattr(ray_utils.socket, connect, lambda *given, **_: asked.append(given))
    require_ray_cluster()
    assert asked == []


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:8265", "python -m cluster submit --address http://127.0.0.1:8265"),
        ("https://head", "the address of a job server"),
        ("head", "not HOST:PORT"),
        ("head:port", "not HOST:PORT"),
        ("head:99999", "not HOST:PORT"),
    ],
)
def test_address_that_is_no_heads_is_refused_with_advice(monkeypatch, address, message):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=message) as refused:
        require_ray_cluster()
    assert "\n" not in str(refused.value)


def test_cluster_that_is_gone_is_one_line(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(ReidError, match=rf"no Ray cluster answers at RAY_ADDRESS 127.0.0.1:{port}"):
        require_ray_cluster()


def test_what_answers_but_is_no_ray_head_is_refused(monkeypatch):
    monkeypatch.setattr(ray_utils, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ReidError, match="is no Ray head"):
            require_ray_cluster()


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_head_that_answers_is_accepted(monkeypatch, scheme):
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("RAY_ADDRESS", f"{scheme}127.0.0.1:{port}")
    require_ray_cluster()
    server.stop(None)


def test_check_imports_no_ray():
    code = "import sys, data_shards.ray_utils; print('ray' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
