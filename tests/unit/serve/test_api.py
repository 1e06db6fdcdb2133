"""The HTTP interface: who is answered, what is refused and how, and what the answers hold."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from cluster.serve.api import make_app
from cluster.serve.settings import TOKEN, Settings, is_loopback, token_digest
from data_shards.errors import ConfigError, DataError, ObjectMissing, StorageError

SECRET = "correct horse battery staple"
SETTINGS = Settings("model", "gallery", max_upload_bytes=20_000, max_pixels=10_000)
STATUS = {"model": "models:/reid/7", "gallery": 3, "recall": None}
IMAGE = {"id": "a" * 24, "path": "<b>.jpg", "pid": 1, "camera": None, "time": None}


class Searcher:
    """Stands in for the deployment: keeps what it was asked, and answers or raises."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple, dict]] = []
        self.answer: Any = None

    async def __call__(self, method: str, *arguments: Any, **options: Any) -> Any:
        self.asked.append((method, arguments, options))
        if method == "status":
            return STATUS
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def searcher() -> Searcher:
    return Searcher()


def connect(searcher: Searcher, token: str | None = None, host: str = "127.0.0.1") -> TestClient:
    digest = None if token is None else hashlib.sha256(token.encode()).hexdigest()
    app = make_app(searcher, SETTINGS, digest)
    return TestClient(app, f"http://{host}:8000", client=(host, 1), raise_server_exceptions=False)


@pytest.fixture
def client(searcher: Searcher) -> Iterator[TestClient]:
    with connect(searcher) as client:
        yield client


