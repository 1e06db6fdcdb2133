"""`cluster serve`: what is left when a start is interrupted."""

from __future__ import annotations

import pytest
import ray
from ray import serve

from cluster.serve import app, command
from cluster.serve.settings import Settings
from data_shards import ray_utils
from data_shards.errors import Interrupted, ReidError


@pytest.mark.parametrize(
    ("error", "raised"),
    [(Interrupted("stopped", 2), Interrupted), (RuntimeError("no\nroom"), ReidError)],
)
def test_start_that_does_not_end_leaves_nothing_on_ray(monkeypatch, error, raised):
    def run(*_: object, **__: object) -> None:
        raise error

    ended: list[bool] = []
    monkeypatch.setattr(ray_utils, "start_ray", lambda *_, **__: None)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 8})
    monkeypatch.setattr(app, "build_app", lambda *_: None)
    monkeypatch.setattr(serve, "start", lambda *_, **__: None)
    monkeypatch.setattr(serve, "run", run)
    monkeypatch.setattr(command, "end", lambda: ended.append(True))
    with pytest.raises(raised):
        command.start(Settings("model", "gallery"), None, "127.0.0.1", 8000)
    assert ended == [True]
