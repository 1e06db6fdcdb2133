"""Uploads to S3 in parts, which resume where an earlier one was interrupted."""

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import botocore.exceptions as boto

from data_shards.errors import StorageError
from data_shards.storage.atomic import atomic_write, file_sha256
from data_shards.storage.retry import code_of

if TYPE_CHECKING:
    from data_shards.storage.s3 import S3Storage

log = logging.getLogger(__name__)

PART_BYTES = 16 << 20  # of a part; smaller files are uploaded whole
PART_THREADS = 4
MAX_PARTS = 10_000  # S3's limit


def upload(storage: "S3Storage", key: str, path: Path, endpoint: str) -> None:
    """Upload a file in parts, resuming an earlier upload with the help of a note beside the file.

    A part's ETag does not identify its content. So the server's parts are used only if the note
    says that they belong to an upload of a file with the same SHA-256.
    """
    size, note = path.stat().st_size, path.with_name(path.name + ".upload.json")
    part_bytes = max(PART_BYTES, -(-size // MAX_PARTS))
    identity = {"url": f"{storage.url}/{key}", "endpoint": endpoint}
    identity |= {"sha256": file_sha256(path), "part_bytes": part_bytes}
    done, where = dict[int, dict[str, Any]](), storage._where(key)
    upload_id = _interrupted_upload(storage, key, note, identity)
    if upload_id is not None:
        try:
            listed = storage._pages(key, "list_parts", {"UploadId": upload_id, **where})
            done = {part["PartNumber"]: part for part in listed.get("Parts", ())}
            log.info("resuming the upload of %s: %d parts are done", key, len(done))
        except StorageError as error:
            log.info("starting the upload of %s again: %s", key, error)
            upload_id = None
    if upload_id is None:
        upload_id = storage._call(key, "create_multipart_upload")["UploadId"]
        with atomic_write(note) as file:
            file.write(json.dumps(identity | {"upload_id": upload_id}).encode())

    def put(number: int) -> dict[str, Any]:
        first = (number - 1) * part_bytes
        length, part = min(part_bytes, size - first), done.get(number)
        if part is None or part["Size"] != length:
            with path.open("rb") as file:
                body = os.pread(file.fileno(), length, first)
            ids = {"UploadId": upload_id, "PartNumber": number}
            part = storage._call(key, "upload_part", Body=body, **ids)
        return {"PartNumber": number, "ETag": part["ETag"]}

    with ThreadPoolExecutor(PART_THREADS) as pool:
        parts = list(pool.map(put, range(1, -(-size // part_bytes) + 1)))
    request = {"UploadId": upload_id, "MultipartUpload": {"Parts": parts}, **where}

    def complete(client: Any, again: bool) -> None:
        try:
            client.complete_multipart_upload(**request)
        except boto.ClientError as error:
            # Our earlier attempt may have completed it although its answer was lost.
            if code_of(error) != "NoSuchUpload" or not again:
                raise

    storage._try(key, complete)
    if storage.size(key) != size:
        raise StorageError(f"{storage.url}/{key} arrived with another size: try again")
    note.unlink()


def _interrupted_upload(
    storage: "S3Storage", key: str, note: Path, identity: dict[str, Any]
) -> str | None:
    """The id of an unfinished upload of the same file; one of another file is aborted."""
    try:
        known = json.loads(note.read_bytes())
        upload_id = str(known.pop("upload_id"))
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    if known == identity:
        return upload_id
    if (known.get("url"), known.get("endpoint")) == (identity["url"], identity["endpoint"]):
        try:  # the server would keep its parts for ever
            storage._call(key, "abort_multipart_upload", UploadId=upload_id)
        except StorageError as error:
            log.info("could not abort an old upload of %s: %s", key, error)
    return None
