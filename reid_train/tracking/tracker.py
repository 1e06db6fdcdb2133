"""MLflow runs: the only file that writes one.

Metrics are buffered and sent by a background thread, so a slow or absent MLflow never stalls or
stops a step. What a process has not sent when it ends is in the run's last checkpoint, on disk: the
next process logs the history in it again, and what MLflow has by then is left out. The driver owns
a run, and a worker joins it by its id to log the steps:

    with Tracker.start(uri, "reid", run_name="msmt17") as run:  # ends the run, or marks it failed
        run.log_parameters(config.flat())
        train(run.run_id)

    with Tracker(uri, run_id) as tracker:  # in the worker
        tracker.log({"loss/total": 1.0}, step=0)
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from data_shards.errors import ConfigError, Interrupted, StorageError

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

# MLflow's own bounds of one log_batch call.
METRICS_PER_BATCH = 1000
PARAMETERS_PER_BATCH = 100
LONGEST_WAIT = 60.0
UNACCEPTABLE = {400, 413, 422}
"""Answers to values that MLflow will never take. What a gateway says of credentials or of a route
that is gone for a while, 401, 403 and 404, is no such answer."""
# Loggers that tell of MLflow's own work, at INFO, straight to the terminal.
QUIET = (
    "alembic",
    "mlflow.pyfunc",
    "mlflow.store.db.utils",
    "mlflow.store.model_registry.abstract_store",
    "mlflow.system_metrics",
)

_SECRET_NAME = re.compile(r"secret|password|passwd|token|credential|access_?key|api_?key", re.I)
_USER_INFO = re.compile(r"(?<=://)[^/\s]*@")


class Point(NamedTuple):
    """One value of one metric; the time is taken when it is logged, in ms."""

    name: str
    value: float
    time: int
    step: int


class Tracker:
    """Joins an MLflow run to log to it. Leaving it as a context sends all, and ends an owned run.

    The last step of each metric that the run already has is asked for first, and what is logged
    again up to there is left out: a training that restarts from an older checkpoint just logs its
    steps, and none appears twice.

    Args:
        uri: tracking URI (a server's, or `local_tracking(folder)`).
        run_id: the run; with None for it or for the URI, nothing is tracked.
        system_metrics: log CPU, memory, disk, network and GPU use of this machine.
        interval: seconds between sendings.
    """

    def __init__(
        self,
        uri: str | None,
        run_id: str | None,
        *,
        system_metrics: bool = True,
        interval: float = 3.0,
    ) -> None:
        self.uri = uri
        self.run_id = run_id
        self._owner = False
        self._system_metrics = system_metrics
        self._interval = interval
        self._last_steps: dict[str, int] = {}
        self._buffer: list[Point] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._warned = False
        self._thread: threading.Thread | None = None
        if self.enabled:
            self._thread = threading.Thread(target=self._work, name="mlflow-tracker", daemon=True)
            self._thread.start()

    @classmethod
    def start(
        cls,
        uri: str | None,
        experiment: str,
        *,
        run_name: str | None = None,
        run_id: str | None = None,
    ) -> Tracker:
        """Start a run, or reopen the one of that id, and own it.

        Args:
            uri: tracking URI; None tracks nothing.
            experiment: name of the experiment; created if there is none.
            run_name: name of a new run.
            run_id: a run to reopen.

        Raises:
            StorageError: MLflow cannot start a run. From then on nothing is raised: what fails is
                retried, and a warning says so. Nor is it when a run is reopened: a run that is
                resumed while MLflow is away goes on.
        """
        if uri is not None:
            try:
                run_id = _open_run(uri, experiment, run_name, run_id)
            except Exception as error:
                if run_id is not None and not _is_final(error):
                    logger.warning(
                        "MLflow at %s does not answer; training goes on: %s",
                        *(redact(uri), redact(str(error))),
                    )
                    return cls._owned(uri, run_id)
                raise StorageError(
                    f"MLflow at {redact(uri)}: cannot start a run in experiment {experiment!r}: "
                    f"{redact(str(error))}; check --tracking.uri, or turn tracking off"
                ) from error
        return cls._owned(uri, run_id)

    @classmethod
    def _owned(cls, uri: str | None, run_id: str | None) -> Tracker:
        tracker = cls(uri, run_id, system_metrics=False)
        tracker._owner = True
        return tracker

    @property
    def enabled(self) -> bool:
        """Whether anything is tracked."""
        return self.uri is not None and self.run_id is not None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._owner:
            self.close()
        elif kind is None:
            self.finish("FINISHED")
        else:
            killed = issubclass(kind, KeyboardInterrupt | Interrupted)
            self.finish("KILLED" if killed else "FAILED")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log values at a global step; returns at once."""
        if self._thread is None:
            return
        now = time.time_ns() // 1_000_000
        points = [Point(name, float(value), now, step) for name, value in metrics.items()]
        with self._lock:
            self._buffer += points

    def log_parameters(self, parameters: Mapping[str, object]) -> None:
        """Log a flat configuration; names that sound like secrets are left out."""
        if not self.enabled:
            return
        from mlflow.entities import Param

        params = [Param(name, value) for name, value in _public(parameters)]
        for part in _chunks(params, PARAMETERS_PER_BATCH):
            self._attempt(
                "parameters", lambda client, run, part=part: client.log_batch(run, params=part)
            )

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Set tags; those that are None or sound like secrets are left out."""
        if not self.enabled:
            return
        from mlflow.entities import RunTag

        given = {name: value for name, value in tags.items() if value is not None}
        for part in _chunks([RunTag(*item) for item in _public(given)], PARAMETERS_PER_BATCH):
            self._attempt("tags", lambda client, run, part=part: client.log_batch(run, tags=part))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Upload a file into a folder of the run's artifacts."""
        self._attempt(str(path), lambda client, run: client.log_artifact(run, str(path), folder))

    def log_artifacts(self, path: Path, folder: str | None = None) -> None:
        """Upload a folder's content into a folder of the run's artifacts."""
        self._attempt(str(path), lambda client, run: client.log_artifacts(run, str(path), folder))

    def close(self, timeout: float = 30.0) -> None:
        """Send what is buffered and stop, leaving the run's status as it is.

        Args:
            timeout: seconds to go on trying; what is unsent then is given up with a warning.
        """
        if self._thread is None:
            return
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        self._thread.join(timeout)
        self._thread = None
        if self._buffer:
            logger.warning(
                "MLflow: %d values of run %s were never sent; its checkpoints have them, and "
                "--resume sends them",
                *(len(self._buffer), self.run_id),
            )

    def finish(self, status: Status = "FINISHED") -> None:
        """Send what is buffered and end the run."""
        self.close()
        self._attempt("status", lambda client, run: client.set_terminated(run, status))

    def _attempt(self, what: str, call: Callable[[MlflowClient, str], object]) -> None:
        """Make a call now, up to three times; a warning is all that is left of a failure."""
        if self.uri is None or self.run_id is None:
            return
        for wait in (1.0, 4.0, None):
            try:
                call(connect(self.uri), self.run_id)
                return
            except Exception as error:
                if wait is None or _is_final(error):
                    logger.warning("MLflow: %s not logged: %s", what, redact(str(error)))
                    return
                time.sleep(wait)

    def _work(self) -> None:
        """Send the buffer now and then, until it is closed and empty or out of time."""
        monitor = None
        begun = False
        wait = self._interval
        while True:
            closing = self._closing.wait(wait)
            if time.monotonic() >= self._deadline:
                break  # given up, and said so
            try:
                if not begun:
                    self._learn_last_steps()
                    monitor = self._start_monitor()
                    begun = True
                self._send()
                wait = self._interval
            except Exception as error:
                self._warn_once(error)
                wait = min(2 * wait, LONGEST_WAIT)
                if closing:
                    time.sleep(min(wait, 1.0, max(0.0, self._deadline - time.monotonic())))
                    continue
            if closing:
                break
        if monitor is not None:
            monitor.finish()

    def _learn_last_steps(self) -> None:
        assert self.uri is not None
        assert self.run_id is not None
        # The message form of a run is the one public place that has the steps: its dictionary of
        # metrics has values alone, and histories would have to be read whole.
        for metric in connect(self.uri).get_run(self.run_id).data.to_proto().metrics:
            self._last_steps[metric.key] = metric.step

    def _start_monitor(self) -> Any:
        if not self._system_metrics:
            return None
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=self.uri)
        monitor.start()
        return monitor

    def _send(self) -> None:
        """Send the buffer. A point leaves it once MLflow has it, or will never take it."""
        assert self.uri is not None
        assert self.run_id is not None
        client = connect(self.uri)
        from mlflow.entities import Metric

        while True:
            with self._lock:
                points = self._buffer[:METRICS_PER_BATCH]
            if not points:
                return
            fresh = [Metric(*p) for p in points if p.step > self._last_steps.get(p.name, -1)]
            try:
                # A batch that MLflow took although the answer was lost is sent again; it knows
                # equal points by name, time, step and value.
                client.log_batch(self.run_id, metrics=fresh)
            except Exception as error:
                if _status(error) not in UNACCEPTABLE:
                    raise
                logger.warning("MLflow refuses %d values: %s", len(fresh), redact(str(error)))
            with self._lock:
                del self._buffer[: len(points)]

    def _warn_once(self, error: Exception) -> None:
        if not self._warned:
            logger.warning(
                "MLflow at %s takes no values now; training goes on, they are kept and retried: %s",
                redact(str(self.uri)),
                redact(str(error)),
            )
        self._warned = True


