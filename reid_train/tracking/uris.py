"""Tracking URIs: which one to use, and what of it may be shown."""

import os
import re
from pathlib import Path

from data_shards.errors import ConfigError
from data_shards.storage import LocalStorage, open_storage

_SQLITE = "sqlite:///"
_USER_INFO = re.compile(r"(?<=://)[^/\s]*@")
# A password in a database's address may have slashes, or be a parameter.
_DATABASE = re.compile(r"\b((?:postgres\w*|mysql|mariadb|mssql|oracle)(?:\+\w+)?://)\S*@")
_PARAMETER = re.compile(r"(?<=[?&])(user|password)=[^&\s]*")


def training_uri(given: str | None, output: str) -> str:
    """Choose where a training is tracked: as given, at MLFLOW_TRACKING_URI, or in a SQLite file.

    The file is in the folder `output`, where runs are kept, or in the working folder if that is on
    S3. Only workers on this machine can reach it: a cluster needs a server.
    """
    if chosen := given or os.environ.get("MLFLOW_TRACKING_URI"):
        return without_password(chosen)
    storage = open_storage(output)
    return local_tracking(storage.root if isinstance(storage, LocalStorage) else Path())


def registry_uri(given: str | None) -> str:
    """Choose where models are registered: as given, MLFLOW_TRACKING_URI, or a ./mlflow.db."""
    if chosen := given or os.environ.get("MLFLOW_TRACKING_URI"):
        return without_password(chosen)
    if Path("mlflow.db").exists():
        return local_tracking(Path())
    raise ConfigError(
        "no tracking URI: give --tracking-uri, such as sqlite:////path/of/the/runs/mlflow.db or "
        "a server's address, or set MLFLOW_TRACKING_URI"
    )


def local_tracking(folder: Path) -> str:
    """Tracking URI of the SQLite file in a folder, which is made if it is not there."""
    folder = folder.expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return f"{_SQLITE}{folder / 'mlflow.db'}"


def artifacts_beside(uri: str) -> str | None:
    """Where the artifacts of a SQLite file's runs are kept; None for a server, which decides it."""
    # MLflow's default is the working folder of whichever process comes first.
    file = sqlite_file(uri)
    return None if file is None else (file.resolve().parent / "artifacts").as_uri()


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a SQLite URI; None if it is another URI."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def without_password(uri: str) -> str:
    """Return a URI that may be stored with a run; raise `ConfigError` if it holds a password."""
    if redact(uri) != uri:
        raise ConfigError(
            f"leave user and password out of the tracking URI ({redact(uri)}): it is stored with "
            "the run. Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return uri


def redact(text: str) -> str:
    """Remove the user and the password from URLs in a text."""
    return _PARAMETER.sub(r"\1=", _USER_INFO.sub("", _DATABASE.sub(r"\1", text)))
