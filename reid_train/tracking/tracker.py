"""Log runs to MLflow. No other file writes to a run.

Metrics are buffered and sent by a background thread: a slow or absent MLflow neither delays nor
stops a training step. If a process ends before it has sent all, the run's last checkpoint has the
rest. The next process logs the checkpoint's history again and skips what MLflow already has.

The driver owns the run: `Tracker.start` opens it, and it ends with the context. A worker joins it
by its id, as `Tracker(uri, run_id)`, and logs the steps.
"""

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from data_shards.errors import Interrupted, StorageError
from reid_train.tracking.server import connect, explain, is_final, status, unless_there
from reid_train.tracking.uris import artifacts_beside, redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

# What MLflow takes in one log_batch call.
METRICS_PER_BATCH = 1000
TEXTS_PER_BATCH = 100
LONGEST_WAIT = 60.0
UNACCEPTABLE = {400, 413, 422}
"""HTTP status of values that MLflow will never take. 401, 403 and 404 are not among them: a gateway
answers so while credentials have expired or a route is gone."""
KIND, TRAINING = "mlflow.experimentKind", "custom_model_development"
"""Tag that lets an experiment open on its training runs in MLflow's pages. Without it the page for
traces of language models opens."""
_SECRET_NAME = re.compile(r"secret|password|passwd|token|credential|access_?key|api_?key", re.I)


