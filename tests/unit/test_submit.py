"""What a submitted job is given, and what is refused before anything is sent."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import cluster.cli
from cluster import local
from cluster.submit import requirements, settings
from data_shards.errors import ConfigError

SECRETS = {
    "AWS_ACCESS_KEY_ID": "canary-id",
    "AWS_SECRET_ACCESS_KEY": "canary-key",
    "AWS_SESSION_TOKEN": "canary-token",
    "MLFLOW_TRACKING_USERNAME": "canary-user",
    "MLFLOW_TRACKING_PASSWORD": "canary-password",
    "MLFLOW_TRACKING_TOKEN": "canary-bearer",
    "RAY_AUTH_TOKEN": "canary-ray",
    "MLFLOW_TRACKING_URI": "https://canary-me:canary-pass@mlflow.example/path",
}


def test_job_is_told_where_things_are_and_no_secret():
    places = {"AWS_ENDPOINT_URL": "http://s3.example", "AWS_DEFAULT_REGION": "eu-north-1"}
    given = settings(SECRETS | places)
    assert given.items() >= places.items()
    assert given["MLFLOW_TRACKING_URI"] == "https://mlflow.example/path"
    assert "canary" not in repr(given)


@pytest.mark.parametrize("uri", ["sqlite:////home/me/mlflow.db", "/home/me/mlruns", "file:///x"])
def test_tracking_in_a_file_of_this_machine_is_not_passed_on(uri):
    assert "MLFLOW_TRACKING_URI" not in settings({"MLFLOW_TRACKING_URI": uri})


def test_installation_is_pinned_by_the_projects_constraints():
    lines = requirements(Path(__file__).parents[2])
    assert lines[0] == "-c ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt"
    assert any(line.startswith("torch>") for line in lines)


def test_installation_needs_a_project(tmp_path):
    with pytest.raises(ConfigError, match="needs pyproject"):
        requirements(tmp_path)


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["submit"], 2, "no command"),
        (["submit", "--", "true"], 2, "no cluster: give --address"),
        (["submit", "--address", "http://127.0.0.1:9", "--", "true"], 1, "no Ray job server"),
        (["local", "status", "--folder", "nowhere"], 1, "no stack runs on"),
        (["submitt"], 2, "no command 'submitt'"),
    ],
)
def test_bad_command_line_is_one_line_and_an_exit_code(
    words, code, expected, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setattr(sys, "argv", ["cluster", *words])
    assert cluster.cli.main() == code
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_down_where_nothing_runs_is_no_error(tmp_path, capsys):
    local.down(tmp_path)
    assert "nothing ran" in capsys.readouterr().out