@functools.cache
def connect(uri: str) -> MlflowClient:
    """A client of the tracking server and the model registry at a URI."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Its own retries go on for minutes; the tracker's do it better.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # Artifacts on S3 go through boto3's own retries: a minute of them, not two seconds.
    os.environ.setdefault("AWS_RETRY_MODE", "standard")
    os.environ.setdefault("AWS_MAX_ATTEMPTS", "12")
    from mlflow import MlflowClient

    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    # It would warn at each retry, where the tracker warns once.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    return MlflowClient(uri, registry_uri=uri)


def local_tracking(folder: Path) -> str:
    """The tracking URI of a SQLite file in a folder; runs' artifacts go to a folder beside it."""
    folder = folder.expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


def code_commit() -> str | None:
    """The git commit of this code, `-dirty` if it was changed; None where that is unknown.

    `REID_COMMIT` in the environment says it where the code runs without its repository.
    """
    if commit := os.environ.get("REID_COMMIT"):
        return commit
    here = Path(__file__)
    git = functools.partial(
        subprocess.run, cwd=here.parent, capture_output=True, text=True, timeout=10
    )
    try:
        # Installed inside somebody else's repository, the code is not that repository's.
        if git(["git", "ls-files", "--error-unmatch", here.name]).returncode:
            return None
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return git(describe).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def submitted_job() -> str | None:
    """The submission id of the Ray job that this process is the driver of, if it is one."""
    try:
        told = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        return told.get("metadata", {}).get("job_submission_id")
    except (ValueError, AttributeError):
        return None


