"""Files on a web server, whose address may be signed for GET requests only."""

from __future__ import annotations

import re

import pytest
from s3_servers import Faulty

from data_shards.errors import ObjectMissing, StorageError
from data_shards.storage import retry
from data_shards.storage.http import HttpFile

DATA = bytes(range(256))


class Signed(Faulty):
    """Serves ranges of one file to GET requests, and refuses others."""

    data, status, total = DATA, 206, ""

    def handle(self, request, body):
        start, last = map(int, re.findall(r"\d+", request.headers["Range"]))
        part = self.data[start : last + 1]
        status = 403 if request.command != "GET" else self.status if part else 416
        request.send_response(status)
        if status == 206:
            total = self.total or len(self.data)
            request.send_header("Content-Range", f"bytes {start}-{last}/{total}")
        request.send_header("Content-Length", str(len(part)))
        request.end_headers()
        request.wfile.write(part)


@pytest.fixture
def server(monkeypatch) -> Signed:
    monkeypatch.setattr(retry, "PAUSE", 0.001)
    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.05)
    return Signed(monkeypatch)


@pytest.fixture
def file(server) -> HttpFile:
    return HttpFile(f"http://127.0.0.1:{server.server.server_port}/t.tar?signature=secret")


def test_size_and_bytes_are_got_with_a_signature_for_get(file):
    assert file.size() == len(DATA)
    assert file.read() == DATA
    assert file.read_range("", 7, 3) == DATA[7:10]


def test_file_that_ends_early_is_an_error(file):
    with pytest.raises(StorageError, match=r"/t\.tar ends before byte 300: is it truncated"):
        file.read_range("", 250, 50)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"status": 200}, r"/t\.tar: the server ignores Range requests"),
        ({"total": "*"}, r"/t\.tar: the server does not say how long it is"),
        ({"data": b""}, r"/t\.tar has no byte 0: is it empty"),
        ({"status": 403}, r"cannot read .*/t\.tar \(HTTP 403\)"),
        ({"status": 501}, r"cannot read .*/t\.tar \(HTTP 501\)"),
    ],
)
def test_answer_of_no_use_is_one_line_without_the_signature(server, file, given, message):
    vars(server).update(given)
    with pytest.raises(StorageError, match=message) as caught:
        file.size()
    assert "secret" not in str(caught.value)
    assert len(server.seen) == 1


def test_missing_file_has_its_own_error(server, file):
    server.status = 404
    with pytest.raises(ObjectMissing):
        file.size()


def test_busy_server_is_tried_again(server, file):
    server.status = 503
    with pytest.raises(StorageError, match="HTTP 503"):
        file.size()
    assert len(server.seen) > 1
