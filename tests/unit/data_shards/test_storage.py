from __future__ import annotations

import errno
import hashlib
import http.client
import multiprocessing
import os
import pickle
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from data_shards.errors import ConfigError, DataError, ObjectExists, ObjectMissing, StorageError
from data_shards.storage import Storage, open_file, open_storage, retry, s3
from data_shards.storage import atomic as files

SECRET = "do-not-show-this-anywhere"


@pytest.fixture(autouse=True)
def credentials(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(retry, "PAUSE", 0.001)
    monkeypatch.setattr(retry, "PAUSE_MOST", 0.01)


@pytest.fixture(scope="module")
def moto_port() -> Iterator[int]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def bucket(moto_port, monkeypatch, request) -> str:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{moto_port}")
    name = "b" + hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:20]
    boto3.session.Session().client("s3").create_bucket(Bucket=name)
    return name


@pytest.fixture(params=["s3", "local"])
def storage(request, tmp_path) -> Storage:
    if request.param == "local":
        return open_storage(str(tmp_path / "store"))
    return open_storage(f"s3://{request.getfixturevalue('bucket')}/some/prefix")


class TestBothKinds:
    def test_reads_back_what_was_written(self, storage):
        storage.write("a/b.bin", b"hello")
        assert storage.read("a/b.bin") == b"hello"
        assert storage.size("a/b.bin") == 5
        assert storage.exists("a/b.bin")

    def test_write_replaces(self, storage):
        storage.write("k", b"old")
        storage.write("k", b"new")
        assert storage.read("k") == b"new"

    def test_create_once_refuses_and_leaves_what_was_there(self, storage):
        storage.write("k", b"old", create_once=True)
        with pytest.raises(ObjectExists):
            storage.write("k", b"new", create_once=True)
        assert storage.read("k") == b"old"

    def test_create_once_has_one_winner(self, storage):
        def contend(n: int) -> bool:
            try:
                storage.write("k", b"%d" % n, create_once=True)
            except ObjectExists:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(contend, range(8))) == 1

    def test_range_is_exact(self, storage):
        storage.write("k", bytes(range(100)))
        assert storage.read_range("k", 10, 5) == bytes(range(10, 15))
        assert storage.read_range("k", 10, 0) == b""

    @pytest.mark.parametrize("start", [3, 50])
    def test_range_past_the_end_is_an_error(self, storage, start):
        storage.write("k", b"12345")
        with pytest.raises(StorageError, match="truncated"):
            storage.read_range("k", start, 30)

    def test_missing_object_has_its_own_error(self, storage):
        for use in (storage.read, storage.size, lambda key: storage.read_range(key, 0, 1)):
            with pytest.raises(ObjectMissing):
                use("nothing")
        with pytest.raises(ObjectMissing):
            storage.download("nothing", Path("unused"))
        assert not storage.exists("nothing")
        storage.delete("nothing")

    def test_lists_by_key_below_a_prefix(self, storage):
        for key in ("b/2", "a", "b/10", "c"):
            storage.write(key, key.encode())
        assert list(storage.list()) == [("a", 1), ("b/10", 4), ("b/2", 3), ("c", 1)]
        assert [key for key, _ in storage.list("b/")] == ["b/10", "b/2"]
        assert [key for key, _ in storage.child("b").list()] == ["10", "2"]
        assert list(storage.list("zzz")) == []

    def test_delete_removes_one(self, storage):
        storage.write("a/x", b"1")
        storage.write("a/y", b"2")
        storage.delete("a/x")
        assert list(storage.list()) == [("a/y", 1)]

    def test_uploads_and_downloads_a_file(self, storage, tmp_path):
        source, target = tmp_path / "source", tmp_path / "deep" / "target"
        source.write_bytes(os.urandom(3 << 20))
        storage.upload("f", source)
        storage.download("f", target, sha256=files.file_sha256(source))
        assert target.read_bytes() == source.read_bytes()
        assert [p.name for p in target.parent.iterdir()] == ["target"]

    def test_download_with_another_digest_leaves_nothing(self, storage, tmp_path):
        storage.write("f", b"flipped")
        target = tmp_path / "deep" / "target"
        with pytest.raises(DataError, match="damaged"):
            storage.download("f", target, sha256="0" * 64)
        assert list(target.parent.iterdir()) == []

    def test_full_disk_is_named_and_leaves_nothing(self, storage, tmp_path, monkeypatch):
        storage.write("f", b"x")

        def full(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(files.os, "fsync", full)
        with pytest.raises(StorageError, match="disk full"):
            storage.download("f", tmp_path / "cache" / "target")
        assert list((tmp_path / "cache").iterdir()) == []

    @pytest.mark.parametrize("key", ["", "/etc/passwd", "../up", "a/../../up"])
    def test_keys_do_not_lead_out(self, storage, key):
        with pytest.raises(StorageError, match="not a key inside"):
            storage.read(key)

    def test_survives_pickling_and_forking(self, storage):
        storage.write("k", b"shared")
        copy = pickle.loads(pickle.dumps(storage))
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=lambda: queue.put(copy.read("k")))
        child.start()
        assert queue.get() == b"shared"
        child.join()