def without_password(uri: str) -> str:
    """The tracking URI itself; it is kept in configurations and reports, so it may hold no secret.

    Raises:
        ConfigError: there is a user or a password in it.
    """
    if redact(uri) != uri:
        raise ConfigError(
            f"leave user and password out of the tracking URI ({redact(uri)}): it is stored with "
            "the run. Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return uri


def redact(text: str) -> str:
    """Leave out the user and the password of URLs."""
    return _USER_INFO.sub("", text)


def _open_run(uri: str, experiment: str, run_name: str | None, run_id: str | None) -> str:
    client = connect(uri)
    if run_id is not None:
        client.update_run(run_id, status="RUNNING")
        return run_id
    found = client.get_experiment_by_name(experiment)
    if found is not None:
        identifier = found.experiment_id
    else:
        location = _local_artifacts(uri)
        identifier = client.create_experiment(experiment, artifact_location=location)
    return client.create_run(identifier, run_name=run_name).info.run_id


def _local_artifacts(uri: str) -> str | None:
    """Beside a SQLite file; by default they would go wherever the process happens to stand."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).resolve().parent / "artifacts").as_uri()


def _public(values: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if not _SECRET_NAME.search(name):
            yield name, redact(str(value))


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _is_final(error: Exception) -> bool:
    """Whether MLflow refused what was said, so that saying it again soon is no use."""
    return 400 <= _status(error) < 500 and _status(error) not in (408, 429)


def _status(error: Exception) -> int:
    return getattr(error, "get_http_status_code", lambda: 500)()
