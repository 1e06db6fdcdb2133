"""Connect to MLflow, check names and that it answers, and explain its errors in one line."""

import functools
import logging
import multiprocessing
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from typing import TYPE_CHECKING

from data_shards.errors import ConfigError, StorageError
from data_shards.storage.retry import bypass_proxy
from reid_train.tracking.uris import redact, sqlite_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

LONGEST = 250  # characters of a name; SQLite takes more, but other databases have such columns
_NOT_IN_MODELS = "/:.%\"'?@"
"""MLflow refuses the first six in the name of a model; ? and @ have a meaning in models:/…"""
ANSWER_SECONDS = 25.0  # how long `require_experiment` waits for a server
FILE_SECONDS = 300.0  # and for a file: on a busy machine it takes a minute to make its tables
QUIET = (
    "alembic",
    "mlflow.pyfunc",
    "mlflow.store.db.utils",
    "mlflow.store.model_registry.abstract_store",
    "mlflow.system_metrics",
)
"""Loggers that print MLflow's own work to the terminal, at INFO."""
_ARTIFACTS = re.compile(r"while downloading one or more artifacts from (\S+):")
_CAUSE = re.compile(r"Caused by (\w+)\((.*)\)\)$", re.S)
_REASONS = {
    "NewConnectionError": "nothing listens there",
    "NameResolutionError": "its host name is not known",
    "ConnectTimeoutError": "it does not answer",
    "ReadTimeoutError": "it does not answer",
    "SSLError": "TLS fails: the server may want http:// instead of https://, or its certificate is "
    "not trusted",
    "ProxyError": "the proxy of HTTP_PROXY or HTTPS_PROXY does not reach it; see NO_PROXY",
}
_KNOWN = {
    "unable to open database file": "the file cannot be opened: check its path and permissions",
    "file is not a database": "the file is not a SQLite database: give another path",
    "readonly database": "the file may not be written: check its permissions",
    "database is locked": "another process keeps the file locked: stop it, or use an MLflow server",
    "out-of-date database schema": "the database is of another MLflow than {version}. If that is "
    "older, make a backup and run: mlflow db upgrade {uri}. If it is newer, install that version",
    "filesystem tracking backend": "MLflow keeps no runs in plain folders any more: give "
    "sqlite:////path/mlflow.db, or a server with http:// before its address",
    "unsupported URI": "MLflow does not know such addresses: give http://host:port, or "
    "sqlite:////path/mlflow.db",
    "not in a valid JSON format": "the server there is not MLflow: check host, port and path",
    "error code 302": "it redirects to a login page, or is not MLflow: check host, port and path",
}


@functools.cache
def connect(uri: str) -> "MlflowClient":
    """A client of the tracking server and the model registry at a URI."""
    settings = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # MLflow's own retries take minutes; the tracker retries instead.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        # boto3 retries what goes to artifacts on S3: for a minute, not for two seconds.
        "AWS_RETRY_MODE": "standard",
        "AWS_MAX_ATTEMPTS": "12",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    for address in (uri, os.environ.get("MLFLOW_S3_ENDPOINT_URL", "")):
        bypass_proxy(address)
    from mlflow import MlflowClient

    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    # It would warn at each retry; the tracker warns once.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    return MlflowClient(uri, registry_uri=uri)


def require_names(
    *, model: str | None = None, experiment: str | None = None, run: str | None = None
) -> None:
    """Raise `ConfigError` if MLflow does not accept a name; None is not checked."""
    for what, flag, name in (
        ("model", "--tracking.model-name", model),
        ("experiment", "--tracking.experiment", experiment),
        ("run", "--name", run),
    ):
        if name is None:
            continue
        bad = sorted({c for c in name if not c.isprintable()})
        if what == "model":
            bad += sorted(set(name) & set(_NOT_IN_MODELS))
        if bad:
            shown = " ".join(c if c.isprintable() else repr(c) for c in bad)
            raise ConfigError(
                f"{flag} {name!r}: MLflow does not accept {shown} in the name of a {what}; "
                f"{accepted(name)!r} is one that it accepts"
            )
        if not name or name != name.strip() or len(name) > LONGEST:
            short = name if len(name) <= 40 else f"{name[:40]}…"
            raise ConfigError(
                f"{flag} {short!r} has {len(name)} characters; MLflow needs 1 to {LONGEST}, "
                "without spaces at the ends"
            )