@pytest.mark.parametrize("url", ["s3:///key", "gs://bucket/x", "file://host/x", ""])
def test_urls_that_cannot_be_opened(url):
    with pytest.raises(ConfigError):
        open_storage(url)


@pytest.mark.parametrize(
    ("url", "right"),
    [
        ("s3:/bucket/x", "s3://bucket/x"),
        ("s3:bucket/x", "s3://bucket/x"),
        ("S3://bucket/x", "s3://bucket/x"),
        ("s3:///bucket", "s3://bucket/prefix"),
        ("file:/data/x", "file:///data/x"),
        ("file://data/x", "file:///data/x"),
        ("FILE:///data/x", "file:///data/x"),
    ],
)
def test_misspelt_url_is_refused_with_the_right_form(url, right, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(right)):
        open_storage(url)
    with pytest.raises(ConfigError, match=re.escape(right)):
        open_file(f"{url}/file")


@pytest.mark.parametrize("folder", ["s3", "files/s3:x", "./s3:x", "a:b"])
def test_path_that_only_looks_like_a_url_is_a_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_storage(folder).url == str(tmp_path / folder)


@pytest.mark.parametrize(
    ("url", "folder", "name"),
    [
        ("s3://b/a/x.pt", "s3://b/a", "x.pt"),
        ("s3://b/x.pt", "s3://b", "x.pt"),
        ("/a/x.pt", "/a", "x.pt"),
        ("/x.pt", "/", "x.pt"),
    ],
)
def test_file_is_found_in_its_folder(url, folder, name):
    storage, key = open_file(url)
    assert (storage.url, key) == (folder, name)


@pytest.mark.parametrize(
    ("url", "opened"),
    [
        ("s3://b/runs/", "s3://b/runs"),
        ("s3://b", "s3://b"),
        ("s3://b/data#v2", "s3://b/data#v2"),
        ("s3://b/what?/now", "s3://b/what?/now"),
        ("s3://b/100%25/ä", "s3://b/100%25/ä"),
    ],
)
def test_s3_urls_are_taken_by_the_letter(url, opened):
    assert open_storage(url).url == opened


def test_file_url_is_a_folder(tmp_path):
    folder = tmp_path / "with space"
    open_storage(folder.as_uri()).write("k", b"1")
    assert (folder / "k").read_bytes() == b"1"


def test_object_that_goes_while_it_is_listed_is_not_listed(tmp_path, monkeypatch):
    storage, walk = open_storage(str(tmp_path)), os.walk
    for key in ("a", "b"):
        storage.write(key, b"x")

    def walk_and_lose_one(root):
        found = list(walk(root))
        (tmp_path / "a").unlink()
        return found

    monkeypatch.setattr(os, "walk", walk_and_lose_one)
    assert list(storage.list()) == [("b", 1)]


def test_missing_bucket_is_not_a_missing_object(bucket):
    storage = open_storage("s3://no-such-bucket/x")
    for use in (storage.read, storage.exists, lambda key: storage.write(key, b"")):
        with pytest.raises(StorageError, match="no bucket 'no-such-bucket'") as caught:
            use("k")
        assert not isinstance(caught.value, ObjectMissing)


def test_no_credentials_says_what_to_set(bucket, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match="set AWS_ACCESS_KEY_ID"):
        open_storage(f"s3://{bucket}/x").read("k")


def test_unreachable_server_is_named_without_its_password(monkeypatch):
    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hunter2@127.0.0.1:9")
    with pytest.raises(StorageError, match=r"cannot reach http://127\.0\.0\.1:9") as caught:
        open_storage("s3://b/x").read("k")
    assert "hunter2" not in str(caught.value)


