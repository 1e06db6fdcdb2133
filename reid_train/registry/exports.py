"""Exported files of registered versions: artifacts of the run, named by tags of the version."""

import hashlib
import json
from pathlib import Path
from typing import Any

from data_shards.errors import DataError
from data_shards.storage.atomic import require_sha256
from reid_train.registry.load import find_version
from reid_train.registry.registry import mlflow_errors
from reid_train.tracking.server import connect
from reid_train.tracking.uris import registry_uri

TAG = "export"  # of tags: export.onnx.fp32, …


def record_export(
    location: str, path: Path, kind: str, facts: dict[str, Any], tracking_uri: str | None = None
) -> None:
    """Log an exported file to the run of a registered version, and what it is as a tag.

    `kind` is its format and precision, such as `onnx.fp32`; a version has one file of each.
    """
    uri = registry_uri(tracking_uri)
    with mlflow_errors(f"logging the export of {location}", uri):
        client = connect(uri)
        version = find_version(client, location, uri)
        folder = f"export/{version.name}-{version.version}"
        client.log_artifact(str(version.run_id), str(path), folder)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        text = json.dumps({"file": f"{folder}/{path.name}", "sha256": digest, **facts})
        client.set_model_version_tag(version.name, version.version, f"{TAG}.{kind}", text)


def fetch_export(location: str, folder: Path, tracking_uri: str | None = None) -> Path:
    """Fetch the ONNX file that `export` logged for a registered version, in float32 if it has it.

    Raises:
        DataError: the version was not exported, or the file is another one now.
    """
    uri = registry_uri(tracking_uri)
    with mlflow_errors(f"loading the ONNX file of {location}", uri):
        client = connect(uri)
        version = find_version(client, location, uri)
        kinds = [f"{TAG}.onnx.{precision}" for precision in ("fp32", "fp16")]
        text = next((version.tags[kind] for kind in kinds if kind in version.tags), None)
        if text is None:
            raise DataError(
                f"{location} was not exported to ONNX: `export --model {location} --out FILE.onnx` "
                "does it"
            )
        known = json.loads(text)
        path = Path(client.download_artifacts(str(version.run_id), known["file"], str(folder)))
    with path.open("rb") as file:
        require_sha256(location, hashlib.file_digest(file, "sha256").hexdigest(), known["sha256"])
    return path