class Tracker:
    """Log to an MLflow run. As a context it sends everything on exit, and ends a run that it owns.

    It first asks MLflow for the last step of each metric and skips values up to that step. So a
    training that restarts from an older checkpoint can log its steps again.

    Args:
        uri, run_id: the MLflow and its run. If one is None, nothing is tracked.
        owner: end the run when the context ends; `start` sets it.
        system_metrics: log CPU, memory, disk, network and GPU use of this machine.
        interval: seconds between two sends.
        may_send: asked before each send; once it says no, this process sends nothing more: another
            driver has the run, and logs its steps.
    """

    def __init__(
        self,
        uri: str | None,
        run_id: str | None,
        *,
        owner: bool = False,
        system_metrics: bool = True,
        interval: float = 3.0,
        may_send: Callable[[], bool] | None = None,
    ) -> None:
        self.uri, self.run_id, self._owner = uri, run_id, owner
        self._system_metrics, self._interval, self._may_send = system_metrics, interval, may_send
        self._last_steps: dict[str, int] = {}
        self._buffer: list[tuple[str, float, int, int]] = []  # name, value, time in ms, step
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._warned = False
        self._thread: threading.Thread | None = None
        if uri is not None and run_id is not None:
            arguments = {"args": (uri, run_id), "name": "mlflow-tracker", "daemon": True}
            self._thread = threading.Thread(target=self._work, **arguments)
            self._thread.start()

    @classmethod
    def start(
        cls,
        uri: str | None,
        experiment: str,
        *,
        run_name: str | None = None,
        run_id: str | None = None,
    ) -> Self:
        """Start a run, or reopen the one of that id, and own it. A URI of None tracks nothing.

        It is a `StorageError` if MLflow cannot start a run. A run is also reopened if MLflow does
        not answer. After that no error is raised: failed calls are repeated, with a warning.
        """
        if uri is not None:
            try:
                run_id = _open_run(uri, experiment, run_name, run_id)
            except Exception as error:
                reason = explain(error, uri)
                if run_id is None or is_final(error):
                    raise StorageError(
                        f"MLflow at {redact(uri)}: cannot start a run in experiment "
                        f"{experiment!r}: {reason}; check --tracking.uri, or turn tracking off"
                    ) from error
                logger.warning(
                    "MLflow at %s does not answer; training continues: %s", redact(uri), reason
                )
        return cls(uri, run_id, owner=True, system_metrics=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._owner:
            self.close()
        elif kind is None:
            self.finish()
        else:
            killed = issubclass(kind, KeyboardInterrupt | Interrupted)
            self.finish("KILLED" if killed else "FAILED")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log values at a global step. Returns at once."""
        if self._thread is None:
            return
        now = time.time_ns() // 1_000_000
        with self._lock:
            self._buffer += [(name, float(value), now, step) for name, value in metrics.items()]

    def log_parameters(self, parameters: Mapping[str, object]) -> None:
        """Log a flat configuration, without names that look like secrets."""
        self._log_texts("params", "Param", parameters)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Set tags, without those that are None or whose names look like secrets."""
        given = {name: value for name, value in tags.items() if value is not None}
        self._log_texts("tags", "RunTag", given)

    def _log_texts(self, what: str, entity: str, values: Mapping[str, object]) -> None:
        """Log values as text, in batches of MLflow's entities of this kind."""
        if self.uri is None or self.run_id is None:
            return
        from mlflow import entities

        public = {k: redact(str(v)) for k, v in values.items() if not _SECRET_NAME.search(k)}
        made = [getattr(entities, entity)(name, text) for name, text in public.items()]
        for start in range(0, len(made), TEXTS_PER_BATCH):
            self._attempt(what, "log_batch", **{what: made[start : start + TEXTS_PER_BATCH]})

    def log_artifacts(self, path: Path, folder: str | None = None) -> None:
        """Upload the content of a folder into a folder of the run's artifacts."""
        self._attempt(str(path), "log_artifacts", str(path), folder)

    def close(self, timeout: float = 30.0) -> None:
        """Send what is buffered, for `timeout` seconds at most, and stop. The run stays open."""
        if self._thread is None:
            return
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        self._thread.join(timeout)
        self._thread = None
        if self._buffer:
            logger.warning(
                "MLflow: %d values of run %s were not sent. The run's checkpoints have them: "
                "it sends them if it is resumed",
                *(len(self._buffer), self.run_id),
            )

    def finish(self, status: str = "FINISHED") -> None:
        """Send what is buffered and end the run as FINISHED, FAILED or KILLED."""
        self.close()
        self._attempt("status", "set_terminated", status)

    def _attempt(self, what: str, method: str, *arguments: object, **options: object) -> None:
        """Call a method of MLflow's client now, up to three times. A failure is only a warning."""
        if self.uri is None or self.run_id is None:
            return
        for wait in (1.0, 4.0, None):
            try:
                getattr(connect(self.uri), method)(self.run_id, *arguments, **options)
                return
            except Exception as error:
                if wait is None or is_final(error):
                    logger.warning("MLflow: %s not logged: %s", what, redact(str(error)))
                    return
                time.sleep(wait)

    def _work(self, uri: str, run_id: str) -> None:
        """Send the buffer again and again, until it is closed and empty, or out of time."""
        monitor, begun, wait = None, False, self._interval
        while True:
            closing = self._closing.wait(wait)
            if time.monotonic() >= self._deadline:
                break  # `close` warns of it
            try:
                if self._buffer and self._may_send and not self._may_send():
                    logger.warning(
                        "MLflow: another driver has %s now; this one sends no more", run_id
                    )
                    self._thread = None  # so that `log` takes nothing more
                    with self._lock:
                        self._buffer.clear()
                    break
                client = connect(uri)
                if not begun:
                    # Only the message form of a run has the steps. Its dictionary of metrics has
                    # only values, and histories would have to be read in full.
                    for metric in client.get_run(run_id).data.to_proto().metrics:
                        self._last_steps[metric.key] = metric.step
                    if self._system_metrics:
                        monitor = _start_monitor(uri, run_id)
                    begun = True
                self._send(client, run_id)
                wait = self._interval
            except Exception as error:
                if not self._warned:
                    self._warned = True
                    logger.warning(
                        "MLflow at %s does not take values now. Training continues; values are kept"
                        " and sent later: %s",
                        *(redact(uri), redact(str(error))),
                    )
                wait = min(2 * wait, LONGEST_WAIT)
                if closing:
                    time.sleep(min(wait, 1.0, max(0.0, self._deadline - time.monotonic())))
                    continue
            if closing:
                break
        if monitor is not None:
            monitor.finish()

    def _send(self, client: "MlflowClient", run_id: str) -> None:
        """Send the buffer. A value leaves it once MLflow has it, or will never take it."""
        from mlflow.entities import Metric

        while True:
            with self._lock:
                points = self._buffer[:METRICS_PER_BATCH]
            if not points:
                return
            fresh = [
                Metric(name, value, when, step)
                for name, value, when, step in points
                if step > self._last_steps.get(name, -1)
            ]
            try:
                # If MLflow took a batch but its answer was lost, the batch is sent again. MLflow
                # drops values whose name, time, step and value it has.
                client.log_batch(run_id, metrics=fresh)
            except Exception as error:
                if status(error) not in UNACCEPTABLE:
                    raise
                logger.warning("MLflow refuses %d values: %s", len(fresh), redact(str(error)))
            with self._lock:
                del self._buffer[: len(points)]


def _open_run(uri: str, experiment: str, run_name: str | None, run_id: str | None) -> str:
    client = connect(uri)
    if run_id is not None:
        client.update_run(run_id, status="RUNNING")
        return run_id
    found = client.get_experiment_by_name(experiment)
    if found is not None:
        identifier = found.experiment_id
        if KIND not in found.tags:
            with contextlib.suppress(Exception):  # another user's experiment may refuse tags
                client.set_experiment_tag(identifier, KIND, TRAINING)
    else:
        place = {"artifact_location": artifacts_beside(uri), "tags": {KIND: TRAINING}}
        identifier = None
        with unless_there():
            identifier = client.create_experiment(experiment, **place)
        if identifier is None:  # another training made it at the same time
            found = client.get_experiment_by_name(experiment)
            assert found is not None
            identifier = found.experiment_id
    return client.create_run(identifier, run_name=run_name).info.run_id


def _start_monitor(uri: str, run_id: str) -> Any:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=uri)
    monitor.start()
    return monitor