class Faulty:
    """An HTTP server before another, or before one object, that misbehaves as it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        faulty = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def answer(self):
                length = int(self.headers.get("Content-Length", 0))
                body = self.rfile.read(length)
                faulty.seen.append((self.command, self.path, self.headers.get("Range")))
                faulty.handle(self, body)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

        self.seen: list[tuple[str, str, str | None]] = []

        class Server(ThreadingHTTPServer):
            def handle_error(self, *args):  # a client that hung up is what is wanted here
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{self.server.server_port}")

    def handle(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        raise NotImplementedError


class Object(Faulty):
    """Serves one object; sends only `cuts[n]` bytes of the n-th answer, and then hangs up."""

    def __init__(self, monkeypatch, data: bytes, cuts: list[int], etags: list[str] | None = None):
        super().__init__(monkeypatch)
        self.data, self.cuts, self.etags = data, list(cuts), list(etags or [])
        self.honours_range = self.honours_if_match = True
        self.status_first: list[int] = []
        self.stall: list[float] = []

    def handle(self, request, body):
        if self.status_first:
            request.send_error(self.status_first.pop(0))
            request.close_connection = True
            return
        etag = self.etags.pop(0) if self.etags else '"v1"'
        wanted = request.headers.get("If-Match")
        if self.honours_if_match and wanted not in (None, etag):
            request.send_error(412)
            return
        part, ranged = self.data, request.headers.get("Range")
        if ranged and self.honours_range:
            start, stop = re.fullmatch(r"bytes=(\d+)-(\d*)", ranged).groups()
            part = self.data[int(start) : int(stop) + 1 if stop else None]
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-x/{len(self.data)}")
        else:
            request.send_response(200)
        request.send_header("ETag", etag)
        request.send_header("Content-Length", str(len(part)))
        request.end_headers()
        sent = self.cuts.pop(0) if self.cuts else len(part)
        request.wfile.write(part[:sent])
        request.wfile.flush()
        if self.stall:
            threading.Event().wait(self.stall.pop(0))
        request.close_connection = sent < len(part)


DATA = bytes(range(256)) * 20_000  # 5 MB


def test_download_continues_from_the_byte_it_reached(monkeypatch, tmp_path):
    server = Object(monkeypatch, DATA, cuts=[2_000_000, 1_500_000])
    digest = hashlib.sha256(DATA).hexdigest()
    open_storage("s3://b").download("k", tmp_path / "k", sha256=digest)
    ranges = [ranged for _, _, ranged in server.seen]
    assert ranges == [None, "bytes=2000000-5119999", "bytes=3500000-5119999"]


def test_ranged_read_survives_resets_too(monkeypatch):
    Object(monkeypatch, DATA, cuts=[1_000_000, 1_000_000])
    assert open_storage("s3://b").read_range("k", 7, 3_000_000) == DATA[7:3_000_007]


def test_stalled_connection_is_given_up_and_resumed(monkeypatch):
    monkeypatch.setattr(s3, "READ_SECONDS", 0.3)
    server = Object(monkeypatch, DATA, cuts=[2_000_000])
    server.stall = [3.0]
    assert open_storage("s3://b").read("k") == DATA
    assert len(server.seen) == 2


def test_retries_are_bounded(monkeypatch):
    monkeypatch.setattr(retry, "RETRY_SECONDS", 1.0)
    Object(monkeypatch, DATA, cuts=[0] * 10_000)
    with pytest.raises(StorageError, match="cannot reach"):
        open_storage("s3://b").read("k")


def test_busy_server_is_tried_again(monkeypatch, caplog):
    server = Object(monkeypatch, DATA, cuts=[])
    server.status_first = [503, 500]
    assert open_storage("s3://b").read("k") == DATA
    assert caplog.text.count("trying again in") == 2


@pytest.mark.parametrize("honours_if_match", [True, False])
def test_object_replaced_during_a_read_is_not_mixed(monkeypatch, honours_if_match):
    server = Object(monkeypatch, DATA, cuts=[1_000_000], etags=['"v1"', '"v2"'])
    server.honours_if_match = honours_if_match
    with pytest.raises(StorageError, match="replaced while it was read"):
        open_storage("s3://b").read("k")


def test_server_that_ignores_ranges_is_not_believed(monkeypatch):
    server = Object(monkeypatch, DATA, cuts=[1_000_000])
    server.honours_range = False
    with pytest.raises(StorageError, match="ignores Range requests"):
        open_storage("s3://b").read("k")


def test_refused_credentials_are_not_repeated(monkeypatch):
    class Refusing(Faulty):
        def handle(self, request, body):
            text = f"<Error><Code>SignatureDoesNotMatch</Code><Message>{SECRET}</Message></Error>"
            request.send_response(403)
            request.send_header("Content-Length", str(len(text)))
            request.end_headers()
            if request.command != "HEAD":
                request.wfile.write(text.encode())

    server = Refusing(monkeypatch)
    storage = open_storage("s3://b/x")
    for use in (storage.read, storage.exists, lambda key: storage.write(key, b"")):
        with pytest.raises(StorageError, match=r"denies access.*AWS_ACCESS_KEY_ID") as caught:
            use("k")
        assert SECRET not in str(caught.value)
    assert len(server.seen) == 3, "what is refused is not asked again"


class Refusing(Faulty):
    """Refuses with a code while it does not like the key's session token."""

    def __init__(self, monkeypatch, status: int, code: str, liked: str = ""):
        super().__init__(monkeypatch)
        self.status, self.code, self.liked = status, code, liked

    def handle(self, request, body):
        liked = self.liked and request.headers["x-amz-security-token"] == self.liked
        text = "found" if liked else f"<Error><Code>{self.code}</Code></Error>"
        request.send_response(200 if liked else self.status)
        request.send_header("Content-Length", str(len(text)))
        request.send_header("ETag", '"1"')
        request.end_headers()
        request.wfile.write(text.encode())


