"""What a submitted job is given, and what is refused before anything is sent."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from unittest.mock import Mock

import aiohttp
import pytest
import requests
from ray.dashboard.modules.job.job_manager import JobManager
from ray.dashboard.modules.job.job_supervisor import JobSupervisor
from ray.job_submission import JobStatus

import cluster.cli
import cluster.submit
from cluster.local import servers as local
from cluster.submit import STOP_WAIT, requirements, settings
from data_shards.errors import ConfigError, ReidError

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


def test_job_gets_addresses_and_no_secret():
    places = {"AWS_ENDPOINT_URL": "http://s3.example", "AWS_DEFAULT_REGION": "eu-north-1"}
    given = settings(SECRETS | places)
    assert given.items() >= places.items()
    assert given["MLFLOW_TRACKING_URI"] == "https://mlflow.example/path"
    assert "canary" not in repr(given)


@pytest.mark.parametrize("uri", ["sqlite:////home/me/mlflow.db", "/home/me/mlruns", "file:///x"])
def test_tracking_in_a_file_of_this_machine_is_not_passed_on(uri):
    assert "MLFLOW_TRACKING_URI" not in settings({"MLFLOW_TRACKING_URI": uri})


@pytest.mark.parametrize(("own", "given"), [({}, "600"), ({STOP_WAIT: "30"}, "30")])
def test_stopped_job_has_time_for_its_checkpoint(own, given):
    assert settings(own)[STOP_WAIT] == given


def test_ray_reads_how_long_a_stopped_job_has_where_a_job_is_given_it():
    supervisor = JobManager._get_supervisor_runtime_env(Mock(), {"env_vars": settings({})}, "job")
    assert supervisor["env_vars"][STOP_WAIT] == "600"
    assert f'"{STOP_WAIT}"' in inspect.getsource(JobSupervisor.run)


def test_installation_is_pinned_by_the_projects_constraints():
    lines = requirements(Path(__file__).parents[3])
    assert lines[0] == "-c ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt"
    assert any(line.startswith("torch>") for line in lines)


def test_installation_needs_a_project(tmp_path):
    with pytest.raises(ConfigError, match="needs pyproject"):
        requirements(tmp_path)


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["submit"], 2, "no command after --"),
        (["submit", "python", "-m", "reid_train", "train"], 2, "no command after --"),
        (["submit", "--adress", "x", "--", "true"], 2, "Did you mean --address?"),
        (["submit", "--", "true"], 2, "no cluster: give --address"),
        (
            ["submit", "--address", "http://127.0.0.1:9", "--", "true"],
            1,
            "no Ray job server answers",
        ),
        (["submit", "--address", "head:8265", "--", "true"], 2, "give http://HOST:8265"),
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


class Server:
    """A job server with given logs and statuses; it raises those that are errors."""

    def __init__(self, logs: list, statuses: list) -> None:
        self.logs, self.statuses = logs, statuses

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for item in self.logs.pop(0):
            if isinstance(item, Exception):
                raise item
            yield item

    def get_job_info(self, job: str) -> SimpleNamespace:
        item = self.statuses.pop(0)
        if isinstance(item, Exception):
            raise item
        return SimpleNamespace(status=item)


HANDSHAKE = aiohttp.WSServerHandshakeError(SimpleNamespace(real_url="ws://head"), (), status=502)


def follow(server: Server, monkeypatch, here: bool = False) -> SimpleNamespace:
    monkeypatch.setattr(cluster.submit, "PAUSE_SECONDS", 0.001)
    log = cluster.submit._Log("job", "ray job logs job", here)
    return asyncio.run(cluster.submit._follow(server, log))


def test_job_is_followed_over_dropped_connections(monkeypatch, capsys):
    logs = [["a", "b", aiohttp.ServerDisconnectedError()], [HANDSHAKE], ["a", "bc"]]
    statuses = [OSError("refused"), JobStatus.RUNNING, JobStatus.SUCCEEDED]
    assert follow(Server(logs, statuses), monkeypatch).status == JobStatus.SUCCEEDED
    shown = capsys.readouterr()
    assert shown.out == "abc"
    assert "Server disconnected" in shown.err
    assert "502" in shown.err


def test_the_line_of_ray_about_its_environment_is_not_shown(monkeypatch, capsys):
    rays = "2026-01-02 03:04:05,678\tINFO job_manager.py:581 -- Runtime env is setting up.\n"
    server = Server([[rays + "step 1\n", "step 2\n"]], [JobStatus.SUCCEEDED])
    follow(server, monkeypatch)
    assert capsys.readouterr().out == "step 1\nstep 2\n"


def test_server_that_is_gone_for_long_is_given_up_in_one_line(monkeypatch):
    server = Server([[OSError("refused")]] * 10_000, [RuntimeError("refused\n\nby all")] * 10_000)
    monkeypatch.setattr(cluster.submit, "GIVE_UP_SECONDS", 0.1)
    with pytest.raises(ReidError, match=r"refused by all.*continues.*: ray job logs job") as raised:
        follow(server, monkeypatch)
    assert raised.value.exit_code == 1
    assert "\n" not in str(raised.value)


def test_a_local_stack_that_was_stopped_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(local, "running", lambda folder: None)
    server = Server([["step 1"], [OSError("refused")]], [JobStatus.RUNNING])
    with pytest.raises(ReidError, match="the local stack was stopped, and job job with it"):
        follow(server, monkeypatch, here=True)


def test_log_of_a_job_that_is_stopped_is_shown_to_its_end(monkeypatch, capsys):
    log = cluster.submit._Log("job", "how")
    for logs in (["step 1\n"], ["step 1\n", "continue with …\n"]):
        server = Server([logs], [JobStatus.STOPPED])
        asyncio.run(cluster.submit._follow(server, log))
    assert capsys.readouterr().out == "step 1\ncontinue with …\n"


@pytest.mark.parametrize(
    ("code", "logs", "expected"),
    [
        (7, ["step 1\n"], "the job failed: exit code 7\n"),
        (None, [], "the job failed: no worker could start\n"),
    ],
)
def test_a_failed_job_does_not_print_its_log_again(monkeypatch, capsys, code, logs, expected):
    class Client(Server):
        def submit_job(self, **options: object) -> str:
            return "job"

        def get_job_info(self, job: str) -> SimpleNamespace:
            found = {"message": "no worker could start", "driver_exit_code": code}
            return SimpleNamespace(status=JobStatus.FAILED, **found)

    monkeypatch.setattr(cluster.submit, "_connect", lambda address: Client([logs], []))
    options = cluster.submit.Submit(address="http://head:8265")
    assert cluster.submit.submit(["true"], options) == (code or 1)
    assert capsys.readouterr().err.endswith(expected)


def test_the_given_address_comes_before_those_of_the_environment(monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:1")
    monkeypatch.setenv("RAY_ADDRESS", "http://other:2")
    monkeypatch.setattr(cluster.submit.urllib.request, "urlopen", Mock())
    asked = []

    def refuse(url: str, **_: object) -> None:
        asked.append(url)
        raise requests.exceptions.ConnectionError

    monkeypatch.setattr(requests, "get", refuse)
    monkeypatch.setattr(requests, "request", lambda method, url, **options: refuse(url))
    with pytest.raises(ReidError, match="http://mine:3 is no Ray job server for you"):
        cluster.submit._connect("http://mine:3")
    assert asked
    assert all(url.startswith("http://mine:3/") for url in asked)


def test_missing_log_is_reported_once_and_the_job_is_followed(monkeypatch, capsys):
    statuses = [JobStatus.RUNNING] * 100 + [JobStatus.FAILED]
    monkeypatch.setattr(cluster.submit, "GIVE_UP_SECONDS", 0)
    server = Server([[HANDSHAKE]] * 101, statuses)
    assert follow(server, monkeypatch).status == JobStatus.FAILED
    assert capsys.readouterr().err.count("retrying") == 1


def test_job_server_that_accepts_and_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(cluster.submit, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ReidError, match="no Ray job server answers"):
            cluster.submit.submit(["true"], cluster.submit.Submit(address=address))


def test_running_jobs_are_asked_for_without_a_proxy_which_would_see_the_token(
    tmp_path, monkeypatch
):
    asked = []

    class Jobs(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Authorization"]))
            jobs = [{"entrypoint": s.lower(), "status": s} for s in ("RUNNING", "FAILED")]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(jobs).encode())

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    (tmp_path / "ray-token").write_text("secret")
    with HTTPServer(("127.0.0.1", 0), Jobs) as server:
        Thread(target=server.handle_request).start()
        address = SimpleNamespace(dashboard=f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(local, "running", lambda folder: address)
        assert local._running_jobs(tmp_path) == ["running"]
    assert asked == [("/api/jobs/", "Bearer secret")]


def test_job_server_on_this_machine_is_asked_without_a_proxy_which_would_see_the_token(
    monkeypatch,
):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    asked = []

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # set by what is called
        with pytest.raises(ReidError, match="is no Ray job server for you"):
            cluster.submit._connect(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert len(asked) > 1  # by this project and by Ray's client
    assert os.environ["no_proxy"].endswith("127.0.0.1")


def test_stack_that_another_command_is_starting_is_waited_for(tmp_path, monkeypatch):
    """The second of two starts ends at once; interrupting it stops nothing of the first's."""
    stopped: list[Path] = []
    monkeypatch.setattr(local, "_locked", lambda folder: True)
    monkeypatch.setattr(local, "stop", stopped.append)
    ended = SimpleNamespace(poll=lambda: 0)
    monkeypatch.setattr(local.subprocess, "Popen", lambda *_, **__: ended)
    addresses = iter([None, None, "addresses"])
    monkeypatch.setattr(local, "running", lambda folder: next(addresses))
    assert local.start(tmp_path) == "addresses"

    def interrupted(folder: Path, process: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(local, "running", lambda folder: None)
    monkeypatch.setattr(local, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        local.start(tmp_path)
    assert stopped == []


def test_down_where_nothing_runs_is_no_error(tmp_path, capsys):
    local.down(tmp_path)
    assert "nothing runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answers", "stops"),
    [
        (["s"], True),
        (["Stop"], True),
        (["yes", "stop"], True),
        (["x", ""], False),
        (["l"], False),
        (["leave"], False),
        ([EOFError], False),
        ([KeyboardInterrupt], False),
    ],
)
def test_a_job_is_stopped_only_by_an_answer_that_says_so(monkeypatch, answers, stops):
    asked = Mock(side_effect=answers)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert cluster.submit._asked_to_stop(Mock(input=asked)) is stops
    assert asked.call_count == len(answers)


def test_without_a_terminal_nobody_is_asked_and_the_job_continues(monkeypatch):
    asked = Mock()
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    assert cluster.submit._asked_to_stop(Mock(input=asked)) is False
    asked.assert_not_called()
