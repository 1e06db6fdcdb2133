"""Files beside registered versions: artifacts of the run, each named by a tag of the version."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.errors import DataError, ObjectMissing
from data_shards.storage import open_storage
from data_shards.storage.atomic import file_sha256, require_sha256
from reid_train.evaluation.thresholds import Thresholds
from reid_train.registry.load import best_checkpoint, find_version
from reid_train.registry.registry import mlflow_errors
from reid_train.tracking.server import connect
from reid_train.tracking.uris import registry_uri
from reid_train.training.checkpoint import RANK_LIST

THRESHOLDS = "thresholds"  # the tag, and the key in a checkpoint's rank list


def attach(
    location: str, path: Path, tag: str, facts: Mapping[str, Any], tracking_uri: str | None = None
) -> None:
    """Log a file to the run of a registered version, and where it is, with `facts`, as a tag."""
    uri = registry_uri(tracking_uri)
    with mlflow_errors(f"logging {path.name} of {location}", uri):
        client = connect(uri)
        version = find_version(client, location, uri)
        folder = f"attached/{version.name}-{version.version}"
        client.log_artifact(str(version.run_id), str(path), folder)
        text = json.dumps({"file": f"{folder}/{path.name}", "sha256": file_sha256(path), **facts})
        client.set_model_version_tag(version.name, version.version, tag, text)


def fetch_attached(
    location: str, tags: Iterable[str], folder: Path, tracking_uri: str | None = None
) -> Path | None:
    """Fetch the file of the first of these tags that a registered version has; None without one.

    Raises:
        DataError: the file is another one now.
    """
    uri = registry_uri(tracking_uri)
    with mlflow_errors(f"loading what is beside {location}", uri):
        client = connect(uri)
        version = find_version(client, location, uri)
        text = next((version.tags[tag] for tag in tags if tag in version.tags), None)
        if text is None:
            return None
        known = json.loads(text)
        path = Path(client.download_artifacts(str(version.run_id), known["file"], str(folder)))
    require_sha256(f"{known['file']} of {location}", file_sha256(path), known["sha256"])
    return path


def find_thresholds(model: str, folder: Path, tracking_uri: str | None = None) -> Thresholds | None:
    """The thresholds of a registered version, or of a run's or a checkpoint's best evaluation."""
    if model.startswith("models:/"):
        path = fetch_attached(model, [THRESHOLDS], folder, tracking_uri)
        return None if path is None else Thresholds.from_json(json.loads(path.read_text()))
    storage, path = open_storage(best_checkpoint(model)), folder / RANK_LIST
    try:
        storage.download(RANK_LIST, path)
    except ObjectMissing:
        return None
    return in_rank_list(path)


def in_rank_list(path: Path) -> Thresholds | None:
    """The thresholds that an evaluation during training kept with its rank list."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            text = str(kept[THRESHOLDS]) if THRESHOLDS in kept else None
        return None if text is None else Thresholds.from_json(json.loads(text))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{path} does not hold thresholds: {error}") from error