def write_keys(path: Path, token: str) -> None:
    keys = f"aws_access_key_id=a\naws_secret_access_key=b\naws_session_token={token}\n"
    path.write_text(f"[default]\n{keys}")


def test_credentials_that_another_program_renewed_are_read_again(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    write_keys(tmp_path / "keys", "first")
    server = Refusing(monkeypatch, 400, "ExpiredToken", liked="first")
    storage = open_storage("s3://b/x")
    assert storage.read("k") == b"found"
    server.liked = "second"  # the first expires
    with pytest.raises(StorageError, match=r"credentials for s3://b/x/k have expired .* renew"):
        storage.read("k")
    assert len(server.seen) == 3
    write_keys(tmp_path / "keys", "second")
    assert storage.read("k") == b"found"


def test_clock_that_is_wrong_is_named(monkeypatch):
    Refusing(monkeypatch, 403, "RequestTimeTooSkewed")
    with pytest.raises(StorageError, match=r"clock differs from the server's .* NTP"):
        open_storage("s3://b/x").read("k")


def use_proxy(monkeypatch, proxy: str) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, proxy if name.lower() == "http_proxy" else "elsewhere")


def test_server_on_this_machine_is_reached_without_the_proxy(bucket, monkeypatch):
    s3._client_of.cache_clear()
    use_proxy(monkeypatch, "http://127.0.0.1:9")
    open_storage(f"s3://{bucket}/x").write("k", b"whole")
    assert open_storage(f"s3://{bucket}/x").read("k") == b"whole"


def test_proxy_that_fails_is_named(monkeypatch):
    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.1)
    use_proxy(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3.invalid")
    with pytest.raises(
        StorageError, match="by the proxy of HTTP_PROXY or HTTPS_PROXY; see NO_PROXY"
    ):
        open_storage("s3://b/x").read("k")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            "<Region>eu-north-1</Region>",
            "expects eu-north-1 for .* AWS_DEFAULT_REGION=eu-north",
        ),
        ("", "expects another region for s3://b/x/k, not us-east-1: set AWS_DEFAULT_REGION$"),
    ],
)
def test_wrong_region_is_explained(monkeypatch, answer, message):
    class Elsewhere(Faulty):
        def handle(self, request, body):
            text = f"<Error><Code>AuthorizationHeaderMalformed</Code>{answer}</Error>"
            request.send_response(400)
            request.send_header("Content-Length", str(len(text)))
            request.end_headers()
            if request.command != "HEAD":
                request.wfile.write(text.encode())

    Elsewhere(monkeypatch)
    storage = open_storage("s3://b/x")
    for use in (storage.read, storage.exists, lambda key: storage.write(key, b"")):
        with pytest.raises(StorageError, match=message):
            use("k")


