"""Object storage and local folders behind one small interface."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Union
from urllib.parse import unquote

from data_shards.errors import ConfigError
from data_shards.storage.local import LocalStorage

if TYPE_CHECKING:
    from data_shards.storage.s3 import S3Storage

__all__ = ["LocalStorage", "Storage", "expand_home", "open_file", "open_storage"]

_MISSPELT = re.compile(r"(s3|file):/*(.*)", re.IGNORECASE | re.DOTALL)

Storage = Union[LocalStorage, "S3Storage"]
"""Named byte strings below a URL; `LocalStorage` says what the methods of both kinds do."""


def open_storage(url: str) -> Storage:
    """Open the storage at `s3://bucket/prefix`, `file:///folder` or a folder's path.

    S3 is reached as the environment says: `AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`,
    `AWS_SECRET_ACCESS_KEY`, `AWS_DEFAULT_REGION`. Nothing is contacted yet.

    Raises:
        ConfigError: the location has another form; the message gives the right one.
    """
    scheme, separator, rest = url.partition("://")
    if separator and scheme == "s3":
        # Not urlsplit: in an S3 key, # and ? are ordinary letters.
        bucket, _, prefix = rest.partition("/")
        if not bucket:
            raise ConfigError(f"{url!r} names no bucket: write s3://bucket/prefix")
        from data_shards.storage.s3 import S3Storage  # boto3 takes half a second to import

        return S3Storage(bucket, prefix.strip("/"))
    if separator and scheme == "file" and rest.startswith(("/", "localhost/")):
        return LocalStorage(Path(unquote(rest.removeprefix("localhost"))))
    if match := _MISSPELT.fullmatch(url):
        right = "s3://" if match[1].lower() == "s3" else "file:///"
        raise ConfigError(f"cannot open {url!r}: did you mean {right}{match[2]}?")
    if separator or not url:
        raise ConfigError(
            f"cannot open {url!r}: write s3://bucket/prefix, file:///folder or a path"
        )
    return LocalStorage(expand_home(Path(url)).absolute())


def expand_home(path: Path) -> Path:
    """Replace `~` at the start of a path; a `ConfigError` if the user has no home folder."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ConfigError(
            f"there is no home folder for {path}: set HOME, or give another folder"
        ) from None


def open_file(url: str) -> tuple[Storage, str]:
    """Open the storage of a file's folder; return it and the file's key there."""
    folder, _, name = url.rpartition("/")
    return open_storage(folder or ("/" if url.startswith("/") else ".")), name
