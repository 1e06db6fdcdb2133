"""How long a failing server is waited for, on a clock of our own."""

from __future__ import annotations

import logging

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from data_shards.storage import retry
from data_shards.storage.retry import PAUSE_MOST, RETRY_SECONDS, Retry, is_transient

REFUSED = EndpointConnectionError(endpoint_url="http://127.0.0.1:9")


def answered(code: str, status: int) -> ClientError:
    response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(response, "GetObject")


class Clock:
    """Seconds pass only while somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.pauses = 0.0, list[float]()
        monkeypatch.setattr(retry.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(retry.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_refused_connections_are_tried_for_more_than_a_minute_and_not_for_ever(clock):
    waiting = Retry()
    while waiting.wait("k", REFUSED):
        assert clock.now < 2 * RETRY_SECONDS
    assert 60 < RETRY_SECONDS <= clock.now <= RETRY_SECONDS + PAUSE_MOST


def test_pauses_grow_but_stay_short(clock):
    waiting = Retry()
    while waiting.wait("k", REFUSED):
        pass
    assert clock.pauses[0] <= 0.2
    assert max(clock.pauses) <= PAUSE_MOST
    assert 15 < len(clock.pauses) < 60


def test_progress_starts_the_count_anew(clock):
    waiting = Retry()
    for _ in range(5):
        clock.now += RETRY_SECONDS - 1
        assert waiting.wait("k", REFUSED)
        waiting.reset()
    assert clock.now > 4 * RETRY_SECONDS


def test_every_pause_is_logged_with_the_reason(clock, caplog):
    caplog.set_level(logging.WARNING)
    Retry().wait("s3://b/k", answered("SlowDown", 503))
    assert "s3://b/k: SlowDown; trying again in" in caplog.text


@pytest.mark.parametrize(
    ("code", "status", "passes"),
    [
        ("SlowDown", 503, True),
        ("InternalError", 500, True),
        ("502", 502, True),
        ("RequestTimeout", 400, True),
        ("TooManyRequests", 429, True),
        ("NotImplemented", 501, False),
        ("XAmzContentSHA256Mismatch", 400, True),
        ("AccessDenied", 403, False),
        ("ExpiredToken", 403, False),
        ("NoSuchKey", 404, False),
        ("NoSuchBucket", 404, False),
        ("InvalidRange", 416, False),
    ],
)
def test_transient_errors_are_distinguished_from_others(clock, code, status, passes):
    error = answered(code, status)
    assert is_transient(error) == passes
    assert Retry().wait("k", error) == passes