class Proxy(Faulty):
    """Passes requests on, except those whose path matches `refuse`; loses some answers."""

    def __init__(self, monkeypatch, port: int):
        super().__init__(monkeypatch)
        self.port, self.refuse, self.lose = port, "", 0

    def handle(self, request, body):
        if self.refuse and re.search(self.refuse, request.path):
            request.close_connection = True
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.port)
        upstream.request(request.command, request.path, body, dict(request.headers))
        answer = upstream.getresponse()
        content = answer.read()
        if self.lose:
            self.lose -= 1
            request.close_connection = True
            return
        request.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                request.send_header(name, value)
        request.end_headers()
        request.wfile.write(content)


def test_create_once_recognises_its_own_bytes_after_a_lost_answer(bucket, moto_port, monkeypatch):
    proxy = Proxy(monkeypatch, moto_port)
    proxy.lose = 1
    open_storage(f"s3://{bucket}").write("k", b"mine", create_once=True)
    assert open_storage(f"s3://{bucket}").read("k") == b"mine"


class TestMultipart:
    @pytest.fixture(autouse=True)
    def small_parts(self, monkeypatch):
        least = 5 << 20  # that S3 allows
        monkeypatch.setattr("data_shards.storage.multipart.PART_BYTES", least)
        monkeypatch.setattr("data_shards.storage.multipart.PART_THREADS", 1)
        monkeypatch.setattr(retry, "RETRY_SECONDS", 2.0)

    @pytest.fixture
    def proxy(self, bucket, moto_port, monkeypatch) -> Proxy:
        return Proxy(monkeypatch, moto_port)

    @pytest.fixture
    def file(self, tmp_path) -> Path:
        path = tmp_path / "shard.tar"
        path.write_bytes(os.urandom(13 << 20))
        return path

    def parts_sent(self, proxy: Proxy) -> list[str]:
        found = (re.search(r"partNumber=(\d+)", path) for method, path, _ in proxy.seen)
        return [match[1] for match in found if match]

    def interrupt(self, storage, proxy, file):
        proxy.refuse = "partNumber=3"
        with pytest.raises(StorageError):
            storage.upload("k", file)
        proxy.refuse = ""
        proxy.seen.clear()

    def test_interrupted_upload_sends_only_what_is_missing(self, bucket, proxy, file):
        storage = open_storage(f"s3://{bucket}")
        self.interrupt(storage, proxy, file)
        storage.upload("k", file)
        assert self.parts_sent(proxy) == ["3"]
        assert storage.read("k") == file.read_bytes()
        assert [p.name for p in file.parent.iterdir()] == ["shard.tar"], "its note is gone"

    def test_changed_file_is_sent_afresh(self, bucket, proxy, file):
        storage = open_storage(f"s3://{bucket}")
        self.interrupt(storage, proxy, file)
        file.write_bytes(os.urandom(13 << 20))
        storage.upload("k", file)
        assert self.parts_sent(proxy) == ["1", "2", "3"]
        assert storage.read("k") == file.read_bytes()
        uploads = boto3.session.Session().client("s3").list_multipart_uploads(Bucket=bucket)
        assert "Uploads" not in uploads, "the first one's parts are forgotten"

    def test_upload_that_the_server_forgot_is_sent_afresh(self, bucket, proxy, file):
        storage = open_storage(f"s3://{bucket}")
        self.interrupt(storage, proxy, file)
        client = boto3.session.Session().client("s3")
        for upload in client.list_multipart_uploads(Bucket=bucket)["Uploads"]:
            client.abort_multipart_upload(Bucket=bucket, Key="k", UploadId=upload["UploadId"])
        proxy.seen.clear()
        storage.upload("k", file)
        assert self.parts_sent(proxy) == ["1", "2", "3"]

    def test_upload_completes_when_the_answer_was_lost(self, bucket, proxy, file, monkeypatch):
        storage = open_storage(f"s3://{bucket}")
        handle = proxy.handle

        def lose_completion(request, body):
            if body.startswith(b"<CompleteMultipartUpload") and not proxy.lose:
                monkeypatch.setattr(proxy, "handle", handle)
                proxy.lose = 1
            handle(request, body)

        monkeypatch.setattr(proxy, "handle", lose_completion)
        storage.upload("k", file)
        assert storage.read("k") == file.read_bytes()
        completions = [path for method, path, _ in proxy.seen if method == "POST"][1:]
        assert len(completions) == 2
