"""The embedded S3 server against the clients that the project uses."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import boto3
import psutil
import pyarrow.fs
import pytest
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import ClientError

from cluster.local.s3_server import S3Server
from data_shards.errors import StorageError

PART = 5 * 2**20


def servers_of(folder: Path) -> list[psutil.Process]:
    """All processes with `folder` on their command line, other than this one."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if process.pid != os.getpid() and any(str(folder) in word for word in words[1:]):
            found.append(process)
    return found


def credentials(server: S3Server) -> tuple[str, str]:
    """A server's access key and secret key."""
    given = server.environment()
    return given["AWS_ACCESS_KEY_ID"], given["AWS_SECRET_ACCESS_KEY"]


def wait_until_gone(folder: Path, seconds: float = 15) -> list[psutil.Process]:
    deadline = time.monotonic() + seconds
    while (left := servers_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def test_objects_are_read_back_whole_and_by_range(s3):
    client = s3.server.client()
    client.put_object(Bucket=s3.name, Key="folder/object", Body=b"0123456789")
    assert client.get_object(Bucket=s3.name, Key="folder/object")["Body"].read() == b"0123456789"
    part = client.get_object(Bucket=s3.name, Key="folder/object", Range="bytes=3-5")
    assert part["Body"].read() == b"345"
    listed = client.list_objects_v2(Bucket=s3.name, Prefix="folder/")["Contents"]
    assert [(item["Key"], item["Size"]) for item in listed] == [("folder/object", 10)]


def test_environment_is_enough_to_sign_in(s3):
    config = Config(response_checksum_validation="when_required")
    client = boto3.client("s3", config=config)
    client.put_object(Bucket=s3.name, Key="object", Body=b"here")
    assert client.head_object(Bucket=s3.name, Key="object")["ContentLength"] == 4


def test_multipart_upload_joins_its_parts(s3):
    client = s3.server.client()
    parts = [os.urandom(PART), os.urandom(1000)]
    upload = client.create_multipart_upload(Bucket=s3.name, Key="large")["UploadId"]
    done = []
    for number, body in enumerate(parts, start=1):
        answer = client.upload_part(
            Bucket=s3.name, Key="large", UploadId=upload, PartNumber=number, Body=body
        )
        done.append({"PartNumber": number, "ETag": answer["ETag"]})
    client.complete_multipart_upload(
        Bucket=s3.name, Key="large", UploadId=upload, MultipartUpload={"Parts": done}
    )
    assert client.get_object(Bucket=s3.name, Key="large")["Body"].read() == b"".join(parts)
    across = client.get_object(Bucket=s3.name, Key="large", Range=f"bytes={PART - 2}-{PART + 1}")
    assert across["Body"].read() == parts[0][-2:] + parts[1][:2]


def test_a_large_object_that_is_deleted_gives_back_its_room(s3, tmp_path):
    path, client = tmp_path / "large", s3.server.client()
    path.write_bytes(os.urandom(2 * PART))
    held = room(s3.server.folder)
    multipart = TransferConfig(multipart_threshold=PART, multipart_chunksize=PART)
    client.upload_file(str(path), s3.name, "large", Config=multipart)
    assert room(s3.server.folder) >= held + 2 * PART
    client.delete_object(Bucket=s3.name, Key="large")
    assert room(s3.server.folder) < held + PART


def room(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*.data"))


def test_create_once_refuses_a_second_write(s3):
    client = s3.server.client()
    client.put_object(Bucket=s3.name, Key="once", Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError) as refused:
        client.put_object(Bucket=s3.name, Key="once", Body=b"second", IfNoneMatch="*")
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412
    assert client.get_object(Bucket=s3.name, Key="once")["Body"].read() == b"first"


@pytest.mark.parametrize("wrong", ["access_key", "secret_key"])
def test_wrong_credentials_are_refused(s3, wrong):
    keys = dict(zip(("access_key", "secret_key"), credentials(s3.server), strict=True))
    keys[wrong] = keys[wrong][:-1] + "x"
    client = boto3.client(
        "s3",
        endpoint_url=s3.server.endpoint,
        aws_access_key_id=keys["access_key"],
        aws_secret_access_key=keys["secret_key"],
        region_name="us-east-1",
    )
    with pytest.raises(ClientError) as refused:
        client.list_objects_v2(Bucket=s3.name)
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


def test_creating_a_bucket_twice_keeps_its_objects(s3):
    client = s3.server.client()
    client.put_object(Bucket=s3.name, Key="object", Body=b"kept")
    s3.server.create_bucket(s3.name)
    assert client.get_object(Bucket=s3.name, Key="object")["Body"].read() == b"kept"


def test_pyarrow_writes_folders_and_files_as_ray_does(s3):
    filesystem, folder = pyarrow.fs.FileSystem.from_uri(f"{s3.url}/runs/one")
    filesystem.create_dir(folder, recursive=True)
    with filesystem.open_output_stream(f"{folder}/file") as stream:
        stream.write(b"checkpoint")
    with filesystem.open_input_stream(f"{folder}/file") as stream:
        assert stream.read() == b"checkpoint"
    selector = pyarrow.fs.FileSelector(s3.name, recursive=True)
    kinds = {item.path: item.type for item in filesystem.get_file_info(selector)}
    assert kinds[folder] == pyarrow.fs.FileType.Directory
    filesystem.delete_dir(folder)
    assert filesystem.get_file_info(f"{folder}/file").type == pyarrow.fs.FileType.NotFound


def test_restart_keeps_objects_and_credentials(tmp_path):
    with S3Server(tmp_path) as server:
        keys = credentials(server)
        server.create_bucket("kept")
        server.client().put_object(Bucket="kept", Key="object", Body=b"still here")
    assert servers_of(tmp_path) == []
    with S3Server(tmp_path) as server:
        assert credentials(server) == keys
        answer = server.client().get_object(Bucket="kept", Key="object")
        assert answer["Body"].read() == b"still here"


def test_start_is_idempotent_and_stop_leaves_nothing_running(tmp_path):
    server = S3Server(tmp_path)
    server.start()
    first = server.endpoint
    server.start()
    assert server.endpoint == first
    running = servers_of(tmp_path)
    assert len(running) == 5  # four servers and their supervisor
    listening = {item.laddr.ip for process in running for item in process.net_connections()}
    assert listening == {"127.0.0.1"}
    server.stop()
    server.stop()
    assert servers_of(tmp_path) == []


@pytest.mark.parametrize("victim", ["parent", "supervisor"])
def test_servers_end_when_what_started_them_is_killed(tmp_path, victim):
    code = (
        "import time; from cluster.local.s3_server import S3Server; "
        "S3Server(input()).start(); print('up', flush=True); time.sleep(600)"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        try:
            parent.stdin.write(f"{tmp_path}\n".encode())
            parent.stdin.flush()
            assert parent.stdout.readline() == b"up\n"
            (supervisor,) = psutil.Process(parent.pid).children()
            (parent if victim == "parent" else supervisor).send_signal(signal.SIGKILL)
            assert wait_until_gone(tmp_path) == []
        finally:
            parent.kill()


def test_credentials_are_readable_by_their_owner_only(tmp_path):
    with S3Server(tmp_path) as server:
        _, secret = credentials(server)
    holders = [path for path in tmp_path.rglob("*") if path.is_file()]
    holders = [path for path in holders if secret.encode() in path.read_bytes()]
    assert tmp_path / "credentials.json" in holders
    assert {stat.S_IMODE(path.stat().st_mode) for path in holders} == {0o600}


def test_folder_in_use_by_another_server_is_refused(tmp_path):
    with S3Server(tmp_path), pytest.raises(StorageError, match="served by another process"):
        S3Server(tmp_path).start()


def test_folder_without_extended_attributes_is_refused(tmp_path, monkeypatch):
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", unsupported)
    with pytest.raises(StorageError, match="choose a folder"):
        S3Server(tmp_path).start()


def test_servers_that_do_not_come_up_are_reported_with_their_log(tmp_path):
    (tmp_path / "conf" / "account.ring.gz").mkdir(parents=True)
    with pytest.raises(StorageError, match="did not start"):
        S3Server(tmp_path).start()
    assert servers_of(tmp_path) == []
