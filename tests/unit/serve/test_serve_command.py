"""`cluster serve`: a port that is taken, and what is left when a start fails."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest
import ray
from ray import serve

from cluster.serve import app, command
from cluster.serve.settings import Settings
from data_shards import ray_utils
from data_shards.errors import ConfigError, Interrupted, ReidError


@pytest.fixture
def on_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray and Ray Serve that do nothing."""
    monkeypatch.setattr(ray_utils, "start_ray", lambda *_, **__: None)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 8})
    monkeypatch.setattr(app, "build_app", lambda *_: None)
    monkeypatch.setattr(command, "_is_head", lambda: True)
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(proxies={}))
    monkeypatch.setattr(serve, "start", lambda *_, **__: None)


@pytest.mark.parametrize("step", ["start", "run"])
@pytest.mark.parametrize(
    ("error", "raised"),
    [(Interrupted("stopped", 2), Interrupted), (RuntimeError("no\nroom"), ReidError)],
)
@pytest.mark.usefixtures("on_ray")
def test_start_that_does_not_end_leaves_nothing_on_ray(monkeypatch, step, error, raised):
    def fail(*_: object, **__: object) -> None:
        raise error

    ended: list[bool] = []
    monkeypatch.setattr(serve, step, fail)
    monkeypatch.setattr(command, "end", lambda: ended.append(True))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(raised):
        command.start(Settings("model", "gallery"), None, "127.0.0.1", port)
    assert ended == [True]


@pytest.mark.usefixtures("on_ray")
def test_a_port_that_is_taken_is_told_before_anything_starts(monkeypatch):
    started: list[object] = []
    monkeypatch.setattr(serve, "start", lambda *_, **__: started.append(1))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} of 127.0.0.1 .*give another --port"):
            command.start(Settings("model", "gallery"), None, "127.0.0.1", port)
    assert started == []
