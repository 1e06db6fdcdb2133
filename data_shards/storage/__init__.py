"""Object storage and local folders behind one small interface."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from data_shards.errors import ConfigError
from data_shards.storage.base import Storage
from data_shards.storage.local import LocalStorage

__all__ = ["LocalStorage", "Storage", "open_storage"]


def open_storage(url: str) -> Storage:
    """The storage at `s3://bucket/prefix`, `file:///folder` or a folder's path.

    S3 is reached as the environment says: `AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`,
    `AWS_SECRET_ACCESS_KEY`, `AWS_DEFAULT_REGION`. Nothing is contacted yet.
    """
    if url.startswith("s3://"):
        # Split by hand: to S3, # and ? are letters as others are.
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not bucket:
            raise ConfigError(f"{url!r} names no bucket: write s3://bucket/prefix")
        from data_shards.storage.s3 import S3Storage  # boto3 takes half a second to import

        return S3Storage(bucket, prefix.strip("/"))
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return LocalStorage(Path(unquote(parts.path)))
    if "://" in url or not url:
        raise ConfigError(
            f"cannot open {url!r}: write s3://bucket/prefix, file:///folder or a path"
        )
    return LocalStorage(Path(url).expanduser().absolute())
