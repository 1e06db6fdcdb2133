"""The tracker against a stand-in for MLflow's client that can be slow, absent or refusing."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    ENDPOINT_NOT_FOUND,
    INVALID_PARAMETER_VALUE,
    PERMISSION_DENIED,
    UNAUTHENTICATED,
)

from data_shards.errors import ConfigError, StorageError
from reid_train.tracking import tracker as tracking
from reid_train.tracking.provenance import code_commit
from reid_train.tracking.server import connect
from reid_train.tracking.tracker import KIND, Tracker
from reid_train.tracking.uris import local_tracking, redact, without_password

URI = "http://user:hunter2@mlflow.invalid"


@dataclass
class FakeMlflow:
    """Keeps what it is given; `failures` are raised first, `delay` seconds pass at each call."""

    failures: list[Exception] = field(default_factory=list)
    delay: float = 0.0
    points: list[tuple[str, int, float]] = field(default_factory=list)
    parameters: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    batches: list[int] = field(default_factory=list)
    status: str | None = None
    experiments: dict[str, str | None] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    def _meet(self) -> None:
        time.sleep(self.delay)
        if self.failures:
            raise self.failures.pop(0)

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        self._meet()
        self.batches.append(len(metrics) + len(params) + len(tags))
        self.points += [(item.key, item.step, item.value) for item in metrics]
        self.parameters |= {item.key: item.value for item in params}
        self.tags |= {item.key: item.value for item in tags}

    def get_run(self, run_id: str) -> Any:
        last: dict[str, int] = {}
        for name, step, _ in self.points:
            last[name] = max(step, last.get(name, step))
        metrics = [SimpleNamespace(key=name, step=step) for name, step in last.items()]
        return SimpleNamespace(
            data=SimpleNamespace(to_proto=lambda: SimpleNamespace(metrics=metrics))
        )

    def get_experiment_by_name(self, name: str) -> Any:
        if name not in self.experiments:
            return None
        tags = {KIND: self.kinds[name]} if name in self.kinds else {}
        return SimpleNamespace(experiment_id=name, tags=tags)

    def create_experiment(
        self, name: str, artifact_location: str | None, tags: dict[str, str]
    ) -> str:
        self._meet()
        self.experiments[name] = artifact_location
        self.kinds[name] = tags[KIND]
        return name

    def set_experiment_tag(self, experiment: str, key: str, value: str) -> None:
        assert key == KIND
        self.kinds[experiment] = value

    def create_run(self, experiment: str, run_name: str | None) -> Any:
        self.status = "RUNNING"
        return SimpleNamespace(info=SimpleNamespace(run_id="run-1"))

    def update_run(self, run_id: str, status: str) -> None:
        self.status = status

    def set_terminated(self, run_id: str, status: str) -> None:
        self._meet()
        self.status = status


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
    fake = FakeMlflow()
    monkeypatch.setattr(tracking, "connect", lambda uri: fake)
    return fake


def join(run_id: str | None = "run-1", uri: str | None = URI, interval: float = 0.02) -> Tracker:
    return Tracker(uri, run_id, system_metrics=False, interval=interval)


def wait_for(condition: Any, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


def test_values_arrive_in_the_background_without_closing(mlflow):
    tracker = join()
    tracker.log({"loss/total": 2.5, "λ/min": 0.1}, step=3)
    wait_for(lambda: mlflow.points)
    assert mlflow.points == [("loss/total", 3, 2.5), ("λ/min", 3, 0.1)]
    tracker.close()


def test_leaving_a_joined_run_sends_everything_and_leaves_it_running(mlflow):
    mlflow.status = "RUNNING"
    with join(interval=100) as tracker:
        for step in range(1500):
            tracker.log({"loss": 1.0, "rate": 0.1}, step)
    assert len(mlflow.points) == 3000
    assert mlflow.batches == [1000, 1000, 1000]
    assert mlflow.status == "RUNNING"


def test_a_slow_server_does_not_stall_the_step(mlflow):
    mlflow.delay = 0.3
    tracker = join()
    started = time.perf_counter()
    for step in range(1000):
        tracker.log({"loss": 1.0}, step)
    assert time.perf_counter() - started < 0.2
    tracker.close()
    assert len(mlflow.points) == 1000


def test_failures_are_retried_and_warned_of_once(mlflow, caplog):
    mlflow.failures = [ConnectionError("down"), ConnectionError("still down")]
    with join() as tracker:
        tracker.log({"loss": 1.0}, 0)
        wait_for(lambda: mlflow.points)
        tracker.log({"loss": 2.0}, 1)
    assert mlflow.points == [("loss", 0, 1.0), ("loss", 1, 2.0)]
    assert len([r for r in caplog.records if "does not take values" in r.message]) == 1


def test_closing_gives_up_on_a_dead_server_in_bounded_time(mlflow, caplog):
    mlflow.failures = [ConnectionError("down")] * 10_000
    tracker = join()
    tracker.log({"loss": 1.0}, 0)
    started = time.monotonic()
    tracker.close(timeout=0.5)
    assert time.monotonic() - started < 3
    assert "1 values of run run-1 were not sent" in caplog.text
    mlflow.failures = []
    time.sleep(1.1)
    assert not mlflow.points  # nor later, when nobody waits for it


def test_a_refused_batch_does_not_hold_up_the_next(mlflow, caplog):
    mlflow.failures = [MlflowException("bad name", error_code=INVALID_PARAMETER_VALUE)]
    tracker = join()
    tracker.log({"loss?": 1.0}, 0)
    wait_for(lambda: "refuses" in caplog.text)
    tracker.log({"loss": 1.0}, 0)
    tracker.close()
    assert mlflow.points == [("loss", 0, 1.0)]


@pytest.mark.parametrize("code", [UNAUTHENTICATED, PERMISSION_DENIED, ENDPOINT_NOT_FOUND])
def test_values_outlive_expired_credentials_and_a_lost_route(mlflow, code):
    mlflow.failures = [MlflowException("gateway", error_code=code)] * 2
    with join() as tracker:
        tracker.log({"loss": 1.0}, 0)
        wait_for(lambda: mlflow.points)
    assert mlflow.points == [("loss", 0, 1.0)]


def test_steps_repeated_after_a_restart_appear_once(mlflow):
    with join() as first:
        for step in range(5):
            first.log({"loss": float(step)}, step)
        first.log({"mAP": 0.5}, 2)
    with join() as second:
        for step in range(3, 8):
            second.log({"loss": float(step)}, step)
        second.log({"mAP": 0.6}, 6)
    assert [step for name, step, _ in mlflow.points if name == "loss"] == list(range(8))
    assert [step for name, step, _ in mlflow.points if name == "mAP"] == [2, 6]


def test_a_killed_drivers_worker_sends_no_step_that_another_driver_logs_again(mlflow, caplog):
    holders = {"old"}
    with Tracker(
        URI, "run-1", system_metrics=False, interval=0.02, may_send=lambda: "old" in holders
    ) as old:
        old.log({"loss": 0.0}, 0)
        wait_for(lambda: mlflow.points)
        holders.clear()  # another driver takes the run, and trains from an earlier checkpoint
        old.log({"loss": 1.0}, 1)
        wait_for(lambda: "another driver has run-1 now" in caplog.text)
        with join() as new:
            new.log({"loss": 1.0}, 1)
            new.log({"loss": 2.0}, 2)
        old.log({"loss": 2.0}, 2)
    assert [step for _, step, _ in mlflow.points] == [0, 1, 2]


def test_values_wait_until_the_owner_of_the_run_is_known(mlflow):
    answers = [ConnectionError("no S3"), True]

    def may_send() -> bool:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return bool(answer)

    with Tracker(URI, "run-1", system_metrics=False, interval=0.02, may_send=may_send) as tracker:
        tracker.log({"loss": 1.0}, 0)
    assert mlflow.points == [("loss", 0, 1.0)]


def test_an_experiment_opens_on_its_training_runs(mlflow):
    Tracker.start(URI, "new").finish()
    assert mlflow.kinds == {"new": "custom_model_development"}
    mlflow.experiments["old"] = None
    Tracker.start(URI, "old").finish()
    assert mlflow.kinds["old"] == "custom_model_development"
    mlflow.kinds["other"] = "genai_development"
    mlflow.experiments["other"] = None
    Tracker.start(URI, "other").finish()
    assert mlflow.kinds["other"] == "genai_development"  # as its owner chose


@pytest.mark.parametrize(("uri", "run_id"), [(None, None), (None, "run-1"), (URI, None)])
def test_without_a_uri_or_a_run_nothing_is_tracked(mlflow, tmp_path, uri, run_id):
    before = threading.active_count()
    with join(run_id, uri) as tracker:
        tracker.log({"loss": 1.0}, 0)
        tracker.log_parameters({"seed": 1})
        tracker.set_tags({"tag": 1})
        tracker.log_artifacts(tmp_path)
        assert threading.active_count() == before
    assert mlflow.batches == []


def test_tracking_that_is_off_starts_no_run(mlflow):
    with Tracker.start(None, "reid") as run:
        assert run.run_id is None
    assert mlflow.status is None


def test_parameters_are_all_logged_and_secrets_are_not(mlflow):
    with join() as tracker:
        tracker.log_parameters({f"section.p{i}": i for i in range(250)} | {"s3.secret_key": "x"})
        tracker.set_tags({"dataset": "http://me:pass@host/data", "ray_job": None, "token": "x"})
    assert len(mlflow.parameters) == 250
    assert max(mlflow.batches) <= 100
    assert mlflow.tags == {"dataset": "http://host/data"}


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (ValueError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED")],
)
def test_a_started_run_ends_as_its_context_does(mlflow, error, status):
    def use() -> None:
        with Tracker.start(URI, "reid", run_name="name") as run:
            assert run.run_id == "run-1"
            assert mlflow.status == "RUNNING"
            if error is not None:
                raise error

    if error is None:
        use()
    else:
        with pytest.raises(type(error)):
            use()
    assert mlflow.status == status


def test_a_run_is_reopened_by_its_id(mlflow):
    mlflow.status = "FAILED"
    with Tracker.start(URI, "reid", run_id="run-7") as run:
        assert run.run_id == "run-7"
        assert mlflow.status == "RUNNING"
    assert mlflow.experiments == {}


def test_a_run_that_cannot_start_is_an_error_without_the_password(mlflow):
    mlflow.failures = [ConnectionError(f"no route to {URI}")]
    with pytest.raises(StorageError, match=r"cannot start a run.*turn tracking off") as raised:
        Tracker.start(URI, "reid")
    assert "hunter2" not in str(raised.value)


def test_artifacts_that_cannot_be_stored_do_not_raise(mlflow, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tracking.time, "sleep", lambda seconds: None)
    with join() as tracker:
        tracker.log_artifacts(tmp_path / "report")
    assert "report not logged" in caplog.text


def test_local_tracking_keeps_artifacts_beside_its_database(mlflow, tmp_path):
    uri = local_tracking(tmp_path / "new")
    assert uri == f"sqlite:///{tmp_path}/new/mlflow.db"
    Tracker.start(uri, "reid").finish()
    assert mlflow.experiments == {"reid": (tmp_path / "new" / "artifacts").as_uri()}


def test_commit_can_be_given_without_a_repository(monkeypatch):
    monkeypatch.setenv("REID_COMMIT", "abc")
    assert code_commit() == "abc"


def test_a_password_in_the_tracking_uri_is_refused_without_showing_it():
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        without_password("https://alice:p@ss@mlflow:5000")
    assert "p@ss" not in str(caught.value)
    assert "https://mlflow:5000" in str(caught.value)
    assert without_password("sqlite:////a@b/mlflow.db") == "sqlite:////a@b/mlflow.db"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://u:pa/ss@db/mlflow", "postgresql://db/mlflow"),
        ("mysql+pymysql://u:p@ss/w@db:3306/mlflow", "mysql+pymysql://db:3306/mlflow"),
        ("postgresql://db/mlflow?user=u&password=pw", "postgresql://db/mlflow?user=&password="),
    ],
)
def test_a_password_of_a_database_is_refused_and_not_shown(uri, shown):
    with pytest.raises(ConfigError, match=r"user and password out of the tracking URI") as caught:
        without_password(uri)
    assert f"({shown})" in str(caught.value)


def test_two_that_make_an_experiment_at_once_share_it(tmp_path, monkeypatch):
    uri = local_tracking(tmp_path)
    first = connect(uri).create_experiment("reid")
    real, missed = MlflowClient.get_experiment_by_name, []

    def late(self, name):
        """Not there yet when it is looked up first."""
        found = real(self, name) if missed else None
        missed.append(name)
        return found

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", late)
    run = Tracker.start(uri, "reid")
    run.close()
    assert connect(uri).get_run(run.run_id).info.experiment_id == first


def test_redaction_leaves_nothing_of_a_password_with_an_at_sign():
    assert redact("at http://u:p@ss@h/x@y") == "at http://h/x@y"


def test_redaction_keeps_plain_urls():
    assert redact("s3://bucket/a@b http://u:p@h/x") == "s3://bucket/a@b http://h/x"