def accepted(name: str) -> str:
    """The most similar name that MLflow accepts for a model."""
    kept = "".join(c if c.isprintable() and c not in _NOT_IN_MODELS else "-" for c in name)
    return re.sub("-+", "-", kept).strip("- ")[:LONGEST] or "model"


def require_experiment(uri: str, experiment: str) -> None:
    """Raise, within half a minute, if a server does not answer or an experiment is deleted.

    The experiment need not exist, since a run creates it.
    """
    limit = FILE_SECONDS if sqlite_file(uri) else ANSWER_SECONDS
    try:
        with ThreadPool(1) as pool:  # MLflow may retry for minutes
            call = pool.apply_async(lambda: connect(uri).get_experiment_by_name(experiment))
            found = call.get(limit)
    except Exception as error:
        late = isinstance(error, multiprocessing.TimeoutError)
        why = f"it does not answer within {limit:.0f} s" if late else explain(error, uri)
        raise StorageError(
            f"MLflow at {redact(uri)}: {why}. Correct --tracking.uri, or use --tracking.uri off"
        ) from error
    if found is None:
        return
    if found.name != experiment:
        raise StorageError(f"MLflow at {redact(uri)}: the server there is not MLflow")
    if found.lifecycle_stage == "deleted":
        raise ConfigError(
            f"MLflow at {redact(uri)}: experiment {experiment!r} is deleted. Restore it with "
            f"MLFLOW_TRACKING_URI={redact(uri)} mlflow experiments restore --experiment-id "
            f"{found.experiment_id}, or give another --tracking.experiment"
        )


def run_page(uri: str, run_id: str) -> str:
    """Where to look at a run: its page on a server, or the command that serves a SQLite file."""
    try:
        experiment = connect(uri).get_run(run_id).info.experiment_id
    except Exception:  # MLflow's errors have no common base, and this is only for printing
        return f"run {run_id} at {redact(uri)}"
    page = f"#/experiments/{experiment}/runs/{run_id}"
    if uri.startswith(("http://", "https://")):
        return f"{redact(uri).rstrip('/')}/{page}"
    command = f"mlflow ui --backend-store-uri {shlex.quote(redact(uri))}"
    return f"{command}, then open http://127.0.0.1:5000/{page}"


def has_run(uri: str | None, run_id: str) -> bool:
    """Return whether MLflow has a run; True if it does not answer."""
    try:
        return uri is not None and connect(uri).get_run(run_id) is not None
    except Exception as error:
        return not is_final(error)


def last_step(uri: str | None, run_id: str | None, metric: str) -> int | None:
    """Return the last step of a run's metric; None if it has none or MLflow does not answer."""
    if uri is None or run_id is None:
        return None
    try:
        found = connect(uri).get_run(run_id).data.to_proto().metrics
    except Exception as error:
        logger.warning("MLflow at %s does not answer: %s", redact(uri), explain(error, uri))
        return None
    return next((point.step for point in found if point.key == metric), None)


def explain(error: Exception, uri: str) -> str:
    """Say in one line, without secrets, what an error of MLflow means and what to do."""
    import mlflow

    text = redact(str(error))
    first_line = text.strip().partition("\n")[0]
    for part, reason in _KNOWN.items():
        if part in text:
            return reason.format(uri=redact(uri), version=mlflow.__version__)
    code = getattr(error, "error_code", "")
    if code == "UNAUTHENTICATED":
        login = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return f"it wants a login (401): set {login}"
    if code == "PERMISSION_DENIED":
        return f"it refuses access (403): use the login of a user who has it ({first_line})"
    if code == "ENDPOINT_NOT_FOUND":
        return "the server there is not MLflow (404): check host, port and path"
    if artifacts := _ARTIFACTS.search(text):
        return (
            f"it has the files at {artifacts[1]}, and they cannot be read there. If they were "
            "moved, move them back, or make that place a link to them"
        )
    if cause := _CAUSE.search(text):
        kind, detail = cause.groups()
        return f"it cannot be reached: {_REASONS.get(kind) or detail.strip(chr(39))}"
    return first_line or type(error).__name__


def is_final(error: Exception) -> bool:
    """Whether MLflow refused the request itself, so that it is no use to repeat it soon."""
    return 400 <= status(error) < 500 and status(error) not in (408, 429)


@contextmanager
def unless_there() -> Iterator[None]:
    """Accept that what the block creates is there: another process made it at the same time."""
    try:
        yield
    except Exception as error:
        if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
            raise


def status(error: Exception) -> int:
    """HTTP status of an error of MLflow; 500 for any other error."""
    return getattr(error, "get_http_status_code", lambda: 500)()
