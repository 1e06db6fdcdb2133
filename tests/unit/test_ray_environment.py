"""What a command sets before it imports Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from data_shards.ray_utils import NOISE, connect, prepare_ray

SHOWN = """
import json, os, sys
from data_shards.ray_utils import prepare_ray
prepare_ray()
assert "ray" not in sys.modules
from ray._private.ray_logging import stderr_deduplicator
lines = json.loads(sys.argv[1])
(batch,) = stderr_deduplicator.deduplicate({"pid": 1, "lines": lines})
print(json.dumps(batch["lines"]))
"""
LINES = [
    "core_worker.cc:2465: Actor with class name: 'PreemptionWatcher' and ID: 'x' has constructor",
    "reducer.cpp:1529] Warning: find_unused_parameters=True was specified in DDP constructor",
    "[c10d] The hostname of the client socket cannot be retrieved. err=-3",
    "8 PYTHON worker processes have been started on node: x with address: 127.0.0.1.",
    "WARNING shard train-000001.tar was damaged",
]


def test_only_lines_without_a_cause_here_are_left_out():
    environment = {name: value for name, value in os.environ.items() if name[:4] != "RAY_"}
    command = [sys.executable, "-c", SHOWN, json.dumps(LINES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == LINES[-1:]


@pytest.mark.parametrize("before", [None, "head:6379"])
def test_ray_that_is_started_here_stays_on_loopback(monkeypatch: pytest.MonkeyPatch, before):
    for name in ("RAY_AUTH_MODE", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_ADDRESS"):
        monkeypatch.setenv(name, before or "x")  # so that it is restored afterwards
        if before is None or name != "RAY_ADDRESS":
            monkeypatch.delenv(name)
    started: list[dict] = []
    monkeypatch.setitem(
        sys.modules,
        "ray",
        SimpleNamespace(is_initialized=lambda: False, init=lambda **given: started.append(given)),
    )
    connect("local")
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert started[0]["address"] == "local"


def test_a_cluster_that_is_given_keeps_its_own_settings(monkeypatch: pytest.MonkeyPatch):
    for name in ("RAY_AUTH_MODE", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_COLOR_PREFIX"):
        monkeypatch.setenv(name, "x")  # so that it is restored afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setenv("RAY_DEDUP_LOGS_SKIP_REGEX", "mine")
    prepare_ray()
    assert "RAY_AUTH_MODE" not in os.environ
    assert os.environ["RAY_COLOR_PREFIX"] == "0"
    assert os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] == "mine"
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.delenv("RAY_DEDUP_LOGS_SKIP_REGEX")
    prepare_ray()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] == "|".join(NOISE)
    monkeypatch.delenv("RAY_DEDUP_LOGS_SKIP_REGEX")
