"""A file on a web server, read by ranges."""

import http.client
import urllib.error
import urllib.request
from dataclasses import dataclass

from data_shards.errors import ObjectMissing, StorageError
from data_shards.storage.retry import Retry, is_transient_status

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
        # A HEAD would be refused where the signature is for a GET.
        total = self._request(0, 1)[0].rpartition("/")[2]
        if not total.isdecimal():
            raise StorageError(f"{self.url}: the server does not say how long it is")
        return int(total)

    def read(self, key: str = "") -> bytes:
        return self.read_range(key, 0, self.size())

    def read_range(self, key: str, start: int, length: int) -> bytes:
        _, data = self._request(start, length)
        if len(data) != length:
            raise StorageError(f"{self.url} ends before byte {start + length}: is it truncated?")
        return data

    def _request(self, start: int, length: int) -> tuple[str, bytes]:
        """Get `length` bytes, or as many as there are; return their Content-Range too."""
        wanted = {"Range": f"bytes={start}-{start + length - 1}"}
        request, retry = urllib.request.Request(self.address, headers=wanted), Retry()
        while True:
            try:
                with urllib.request.urlopen(request, timeout=SECONDS) as response:
                    found = response.headers.get("Content-Range")
                    if response.status != PARTIAL_CONTENT or found is None:
                        raise StorageError(  # it would send the whole file
                            f"{self.url}: the server ignores Range requests; copy the file first"
                        )
                    return found, response.read()
            except urllib.error.HTTPError as error:
                if error.code in (404, 410):
                    raise ObjectMissing(f"{self.url} does not exist") from None
                if error.code == 416:
                    raise StorageError(
                        f"{self.url} has no byte {start}: is it empty, or truncated?"
                    ) from None
                failure, reason = ConnectionError(f"HTTP {error.code}"), f"HTTP {error.code}"
                again = is_transient_status(error.code)
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
                failure, again = ConnectionError(reason), True
            if not again or not retry.wait(self.url, failure):
                raise StorageError(f"cannot read {self.url} ({reason})")
