"""S3, or any compatible server, as a `Storage`.

boto3's stream ends with its connection, so `_stream` reads in a loop: each attempt resumes with a
`Range` from the byte reached, pinned to the object's version by its ETag. ETags are not taken for
MD5 sums: our own SHA-256 is checked, and data that differs is fetched once more. `retry.py` decides
which failures are retried and for how long. Messages carry the server's error code, never its free
text, which could repeat a credential.
"""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import boto3.session
import botocore.exceptions as boto
from botocore.config import Config

from data_shards.errors import ConfigError, DataError, ObjectExists, ObjectMissing, StorageError
from data_shards.storage import multipart
from data_shards.storage.atomic import atomic_write, disk_errors, require_sha256
from data_shards.storage.retry import (
    CONNECTION_ERRORS,
    FAILURES,
    Retry,
    bypass_proxy,
    code_of,
    is_transient,
)

log = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
READ_SECONDS = 20.0  # without a byte, before a connection counts as broken
CHUNK = 1 << 20

T = TypeVar("T")

_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_DENIED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"}
_DENIED |= {"InvalidToken", "401", "403"}
_WRONG_REGION = {"AuthorizationHeaderMalformed", "PermanentRedirect", "301"}
_MISSING = {"NoSuchKey", "NotFound", "404"}
_LACKING = {"NotImplemented", "501"}


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
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        bypass_proxy(os.environ.get(name, ""))
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
    """A bucket, or everything below a prefix in one, with the methods of `LocalStorage`.

    It is cheap to copy, pickle and fork.
    """

    bucket: str
    prefix: str

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def _where(self, key: str) -> dict[str, str]:
        if not key or key.startswith("/") or ".." in key.split("/"):
            raise StorageError(f"{key!r} is not a key inside {self.url}")
        return {"Bucket": self.bucket, "Key": f"{self.prefix}/{key}" if self.prefix else key}

    def _explained(self, key: str, error: Exception) -> StorageError:
        """What went wrong, and what to do, as one line."""
        code, where, server = code_of(error), f"{self.url}/{key}", _endpoint()
        operation = getattr(error, "operation_name", "")
        if code in _MISSING:
            return ObjectMissing(f"{where} does not exist")
        region, ours = _region_in(error), _client().meta.region_name
        if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
            text = (
                f"no credentials for {self.url}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
                "(for the local stack: source .cluster/environment), or give the machine an "
                "instance profile or service account"
            )
        elif code == "NoSuchBucket":
            text = f"no bucket {self.bucket!r} on {server}: create it, or check the name"
        elif code in _WRONG_REGION or (code == "400" and region not in (None, ours)):
            expected = f"expects {region or 'another region'} for {where}, not {ours}"
            text = f"{server} {expected}: set AWS_DEFAULT_REGION={region or ''}".rstrip("=")
        elif code in _EXPIRED:
            text = f"the credentials for {where} have expired ({code}): renew them, and try again"
        elif code == "RequestTimeTooSkewed":
            text = (
                f"{server} refuses access to {where} ({code}): this machine's clock differs from"
                " the server's by minutes; set it, for example with NTP"
            )
        elif code in _DENIED:
            text = (
                f"{server} denies access to {where} ({code}): check AWS_ACCESS_KEY_ID,"
                " AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION and the bucket's permissions"
                f"{' (listing needs s3:ListBucket)' if operation == 'ListObjectsV2' else ''}"
            )
        elif code in _LACKING:
            text = f"{server} does not support {operation}, needed for {where}"
        elif code == "ProxyConnectionError":
            text = f"cannot reach {server} by the proxy of HTTP_PROXY or HTTPS_PROXY; see NO_PROXY"
        elif isinstance(error, CONNECTION_ERRORS):
            text = (
                f"cannot reach {server} for {where} ({code} on every attempt):"
                " is AWS_ENDPOINT_URL right, and is the server running?"
            )
        else:
            text = f"{server} refuses access to {where} ({code})"
        return StorageError(text)

    def _try(self, key: str, request: Callable[[Any, bool], T]) -> T:
        """Make a request, called with the client and whether it was tried before."""
        retry, again = Retry(), False
        while True:
            try:
                return request(_client(), again)
            except FAILURES as error:
                if not _again(retry, f"{self.url}/{key} on {_endpoint()}", error):
                    raise self._explained(key, error) from None
                again = True

    def _call(self, key: str, operation: str, **options: Any) -> dict[str, Any]:
        """Make one of boto3's requests about an object."""
        options |= self._where(key)
        return self._try(key, lambda client, _: getattr(client, operation)(**options))

    def _pages(self, key: str, operation: str, request: dict[str, str]) -> dict[str, Any]:
        """Make a request for a list, and return all pages of the answer as one."""

        def get(client: Any, _: bool) -> dict[str, Any]:
            return client.get_paginator(operation).paginate(**request).build_full_result()

        return self._try(key, get)

    def _stream(
        self, key: str, sink: Callable[[bytes], object], start: int = 0, stop: int | None = None
    ) -> None:
        """Pass bytes [start, stop) to `sink`, each once, over as many connections as needed."""
        where, etag, position, retry = self._where(key), None, start, Retry()
        replaced = StorageError(f"{self.url}/{key} was replaced while it was read: try again")
        while stop is None or position < stop:
            request: dict[str, Any] = dict(where)
            if position or stop is not None:
                request["Range"] = f"bytes={position}-{'' if stop is None else stop - 1}"
            if etag is not None:
                request["IfMatch"] = etag
            try:
                response = _client().get_object(**request)
                if etag not in (None, response["ETag"]):  # a server that ignores If-Match
                    raise replaced
                etag = response["ETag"]
                if "Range" in request and not response.get("ContentRange"):
                    raise StorageError(f"cannot read {key}: {_endpoint()} ignores Range requests")
                end = stop = position + response["ContentLength"] if stop is None else stop
                for chunk in response["Body"].iter_chunks(CHUNK):
                    sink(chunk)
                    position += len(chunk)
                    retry.reset()
                if position < end:
                    raise ConnectionError("the server closed the connection early")
            except FAILURES as error:
                if code_of(error) in ("PreconditionFailed", "412"):
                    raise replaced from None
                if code_of(error) in ("InvalidRange", "416"):
                    raise StorageError(
                        f"{self.url}/{key} ends before byte {stop}: is it truncated?"
                    ) from None
                what = f"{self.url}/{key} on {_endpoint()}, byte {position}"
                if not _again(retry, what, error):
                    raise self._explained(key, error) from None

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
                self._stream(key, lambda chunk: (file.write(chunk), digest.update(chunk)))
                require_sha256(f"{self.url}/{key}", digest.hexdigest(), sha256)

        with disk_errors(path):
            _twice(get)

    def write(self, key: str, data: bytes, *, create_once: bool = False) -> None:
        where = self._where(key) | ({"IfNoneMatch": "*"} if create_once else {})

        def put(client: Any, again: bool) -> None:
            try:
                client.put_object(Body=data, **where)
            except boto.ClientError as error:
                if create_once and code_of(error) in _LACKING:
                    raise StorageError(
                        f"{_endpoint()} does not support conditional writes (If-None-Match), which"
                        f" keep {self.url}/{key} from being written twice: use a server that does"
                    ) from None
                if code_of(error) not in ("PreconditionFailed", "412"):
                    raise
                # Our earlier attempt may have been stored although its answer was lost.
                if not again or self.read(key) != data:
                    raise ObjectExists(f"{self.url}/{key} already exists") from None

        self._try(key, put)

    def upload(self, key: str, path: Path) -> None:
        with disk_errors(path):
            if path.stat().st_size <= multipart.PART_BYTES:
                self.write(key, path.read_bytes())
            else:
                multipart.upload(self, key, path, _endpoint())

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except ObjectMissing:
            return False
        return True

    def size(self, key: str) -> int:
        where = self._where(key)

        def head(client: Any, _: bool) -> int:
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
        while True:  # each page is tried again by itself, and is gone before the next
            page = self._try(prefix, lambda client, _: client.list_objects_v2(**request))
            for entry in page.get("Contents", ()):
                yield entry["Key"].removeprefix(root), entry["Size"]
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, key: str) -> None:
        self._call(key, "delete_object")

    def erase(self, key: str) -> None:
        where = self._where(key)

        def versions(client: Any, _: bool) -> list[str]:
            try:
                found = client.list_object_versions(Bucket=self.bucket, Prefix=where["Key"])
            except boto.ClientError as error:
                if code_of(error) in (*_LACKING, "MethodNotAllowed"):
                    return []
                raise
            entries = [*found.get("Versions", ()), *found.get("DeleteMarkers", ())]
            return [e["VersionId"] for e in entries if e["Key"] == where["Key"]]

        self.delete(key)
        while found := self._try(key, versions):
            for version in found:
                self._call(key, "delete_object", VersionId=version)

    def copy_from(self, other: object, other_key: str, key: str) -> bool:
        if not isinstance(other, S3Storage):
            return False
        source, where = other._where(other_key), self._where(key)

        def copy(client: Any, _: bool) -> None:
            try:
                client.copy(source, where["Bucket"], where["Key"])
            except boto.ClientError as error:
                if not is_transient(error):
                    other.size(other_key)  # explains the error if it is the source's
                raise

        self._try(key, copy)
        return True

    def child(self, key: str) -> Self:
        return type(self)(self.bucket, self._where(key.rstrip("/"))["Key"])


def _again(retry: Retry, what: str, error: Exception) -> bool:
    """Return whether to send a request again: it may pass, or the credentials were renewed.

    boto3 reads the files of credentials once. Another program may have renewed them since.
    """
    if code_of(error) in _EXPIRED and not retry.renewed:
        log.warning("%s: %s; reading the credentials again", what, code_of(error))
        _client_of.cache_clear()
        retry.renewed = True
        return True
    return retry.wait(what, error)


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
