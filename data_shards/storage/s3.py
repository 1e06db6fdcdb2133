"""S3, or any compatible server, as a `Storage`.

boto3's stream ends with its connection, so `_stream` reads in a loop: each attempt resumes with a
`Range` from the byte reached, pinned to the object's version by its ETag. ETags are not taken for
MD5 sums: our own SHA-256 is checked, and data that differs is fetched once more. `retry.py` decides
which failures are retried and for how long. Messages carry the server's error code, never its free
text, which could repeat a credential.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import boto3.session
import botocore.exceptions as boto
from botocore.config import Config

from data_shards.errors import ConfigError, DataError, ObjectExists, ObjectMissing, StorageError
from data_shards.storage.atomic import atomic_write, disk_errors, file_sha256, require_sha256
from data_shards.storage.retry import CONNECTION_ERRORS, Retry, code_of

log = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
READ_SECONDS = 20.0  # without a byte, before a connection counts as broken
CHUNK = 1 << 20
PART_BYTES = 16 << 20  # of a multipart upload, used for files larger than this
PART_THREADS = 4
MAX_PARTS = 10_000  # S3's limit

T = TypeVar("T")

_DENIED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}
_DENIED |= {"InvalidToken", "401", "403"}
_WRONG_REGION = {"AuthorizationHeaderMalformed", "PermanentRedirect", "301"}
_MISSING = {"NoSuchKey", "NotFound", "404"}


class _CutOff(ConnectionError):
    """The server closed an answer before the end it announced."""


@lru_cache(maxsize=8)
def _client_of(process: int, environment: tuple[str | None, ...]) -> Any:
    # The process is part of the key because a client must not cross a fork. Each client has its own
    # session because boto3's default one is not safe among threads.
    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        retries={"total_max_attempts": 1},  # `retry.py` bounds and logs them instead
        max_pool_connections=16,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    # An instance profile's keys come from a service on the node, which boto3 asks only once.
    os.environ.setdefault("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "5")
    try:
        return boto3.session.Session().client("s3", config=config)
    except (ValueError, boto.BotoCoreError) as error:
        raise ConfigError(
            f"the S3 settings in the environment are wrong ({error}): check AWS_ENDPOINT_URL (such"
            " as http://host:port), AWS_DEFAULT_REGION and AWS_PROFILE"
        ) from None


def _client() -> Any:
    names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_PROFILE")
    names += ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION")
    return _client_of(os.getpid(), tuple(os.environ.get(name) for name in names))


@dataclass(frozen=True)
class S3Storage:
    """A bucket, or everything below a prefix in one. Cheap to copy, pickle and fork."""

    bucket: str
    prefix: str

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def _where(self, key: str) -> dict[str, str]:
        if not key or key.startswith("/") or ".." in key.split("/"):
            raise StorageError(f"{key!r} is not a key inside {self.url}")
        return {"Bucket": self.bucket, "Key": f"{self.prefix}/{key}" if self.prefix else key}

    def _fail(self, key: str, error: Exception) -> NoReturn:
        """Raise what went wrong, and what to do, as one line."""
        code, where = code_of(error), f"{self.url}/{key}"
        if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
            raise StorageError(
                f"no credentials for {self.url}: set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or "
                "give the machine an instance profile or service account"
            ) from None
        if code == "NoSuchBucket":
            raise StorageError(
                f"no bucket {self.bucket!r} on {_endpoint()}: create it, or check the name"
            ) from None
        if code in _MISSING:
            raise ObjectMissing(f"{where} does not exist") from None
        region = _region_in(error)
        if code in _WRONG_REGION or region not in (None, _client().meta.region_name):
            raise StorageError(
                f"{_endpoint()} expects {region or 'another region'} for {where}, not"
                f" {_client().meta.region_name}: set AWS_DEFAULT_REGION={region or ''}".rstrip("=")
            ) from None
        if code in _DENIED:
            raise StorageError(
                f"{_endpoint()} denies access to {where} ({code}): check AWS_ACCESS_KEY_ID,"
                " AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION and the bucket's permissions"
            ) from None
        if isinstance(error, CONNECTION_ERRORS):
            raise StorageError(
                f"cannot reach {_endpoint()} for {where} ({code} on every attempt):"
                " is AWS_ENDPOINT_URL right, and is the server running?"
            ) from None
        if isinstance(error, boto.ClientError | boto.BotoCoreError):
            raise StorageError(f"{_endpoint()} refuses access to {where} ({code})") from None
        raise error

    def _try(self, key: str, request: Callable[[Any], T]) -> T:
        retry = Retry()
        while True:
            try:
                return request(_client())
            except (boto.ClientError, boto.BotoCoreError, *CONNECTION_ERRORS) as error:
                if not retry.wait(f"{self.url}/{key} on {_endpoint()}", error):
                    self._fail(key, error)

    def _stream(
        self, key: str, sink: Callable[[bytes], object], start: int = 0, stop: int | None = None
    ) -> None:
        """Pass bytes [start, stop) to `sink`, each once, over as many connections as needed."""
        where, etag, position, retry = self._where(key), None, start, Retry()
        while stop is None or position < stop:
            request: dict[str, Any] = dict(where)
            if position or stop is not None:
                request["Range"] = f"bytes={position}-{'' if stop is None else stop - 1}"
            if etag is not None:
                request["IfMatch"] = etag
            try:
                response = _client().get_object(**request)
                if etag not in (None, response["ETag"]):  # a server that ignores If-Match
                    raise StorageError(
                        f"{self.url}/{key} was replaced while it was read: try again"
                    )
                etag = response["ETag"]
                length = response["ContentLength"]
                if "Range" in request and not response.get("ContentRange"):
                    raise StorageError(f"cannot read {key}: {_endpoint()} ignores Range requests")
                end = stop = position + length if stop is None else stop
                for chunk in response["Body"].iter_chunks(CHUNK):
                    sink(chunk)
                    position += len(chunk)
                    retry.reset()
                if position < end:
                    raise _CutOff
            except (boto.ClientError, boto.BotoCoreError, *CONNECTION_ERRORS) as error:
                if code_of(error) in ("PreconditionFailed", "412"):
                    raise StorageError(
                        f"{self.url}/{key} was replaced while it was read: try again"
                    ) from None
                if code_of(error) in ("InvalidRange", "416"):
                    raise StorageError(
                        f"{self.url}/{key} ends before byte {stop}: is it truncated?"
                    ) from None
                if not retry.wait(f"{self.url}/{key} on {_endpoint()}, byte {position}", error):
                    self._fail(key, error)

    def read(self, key: str, *, sha256: str | None = None) -> bytes:
        def get() -> bytes:
            data = bytearray()
            self._stream(key, data.extend)
            if sha256 is not None:
                require_sha256(f"{self.url}/{key}", hashlib.sha256(data).hexdigest(), sha256)
            return bytes(data)

        return _twice(get)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        data = bytearray()
        self._stream(key, data.extend, start, start + length)
        return bytes(data)

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> None:
        def get() -> None:
            digest = hashlib.sha256()
            with atomic_write(path) as file:

                def sink(chunk: bytes) -> None:
                    file.write(chunk)
                    digest.update(chunk)

                self._stream(key, sink)
                if sha256 is not None:
                    require_sha256(f"{self.url}/{key}", digest.hexdigest(), sha256)

        with disk_errors(path):
            _twice(get)

    def write(self, key: str, data: bytes, *, create_once: bool = False) -> None:
        where = self._where(key) | ({"IfNoneMatch": "*"} if create_once else {})
        tries = 0

        def put(client: Any) -> None:
            nonlocal tries
            tries += 1
            try:
                client.put_object(Body=data, **where)
            except boto.ClientError as error:
                if code_of(error) not in ("PreconditionFailed", "412"):
                    raise
                # Our earlier attempt may have been stored although its answer was lost.
                if tries == 1 or self.read(key) != data:
                    raise ObjectExists(f"{self.url}/{key} already exists") from None

        self._try(key, put)

    def upload(self, key: str, path: Path) -> None:
        with disk_errors(path):
            size = path.stat().st_size
            if size <= PART_BYTES:
                self.write(key, path.read_bytes())
            else:
                _MultipartUpload(self, key, path, size).run()

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except ObjectMissing:
            return False
        return True

    def size(self, key: str) -> int:
        where = self._where(key)

        def head(client: Any) -> int:
            try:
                return client.head_object(**where)["ContentLength"]
            except boto.ClientError as error:
                # The answer to a HEAD does not say whether the object or the bucket is missing, or
                # what is wrong with the request. The answer to another request does.
                if code_of(error) in ("404", "400", "301"):
                    client.list_objects_v2(Bucket=self.bucket, MaxKeys=1)
                raise

        return self._try(key, head)

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        root = f"{self.prefix}/" if self.prefix else ""
        request = {"Bucket": self.bucket, "Prefix": root + prefix}
        while True:
            page = self._try(prefix, lambda client: client.list_objects_v2(**request))
            for entry in page.get("Contents", ()):
                yield entry["Key"].removeprefix(root), entry["Size"]
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, key: str) -> None:
        where = self._where(key)
        self._try(key, lambda client: client.delete_object(**where))

    def child(self, key: str) -> S3Storage:
        return S3Storage(self.bucket, self._where(key.rstrip("/"))["Key"])


def _twice(get: Callable[[], T]) -> T:
    """Get something again if it arrived damaged: the original may be whole."""
    try:
        return get()
    except DataError as error:
        log.warning("%s; fetching it once more", error)
        return get()


def _endpoint() -> str:
    """The server's address, without a password."""
    parts = urlsplit(_client().meta.endpoint_url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _region_in(error: Exception) -> str | None:
    """The bucket's region, if the server's answer names one."""
    if not isinstance(error, boto.ClientError):
        return None
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = error.response.get("Error", {}).get("Region") or headers.get("x-amz-bucket-region")
    return region if re.fullmatch(r"[a-z0-9-]+", str(region)) else None


@dataclass
class _MultipartUpload:
    """One file's upload in parts, resumed with the help of a note beside the file.

    A part's ETag does not identify its content. So the server's parts are used only if the note
    says that they belong to an upload of a file with the same SHA-256.
    """

    storage: S3Storage
    key: str
    path: Path
    size: int

    def run(self) -> None:
        storage, where = self.storage, self.storage._where(self.key)
        part_bytes = max(PART_BYTES, -(-self.size // MAX_PARTS))
        note = self.path.with_name(self.path.name + ".upload.json")
        identity = {"url": f"{storage.url}/{self.key}", "endpoint": _endpoint()}
        identity |= {"sha256": file_sha256(self.path), "part_bytes": part_bytes}
        upload_id, done = self._resume(note, identity)
        if upload_id is None:
            created = storage._try(self.key, lambda c: c.create_multipart_upload(**where))
            upload_id = created["UploadId"]
            with atomic_write(note) as file:
                file.write(json.dumps(identity | {"upload_id": upload_id}).encode())

        def put(number: int) -> tuple[int, str]:
            if number in done:
                return number, done[number]
            with self.path.open("rb") as file:
                file.seek((number - 1) * part_bytes)
                body = file.read(part_bytes)
            ids = {"UploadId": upload_id, "PartNumber": number}
            answer = storage._try(self.key, lambda c: c.upload_part(Body=body, **ids, **where))
            return number, answer["ETag"]

        with ThreadPoolExecutor(PART_THREADS) as pool:
            parts = list(pool.map(put, range(1, -(-self.size // part_bytes) + 1)))
        self._complete(upload_id, parts)
        note.unlink()

    def _resume(self, note: Path, identity: dict[str, Any]) -> tuple[str | None, dict[int, str]]:
        """The interrupted upload, if there is one, and its finished parts' ETags."""
        try:
            known = json.loads(note.read_bytes())
            upload_id = str(known.pop("upload_id"))
        except (OSError, ValueError, KeyError, AttributeError):
            return None, {}
        if known != identity:
            if (known.get("url"), known.get("endpoint")) == (identity["url"], identity["endpoint"]):
                self._abort(upload_id)
            return None, {}
        where, done, marker = self.storage._where(self.key), dict[int, str](), 0
        while True:
            request = {"UploadId": upload_id, "PartNumberMarker": marker, **where}
            try:
                page = self.storage._try(self.key, lambda c: c.list_parts(**request))  # noqa: B023
            except StorageError as error:
                log.info("starting the upload of %s again: %s", self.key, error)
                return None, {}
            for part in page.get("Parts", ()):
                number, part_bytes = part["PartNumber"], identity["part_bytes"]
                if part["Size"] == min(part_bytes, self.size - (number - 1) * part_bytes):
                    done[number] = part["ETag"]
            if not page.get("IsTruncated"):
                break
            marker = page["NextPartNumberMarker"]
        log.info("resuming the upload of %s: %d parts are done", self.key, len(done))
        return upload_id, done

    def _abort(self, upload_id: str) -> None:
        """Have the server delete the parts of another file, which it would keep for ever."""
        request = {"UploadId": upload_id, **self.storage._where(self.key)}
        try:
            self.storage._try(self.key, lambda c: c.abort_multipart_upload(**request))
        except StorageError as error:
            log.info("could not abort an old upload of %s: %s", self.key, error)

    def _complete(self, upload_id: str, parts: list[tuple[int, str]]) -> None:
        storage = self.storage
        listed = {"Parts": [{"PartNumber": n, "ETag": etag} for n, etag in parts]}
        request = {"UploadId": upload_id, "MultipartUpload": listed, **storage._where(self.key)}
        tries = 0

        def complete(client: Any) -> None:
            nonlocal tries
            tries += 1
            try:
                client.complete_multipart_upload(**request)
            except boto.ClientError as error:
                # Our earlier attempt may have completed it although its answer was lost.
                if code_of(error) != "NoSuchUpload" or tries == 1:
                    raise

        storage._try(self.key, complete)
        if storage.size(self.key) != self.size:
            raise StorageError(f"{storage.url}/{self.key} arrived with another size: try again")