def picture(height: int = 40, width: int = 20, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(file, kind)
    return file.getvalue()


def sent(data: bytes, name: str = "photo") -> dict[str, tuple[str, bytes]]:
    return {name: ("../../etc/passwd", data)}


def ranks() -> dict[str, Any]:
    match = IMAGE | {"enrolled": False, "rank": 1, "similarity": 0.5, "same": True}
    place = {"model": "models:/reid/7", "exact": True, "gallery": 3, "threshold": None}
    return place | {"matches": [match]}


def test_a_search_passes_the_photo_and_the_filters_on(client, searcher):
    searcher.answer, data = ranks(), picture()
    form = {"top": 5, "camera": [1, 2], "since": "2026-01-01T00:00:00", "false_accept_rate": 0.01}
    answer = client.post("/search", files=sent(data), data=form)
    assert answer.status_code == 200
    assert answer.json()["matches"][0]["path"] == "<b>.jpg"
    ((method, arguments, options),) = searcher.asked
    assert (method, arguments) == ("search", (data, None))
    assert options["cameras"] == ["1", "2"]
    assert (options["top"], options["rate"], options["until"]) == (5, 0.01, None)
    assert options["since"] == 1767225600.0  # a time without a zone is UTC


def test_a_photo_of_another_shape_than_a_person_is_warned_of(client, searcher):
    searcher.answer = ranks()
    assert client.post("/search", files=sent(picture())).json()["warning"] is None
    wide = client.post("/search", files=sent(picture(20, 40))).json()["warning"]
    assert "40 × 20 pixels" in wide


def bomb() -> bytes:
    """A PNG of 60,000 × 60,000 pixels in a few bytes: decoding it would take 10 GB."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    crc = struct.pack(">I", zlib.crc32(chunk))
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk + crc
    return start + struct.pack(">I", 10) + b"IDAT" + bytes(14)


@pytest.mark.parametrize(
    ("data", "status", "said"),
    [
        (b"", 422, "the photo is empty"),
        (b"<svg onload=alert(1)>", 422, "not a readable image"),
        (b"\x80\x04cos\nsystem\n", 422, "not a readable image"),
        (b"\xff\xd8\xff no image", 422, "not a readable image"),
        (picture()[:30], 422, "not a readable image"),
        (picture(200, 100), 413, "100 × 200 pixels, and 10,000 are allowed"),
        (bomb(), 413, "too many pixels"),
        (bytes(30_000), 413, "a request may have 20,000 bytes"),
    ],
    ids=["empty", "svg", "pickle", "damaged", "truncated", "pixels", "bomb", "bytes"],
)
def test_a_bad_upload_is_refused_with_one_sentence_and_reaches_no_model(
    client, searcher, data, status, said
):
    for path, name in (("/search", "photo"), ("/embed", "photo"), ("/gallery", "photo")):
        answer = client.post(path, files=sent(data, name))
        assert answer.status_code == status
        assert answer.json().keys() == {"error"}
        assert said in answer.json()["error"]
        assert "\n" not in answer.json()["error"]
    assert searcher.asked == []


def test_a_body_without_a_length_is_cut_off_at_the_limit(client, searcher):
    def endless() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="photo"; filename="a"\r\n\r\n'
        for _ in range(1000):
            yield bytes(1000)

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = client.post("/search", content=endless(), headers=headers)
    assert answer.status_code == 413
    assert searcher.asked == []


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({}, "give a photo, or the id"),
        ({"id": "a", "top": 0}, "top: "),
        ({"id": "a", "top": 100_000}, "top: "),
        ({"id": "a", "since": "yesterday"}, "since: "),
    ],
)
def test_what_is_asked_wrongly_is_named(client, searcher, form, said):
    answer = client.post("/search", data=form)
    assert answer.status_code == 422
    assert said in answer.json()["error"]
    assert searcher.asked == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ObjectMissing("the gallery has no image x"), 404),
        (DataError("there is no threshold"), 422),
        (StorageError("the bucket is gone"), 503),
        (RuntimeError("internal detail"), 500),
    ],
)
def test_errors_of_the_searcher_get_their_status(client, searcher, error, status):
    searcher.answer = error
    answer = client.post("/search", data={"id": "x"})
    assert answer.status_code == status
    assert ("internal detail" in answer.text) is False
    assert (str(error) == answer.json()["error"]) == (status != 500)


def test_enrolment_and_removal(client, searcher):
    searcher.answer, data = IMAGE | {"enrolled": True}, picture()
    form = {"pid": 7, "camera": 2, "time": "2026-01-01T01:00:00+01:00"}
    answer = client.post("/gallery", files=sent(data), data=form)
    assert (answer.status_code, answer.json()["id"]) == (201, "a" * 24)
    assert searcher.asked == [("enrol", (data, "7", "2", 1767225600), {})]
    searcher.answer = True
    assert client.delete("/gallery/abc").json() == {"removed": True}


def test_without_the_token_nothing_is_told(searcher):
    with connect(searcher, SECRET, "192.0.2.7") as client:
        assert client.get("/").status_code == 200  # the page asks for it
        assert client.get("/healthz").json() == {"status": "ok"}
        calls = [("POST", "/search"), ("POST", "/gallery"), ("DELETE", "/gallery/a")]
        calls += [("GET", path) for path in ("/gallery", "/gallery/a/image", "/metrics")]
        for method, path in [*calls, ("GET", "/openapi.json"), ("GET", "/nothing")]:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": SECRET}):
                answer = client.request(method, path, headers=headers)
                assert answer.status_code == 401, path
        assert {method for method, *_ in searcher.asked} == {"status"}
        good = {"Authorization": f"Bearer {SECRET}"}
        assert client.get("/healthz", headers=good).json()["model"] == "models:/reid/7"


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}],
)
def test_pages_of_other_sites_cannot_use_a_service_on_loopback(client, searcher, headers):
    answer = client.post("/gallery", files=sent(picture()), headers=headers)
    assert answer.status_code == 403
    assert searcher.asked == []


def test_without_a_token_only_this_machine_is_answered(searcher):
    with connect(searcher, None, "192.0.2.7") as client:
        answer = client.get("/gallery", headers={"Host": "127.0.0.1:8000"})
        assert answer.status_code == 403


def test_the_page_runs_only_its_own_script(client):
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert policy.count("'sha256-") == 2
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "://" not in answer.text.replace("http-equiv", "")


def test_metrics_are_text_for_prometheus(client, searcher):
    client.post("/search", data={})
    text = client.get("/metrics").text
    assert 'reid_serve_requests_total{path="/search",status="422"} 1.0' in text
    assert "reid_serve_gallery_images 3.0" in text
    assert 'reid_serve_model{model="models:/reid/7"} 1.0' in text


def test_the_interface_is_described(client):
    paths = client.get("/openapi.json").json()["paths"]
    named = {"/search", "/compare", "/embed", "/gallery", "/gallery/{id}", "/healthz", "/metrics"}
    assert named <= paths.keys()
    assert client.get("/docs").status_code == 404  # it would load scripts from elsewhere


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("reid", False)],
)
def test_beyond_loopback_a_token_is_needed(monkeypatch, tmp_path: Path, host, expected):
    monkeypatch.delenv(TOKEN, raising=False)
    assert is_loopback(host) == expected
    if expected:
        assert token_digest(None, host) is None
    else:
        with pytest.raises(ConfigError, match="needs a token of at least 16 characters"):
            token_digest(None, host)
    file = tmp_path / "token"
    file.write_text(f"{SECRET}\n")
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    assert token_digest(file, host) == digest
    monkeypatch.setenv(TOKEN, SECRET)
    assert token_digest(None, host) == digest
    monkeypatch.setenv(TOKEN, "short")
    with pytest.raises(ConfigError, match="a token of 5 characters is too short"):
        token_digest(None, host)
    with pytest.raises(ConfigError, match="cannot read the token"):
        token_digest(tmp_path / "absent", host)


@pytest.mark.parametrize("name", ["replicas", "search_cpus", "cpus_per_replica", "max_pixels"])
def test_a_service_of_nothing_is_refused(name):
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} must be at least 1, not 0"):
        Settings("model", "gallery", **{name: 0}).check()
