"""A real MLflow server that goes away and comes back: every value arrives, in order, once."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from reid_train.tracking.server import connect
from reid_train.tracking.tracker import Tracker
from reid_train.training.history import History

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Server:
    """An MLflow server on loopback, killed and started again on the same database and port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--default-artifact-root", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)

    def kill(self) -> None:
        import psutil

        below = psutil.Process(self.process.pid).children(recursive=True)
        for process in [psutil.Process(self.process.pid), *below]:
            process.kill()
        self.process.wait()
        psutil.wait_procs(below, timeout=30)


@pytest.fixture
def server(tmp_path: Path):
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


def points(server: Server, run: str, name: str) -> list[tuple[int, float]]:
    history = connect(server.uri).get_metric_history(run, name)
    return [(p.step, p.value) for p in sorted(history, key=lambda p: (p.timestamp, p.step))]


def test_what_an_absent_mlflow_missed_arrives_later_in_order_and_once(server, tmp_path):
    with Tracker.start(server.uri, "reid", run_name="outage") as owner:
        run = owner.run_id
        assert run is not None
        # One process outlives the outage.
        tracker = Tracker(server.uri, run, system_metrics=False, interval=0.2)
        history = History()

        def step(number: int) -> None:
            history.add_step(number, {"loss": 1 / number})
            tracker.log({"loss": 1 / number}, number)

        step(1)
        while not points(server, run, "loss"):
            time.sleep(0.1)
        server.kill()
        started = time.monotonic()
        for number in range(2, 500):
            step(number)
        assert time.monotonic() - started < 2  # training does not wait for MLflow
        time.sleep(1)
        server.start()
        deadline = time.monotonic() + 120
        while len(points(server, run, "loss")) < 499 and time.monotonic() < deadline:
            time.sleep(0.5)
        expected = [(number, 1 / number) for number in range(1, 500)]
        assert points(server, run, "loss") == expected

        # Another does not: what it had is in its last checkpoint.
        server.kill()
        for number in range(500, 600):
            step(number)
        history.save(tmp_path / "history.safetensors")
        tracker.close(timeout=1.0)
        resumed = Tracker.start(server.uri, "reid", run_id=run)  # MLflow is still away
        server.start()
        History.load(tmp_path / "history.safetensors").replay(resumed.log)
        resumed.log({"loss": 1 / 600}, 600)
        resumed.close(timeout=60)
        assert points(server, run, "loss") == [(n, 1 / n) for n in range(1, 601)]
