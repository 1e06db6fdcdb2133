"""What S3 and the way to it do wrong: retried, resumed, or explained."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import boto3
import pytest
from s3_servers import DATA, SECRET, Faulty, Object, Proxy, Refusing

from data_shards.errors import ObjectMissing, StorageError
from data_shards.storage import open_storage, retry, s3

pytestmark = pytest.mark.usefixtures("credentials")


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


def test_server_without_conditional_writes_is_named_at_once(monkeypatch):
    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.5)
    server = Refusing(monkeypatch, 501, "NotImplemented")
    with pytest.raises(StorageError, match=r"does not support conditional writes \(If-None-Match"):
        open_storage("s3://b/x").write("k", b"", create_once=True)
    with pytest.raises(StorageError, match=r"does not support PutObject, needed for s3://b/x/k"):
        open_storage("s3://b/x").write("k", b"")
    assert len(server.seen) == 2


@pytest.mark.parametrize(("code", "message"), [("AccessDenied", "denies"), ("Odd", "refuses")])
def test_refusal_from_another_region_is_not_taken_for_a_wrong_region(monkeypatch, code, message):
    class Elsewhere(Refusing):
        def handle(self, request, body):
            send_response = request.send_response

            def with_region(status):
                send_response(status)
                request.send_header("x-amz-bucket-region", "eu-west-3")

            request.send_response = with_region
            super().handle(request, body)

    Elsewhere(monkeypatch, 403, code)
    with pytest.raises(StorageError, match=rf"{message} access to s3://b/x/k \({code}\)"):
        open_storage("s3://b/x").read("k")


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
