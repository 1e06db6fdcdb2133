"""Reach a server: past a proxy, and again after failures that pass by themselves."""

import logging
import os
import random
import time
from urllib.parse import urlsplit

import botocore.exceptions as boto
import urllib3.exceptions

log = logging.getLogger(__name__)

RETRY_SECONDS = 90.0  # without a byte of progress, before giving up: longer than a restart takes
PAUSE = 0.2  # seconds before the second attempt; doubles with jitter, up to PAUSE_MOST
PAUSE_MOST = 5.0

CONNECTION_ERRORS = (
    *(boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError),
    *(urllib3.exceptions.HTTPError, ConnectionError, TimeoutError),
)
FAILURES = (boto.ClientError, boto.BotoCoreError, *CONNECTION_ERRORS)
_BUSY = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling"}
_BUSY |= {"ConditionalRequestConflict", "OperationAborted"}
_BUSY |= {"XAmzContentSHA256Mismatch", "BadDigest", "IncompleteBody"}  # damaged in transit


def code_of(error: Exception) -> str:
    """The server's code of an error, such as `SlowDown`, or the exception's name."""
    if isinstance(error, boto.ClientError):
        return str(error.response.get("Error", {}).get("Code", "unknown"))
    return type(error).__name__


def is_transient_status(status: int) -> bool:
    """Whether a request that was answered with this HTTP status may succeed later."""
    return status == 429 or (status >= 500 and status != 501)  # 501 is Not Implemented


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, boto.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return is_transient_status(status) or code_of(error) in _BUSY
    return isinstance(error, CONNECTION_ERRORS)


class Retry:
    """Decide whether and when to retry: pauses double while there is no progress."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start the clock again, because there was progress."""
        self.since, self.pause = time.monotonic(), PAUSE
        self.renewed = False  # whether credentials that expired were read again

    def wait(self, what: str, error: Exception) -> bool:
        """Log the failure of `what` and pause before the next attempt; False to give up."""
        left = self.since + RETRY_SECONDS - time.monotonic()
        if left <= 0 or not is_transient(error):
            return False
        seconds = self.pause * random.uniform(0.5, 1.0)
        self.pause = min(PAUSE_MOST, 2 * self.pause)
        log.warning(
            "%s: %s; trying again in %.1f s, for up to %.0f s", what, code_of(error), seconds, left
        )
        time.sleep(seconds)
        return True


def bypass_proxy(url: str) -> None:
    """Reach a server on this machine directly: no proxy can reach it for us."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.startswith("127.") or host == "::1":
        for name in ("NO_PROXY", "no_proxy"):
            known = os.environ.get(name, "")
            if host not in known.split(","):
                os.environ[name] = f"{known},{host}" if known else host
