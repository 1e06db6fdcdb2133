"""A file on a web server, read by ranges."""

import http.client
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from data_shards.errors import ObjectMissing, StorageError
from data_shards.storage.retry import Retry

PARTIAL_CONTENT = 206
SECONDS = 20.0  # without a byte, before a connection counts as broken


@dataclass(frozen=True)
class HttpFile:
    """One file; the keys that its methods take, as those of a `Storage` do, are ignored."""

    address: str  # may carry a signature after a question mark: it is in no message

    @property
    def url(self) -> str:
        return self.address.partition("?")[0]

    def size(self, key: str = "") -> int:
        headers, _ = self._request("HEAD", {})
        if headers.get("Content-Length") is None:
            raise StorageError(f"{self.url}: the server does not say how long it is")
        return int(headers["Content-Length"])

    def exists(self, key: str = "") -> bool:
        try:
            self.size()
        except ObjectMissing:
            return False
        return True

    def read(self, key: str = "") -> bytes:
        return self._request("GET", {})[1]

    def read_range(self, key: str, start: int, length: int) -> bytes:
        wanted = {"Range": f"bytes={start}-{start + length - 1}"}
        headers, data = self._request("GET", wanted)
        if headers.get("Content-Range") is None:
            raise StorageError(
                f"{self.url}: the server ignores Range requests; copy the file first"
            )
        if len(data) != length:
            raise StorageError(f"{self.url} ends before byte {start + length}: is it truncated?")
        return data

    def _request(self, method: str, headers: dict[str, str]) -> tuple[Any, bytes]:
        request = urllib.request.Request(self.address, headers=headers, method=method)
        retry = Retry()
        while True:
            try:
                with urllib.request.urlopen(request, timeout=SECONDS) as response:
                    # A server that ignores ranges would send the whole file.
                    whole = (
                        "Range" in headers and response.status != http.HTTPStatus.PARTIAL_CONTENT
                    )
                    return response.headers, b"" if whole else response.read()
            except urllib.error.HTTPError as error:
                if error.code in (404, 410):
                    raise ObjectMissing(f"{self.url} does not exist") from None
                failure, reason = ConnectionError(f"HTTP {error.code}"), f"HTTP {error.code}"
                again = error.code >= 500 or error.code == 429
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
                failure, again = ConnectionError(reason), True
            if not again or not retry.wait(self.url, failure):
                raise StorageError(f"cannot read {self.url} ({reason})")
