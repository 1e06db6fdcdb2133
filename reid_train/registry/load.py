"""Load a model: a registered one, a checkpoint, or the best checkpoint of a run."""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from data_shards.errors import ConfigError, DataError, ObjectMissing
from data_shards.storage import LocalStorage, open_storage
from reid_train.registry.registry import MISSING, all_pages, mlflow_errors
from reid_train.tracking.server import connect
from reid_train.tracking.uris import redact, registry_uri
from reid_train.training.checkpoint import CONFIG, MODEL

if TYPE_CHECKING:
    import torch
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from reid_train.model.embedder import Embedder

SUMMARY = "report/summary.json"
"""File of a finished run that has its metrics and the name of its best checkpoint."""
_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))")


def load(
    uri: str | Path, *, tracking_uri: str | None = None, device: "torch.device | str | None" = None
) -> "Embedder":
    """Load a registered model or a checkpoint.

    Args:
        uri: `models:/name@champion`, `models:/name/3`, or the folder or s3:// URL of a checkpoint
            or of a finished run, whose best checkpoint is taken.
        tracking_uri: where models are registered; None takes MLFLOW_TRACKING_URI, or ./mlflow.db.
        device: where to run; None takes a GPU if there is one.

    Raises:
        DataError: what is there is not a model.
        StorageError: it is not there, or cannot be read.
    """
    with fetched(uri, tracking_uri) as folder:
        from reid_train.model.embedder import Embedder

        return Embedder.from_folder(folder, device)


@contextmanager
def fetched(uri: str | Path, tracking_uri: str | None = None) -> Iterator[Path]:
    """The folder that has a model's files, until the end of the block; see `load`."""
    with tempfile.TemporaryDirectory(prefix="reid-model-") as temporary:
        folder = fetch(uri, Path(temporary), tracking_uri)
        try:
            yield folder
        except DataError as error:
            # The person knows the address that was given, not a temporary folder.
            raise DataError(str(error).replace(str(folder), str(uri).rstrip("/"))) from error


def fetch(uri: str | Path, folder: Path, tracking_uri: str | None = None) -> Path:
    """Fetch a model into `folder` if it is not on this machine; return the folder that has it."""
    location = str(uri)
    if location.startswith("models:/"):
        return _download(location, registry_uri(tracking_uri), folder)
    storage = open_storage(best_checkpoint(location))
    if isinstance(storage, LocalStorage):
        return storage.root
    try:
        for file in (MODEL, CONFIG):
            storage.download(file, folder / file)
    except ObjectMissing as error:
        raise _no_model(location, error) from None
    return folder


def require_model(model: str, tracking_uri: str | None = None) -> None:
    """Raise what `load` raises if there is no such model, before PyTorch is imported."""
    if model.startswith("models:/"):
        pinned(model, tracking_uri)
        return
    folder = open_storage(best_checkpoint(model))
    for file in (MODEL, CONFIG):
        if not folder.exists(file):
            raise _no_model(model, f"it has no {file}")


def _no_model(place: str, reason: object) -> ObjectMissing:
    return ObjectMissing(
        f"{place} is not a model: {reason}; give models:/name@champion, or the folder of a "
        "finished run or of a checkpoint"
    )


def best_checkpoint(run: str) -> str:
    """Return the best checkpoint of a finished run; anything that is not a run as it is.

    Raises `DataError` if the run was stopped, or its summary names no checkpoint.
    """
    folder = open_storage(run)
    if folder.exists(CONFIG):
        return run
    try:
        name = json.loads(folder.read(SUMMARY))["checkpoint"]
        return folder.child(PurePosixPath(name).name).url
    except ObjectMissing:
        found = [key.rpartition("/")[0] for key, _ in folder.list() if key.endswith(f"/{MODEL}")]
        if not found and folder.exists("run.json"):
            raise DataError(f"{run} is a run that has no checkpoint yet: wait for it") from None
        if not found:
            return run
        places = ", ".join(folder.child(name).url for name in sorted(found))
        raise DataError(
            f"{run} is a run that has not finished, so its best checkpoint is not known: give one "
            f"of its checkpoints: {places}"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{run} is a run whose {SUMMARY} names no checkpoint ({error!r}): give the folder of a "
            "checkpoint"
        ) from error


def _download(location: str, uri: str, folder: Path) -> Path:
    """Fetch the files of `models:/name@alias` or `models:/name/version`."""
    # MLflow's own functions for such addresses use the registry of the whole process.
    from mlflow.artifacts import download_artifacts

    with mlflow_errors(f"loading {location}", uri):
        client = connect(uri)
        version = find_version(client, location, uri)
        source = client.get_model_version_download_uri(version.name, version.version)
        place = f"{source}/artifacts"
        folder = Path(download_artifacts(place, dst_path=str(folder), tracking_uri=uri))
    for file in (MODEL, CONFIG):
        if not (folder / file).exists():
            raise DataError(
                f"{location} at {redact(uri)} is not a model of this project: it has no {file}"
            )
    return folder


def find_version(client: "MlflowClient", location: str, uri: str) -> "ModelVersion":
    """The version that `models:/name@alias` or `models:/name/version` names."""
    from mlflow.exceptions import MlflowException

    match = _MODEL_URI.fullmatch(location)
    if match is None:
        raise ConfigError(f"{location}: not models:/name@alias or models:/name/version")
    name, alias, version = match.group("name", "alias", "version")
    try:
        if alias:
            version = client.get_model_version_by_alias(name, alias).version
        return client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code not in MISSING:
            raise
        raise ObjectMissing(
            f"{location} is not registered at {redact(uri)}; {_registered(client, name)}"
        ) from None


def pinned(model: str, tracking_uri: str | None = None) -> str:
    """The version `models:/name/3` that an alias marks now; any other model as it is."""
    if not model.startswith("models:/"):
        return model
    uri = registry_uri(tracking_uri)
    with mlflow_errors(f"looking up {model}", uri):
        version = find_version(connect(uri), model, uri)
    return f"models:/{version.name}/{version.version}"


def _registered(client: "MlflowClient", name: str) -> str:
    """What a person can choose from instead of a model that is not registered."""
    models = {model.name: model for model in all_pages(client.search_registered_models)}
    if name not in models:
        return f"the registered models are: {', '.join(sorted(models)) or 'none'}"
    found = all_pages(client.search_model_versions, f"name = '{name}'")
    versions = ", ".join(str(v) for v in sorted(int(item.version) for item in found)) or "none"
    aliases = ", ".join(f"{a} ({v})" for a, v in sorted(models[name].aliases.items())) or "none"
    return f"{name} has the versions {versions} and the aliases {aliases}"
