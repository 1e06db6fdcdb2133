"""Which failures of an S3 server pass by themselves, and how long to wait for that."""

from __future__ import annotations

import logging
import random
import time

import botocore.exceptions as boto
import urllib3.exceptions

log = logging.getLogger(__name__)

PATIENCE = 90.0  # seconds without a byte of progress, before giving up: outlasts a restart
PAUSE = 0.2  # seconds before the second attempt; doubles with jitter, up to PAUSE_MOST
PAUSE_MOST = 5.0

BROKEN = (
    boto.HTTPClientError,
    boto.ConnectionError,
    boto.IncompleteReadError,
    urllib3.exceptions.HTTPError,
    ConnectionError,
    TimeoutError,
)
"""What a connection that fails raises."""
_BUSY = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling"}
_BUSY |= {"ConditionalRequestConflict", "OperationAborted"}
_BUSY |= {"XAmzContentSHA256Mismatch", "BadDigest", "IncompleteBody"}  # damaged on its way there


def code_of(error: Exception) -> str:
    """The server's code of an error, such as `SlowDown`, or the exception's name."""
    if isinstance(error, boto.ClientError):
        return str(error.response.get("Error", {}).get("Code", "unknown"))
    return type(error).__name__


def transient(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, boto.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status == 429 or code_of(error) in _BUSY
    return isinstance(error, BROKEN)


class Patience:
    """Whether to try again, and when: pauses double while there is no progress."""

    def __init__(self) -> None:
        self.progress()

    def progress(self) -> None:
        """Begin to count anew: something came through."""
        self.since, self.pause = time.monotonic(), PAUSE

    def wait(self, what: str, error: Exception) -> bool:
        """Pause before the next attempt at `what`, and say so; False if there is to be none."""
        left = self.since + PATIENCE - time.monotonic()
        if left <= 0 or not transient(error):
            return False
        seconds = self.pause * random.uniform(0.5, 1.0)
        self.pause = min(PAUSE_MOST, 2 * self.pause)
        log.warning(
            "%s: %s; trying again in %.1f s, for %.0f s more", what, code_of(error), seconds, left
        )
        time.sleep(seconds)
        return True
