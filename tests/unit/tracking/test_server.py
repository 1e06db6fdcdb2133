"""What is said of an MLflow that is not there, refuses, or is something else."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException

from data_shards.errors import ConfigError, ReidError, StorageError
from reid_train.tracking import server
from reid_train.tracking.server import explain, require_experiment, run_page
from reid_train.tracking.uris import local_tracking


class Answer(http.server.BaseHTTPRequestHandler):
    """Gives one answer to everything."""

    status, body = 200, b""

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def answering() -> Iterator:
    """A function that starts a server with one answer and returns its address."""
    running = []

    def start(status: int, body: bytes = b"<html>Hello</html>") -> str:
        handler = type("Handler", (Answer,), {"status": status, "body": body})
        running.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_port}"

    yield start
    for each in running:
        each.shutdown()
        each.server_close()


def told(uri: str) -> str:
    with pytest.raises(ReidError) as raised:
        require_experiment(uri, "reid")
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (401, b"", "wants a login (401): set MLFLOW_TRACKING_USERNAME"),
        (403, b"Forbidden", "refuses access (403)"),
        (404, b"<html>Not found</html>", "not MLflow (404): check host, port and path"),
        (200, b"<html>Hello</html>", "not MLflow: check host, port and path"),
        (200, b"{}", "not MLflow"),
        (302, b"", "redirects to a login page, or is not MLflow"),
    ],
)
def test_a_server_that_refuses_or_is_not_mlflow_is_named_as_such(answering, status, body, reason):
    uri = answering(status, body)
    assert reason in told(uri)
    assert f"MLflow at {uri}" in told(uri)


def test_a_closed_port_and_an_unknown_host_are_named(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert "nothing listens there" in told(f"http://127.0.0.1:{port}")
    assert "host name is not known" in told("http://nobody.invalid:5000")


def test_https_to_a_plain_server_is_named(answering, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert "http:// instead of https://" in told(answering(200).replace("http:", "https:"))


def test_a_server_that_never_answers_is_given_up_in_time(monkeypatch):
    monkeypatch.setattr(server, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(server, "connect", lambda uri: time.sleep(60))
    started = time.monotonic()
    assert "does not answer within 0 s" in told("http://10.0.0.1:5000")
    assert time.monotonic() - started < 5


def test_a_file_has_longer_than_a_server_to_make_its_tables(tmp_path, monkeypatch):
    def slow(uri: str) -> SimpleNamespace:
        time.sleep(0.5)
        return SimpleNamespace(get_experiment_by_name=lambda name: None)

    monkeypatch.setattr(server, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(server, "connect", slow)
    require_experiment(local_tracking(tmp_path), "reid")
    assert "does not answer" in told("http://10.0.0.1:5000")


def test_a_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / "mlflow.db").write_text("not a database, but long enough to be read as one " * 40)
    assert "not a SQLite database" in told(local_tracking(tmp_path))


@pytest.mark.parametrize("uri", ["127.0.0.1:5000", "./mlruns"])
def test_an_address_without_a_scheme_is_named(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "http:// before its address" in told(uri)


def test_a_deleted_experiment_is_refused_with_how_to_restore_it(monkeypatch):
    deleted = SimpleNamespace(name="reid", lifecycle_stage="deleted", experiment_id="7")
    client = SimpleNamespace(get_experiment_by_name=lambda name: deleted)
    monkeypatch.setattr(server, "connect", lambda uri: client)
    with pytest.raises(ConfigError, match="mlflow experiments restore --experiment-id 7"):
        require_experiment("http://mlflow:5000", "reid")


def test_an_experiment_that_is_not_there_yet_is_no_error(monkeypatch):
    client = SimpleNamespace(get_experiment_by_name=lambda name: None)
    monkeypatch.setattr(server, "connect", lambda uri: client)
    require_experiment("http://mlflow:5000", "reid")


def test_artifacts_that_were_moved_are_named():
    text = "The following failures occurred while downloading one or more artifacts from "
    error = MlflowException(f"{text}file:///old/artifacts:\n##### File  #####\n[Errno 2]")
    assert "files at file:///old/artifacts, and they cannot be read" in explain(error, "sqlite://")


def test_no_password_is_printed(monkeypatch):
    def fail(uri: str) -> None:
        raise ConnectionError(f"no route to {uri}")

    monkeypatch.setattr(server, "connect", fail)
    with pytest.raises(StorageError, match="no route to http://mlflow") as raised:
        require_experiment("http://me:hunter2@mlflow", "reid")
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_mlflow_on_this_machine_is_reached_without_the_proxy(answering, monkeypatch, host):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://proxy.invalid:3128")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "elsewhere")
    assert "wants a login" in told(answering(401).replace("127.0.0.1", host))


def test_a_proxy_that_does_not_reach_mlflow_is_named(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://proxy.invalid:3128")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert "the proxy of HTTP_PROXY" in told("http://mlflow.invalid:5000")


def test_a_run_is_shown_by_its_page_or_by_the_command_that_serves_it(monkeypatch):
    run = SimpleNamespace(info=SimpleNamespace(experiment_id="3"))
    monkeypatch.setattr(server, "connect", lambda uri: SimpleNamespace(get_run=lambda run_id: run))
    assert run_page("http://mlflow:5000/", "abc") == "http://mlflow:5000/#/experiments/3/runs/abc"
    assert run_page("sqlite:////a b/mlflow.db", "abc") == (
        "mlflow ui --backend-store-uri 'sqlite:////a b/mlflow.db', then open "
        "http://127.0.0.1:5000/#/experiments/3/runs/abc"
    )
