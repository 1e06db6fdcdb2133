"""A real S3 server on this machine: OpenStack Swift with its S3 API, on loopback, data on disk.

It checks signatures, keeps its data over restarts, needs no root, and ends with the process that
started it:

    with S3Server("/tmp/objects") as server:
        os.environ.update(server.environment())
        server.create_bucket("runs")
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.local.swift import (
    HOST,
    REGION,
    SERVERS,
    STORAGE,
    last_lines,
    stop_process,
    write_private,
    write_settings,
)
from data_shards.errors import StorageError

logger = logging.getLogger(__name__)

START_SECONDS = 60.0


class S3Server:
    """An S3 server for one machine, owned by the process that starts it.

    Args:
        folder: for objects, settings, logs and credentials. A server started later on the same
            folder has the same objects and credentials.
        port: the port to listen on; 0 picks a free one at each start.
        host: the address to listen on, loopback unless asked otherwise.
    """

    def __init__(self, folder: str | Path, port: int = 0, host: str = HOST) -> None:
        self.folder = Path(folder).resolve()
        self.logs = self.folder / "logs"
        self._port = port
        self._host = host
        self._endpoint: str | None = None
        self._credentials: dict[str, str] = {}
        self._supervisor: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        """The server's address, such as `http://127.0.0.1:40123`."""
        if self._endpoint is None:
            raise StorageError(f"S3 server on {self.folder}: not started; call start() first")
        return self._endpoint

    @property
    def running(self) -> bool:
        """Whether its processes are alive."""
        return self._supervisor is not None and self._supervisor.poll() is None

    def environment(self) -> dict[str, str]:
        """Variables by which boto3, pyarrow, Ray and MLflow find this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self._credentials["access_key"],
            "AWS_SECRET_ACCESS_KEY": self._credentials["secret_key"],
            "AWS_DEFAULT_REGION": REGION,
            "MLFLOW_S3_ENDPOINT_URL": self.endpoint,
            # Swift sends the whole object's checksum with a range; botocore's default compares it.
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }

    def client(self, **config: Any) -> Any:
        """A boto3 S3 client of this server; `config` goes to botocore's `Config`."""
        return s3_client(self.environment(), **config)

    def create_bucket(self, name: str) -> None:
        """Create a bucket; one that exists is left as it is."""
        client = self.client()
        with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=name)

    def start(self) -> None:
        """Start the server and return when it answers; do nothing when it runs.

        Raises:
            StorageError: Swift is not installed, the folder cannot hold its data or is served by
                another process, or the servers do not start (the message has the end of their log).
        """
        if self.running:
            return
        if importlib.util.find_spec("swift") is None:
            raise StorageError(
                "S3 server: Swift is not installed; pip install adaptive-reid[local]"
            )
        for name in ("conf", "data/disk", "logs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        _check_attributes(self.folder)
        self._credentials = _credentials(self.folder / "credentials.json")
        log = self.logs / "supervisor.log"
        with open(self.folder / "lock", "w") as lock, open(log, "wb") as errors:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StorageError(
                    f"S3 server: {self.folder} is served by another process; stop that one, "
                    "or choose another folder"
                ) from None
            ports = free_ports(len(SERVERS))
            ports[-1] = self._port or ports[-1]
            write_settings(self.folder, ports, self._credentials, self._host)
            # The supervisor inherits the lock and holds it while it lives.
            self._supervisor = subprocess.Popen(
                [sys.executable, "-m", "cluster.local.swift", self.folder, str(os.getpid())]
                + [str(port) for port in ports],
                cwd=Path(__file__).parents[2],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=[lock.fileno()],
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )
        self._endpoint = f"http://{self._host}:{ports[-1]}"
        try:
            self._wait_until_healthy(ports)
        except BaseException:
            self.stop()
            raise
        logger.info("S3 server at %s, data in %s", self._endpoint, self.folder)

    def stop(self) -> None:
        """Stop the server and wait until all its processes are gone; the data stays."""
        if self._supervisor is not None:
            stop_process(self._supervisor, seconds=15)  # killed, it takes its servers with it
        self._supervisor = self._endpoint = None

    def _wait_until_healthy(self, ports: list[int]) -> None:
        """Wait for all four servers to listen and for a signed request to be answered."""
        assert self._supervisor is not None
        deadline = time.monotonic() + START_SECONDS
        client = self.client(connect_timeout=2, read_timeout=10, retries={"max_attempts": 0})
        while True:
            try:
                for host, port in zip([HOST] * len(STORAGE) + [self._host], ports, strict=True):
                    socket.create_connection((host, port), timeout=2).close()
                client.list_buckets()
                return
            except Exception as error:
                if self._supervisor.poll() is not None or time.monotonic() > deadline:
                    raise StorageError(
                        f"S3 server on {self.folder} did not start ({error}); its logs in "
                        f"{self.logs} end with: {last_lines(sorted(self.logs.glob('*.log')), 5)}"
                    ) from error
            time.sleep(0.05)


def s3_client(environment: Mapping[str, str], **config: Any) -> Any:
    """A boto3 client of the server that `S3Server.environment` describes.

    Args:
        environment: the variables.
        config: for botocore's `Config`.
    """
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_DEFAULT_REGION"],
        config=Config(proxies={}, response_checksum_validation="when_required", **config),
    )


def _check_attributes(folder: Path) -> None:
    """Refuse a filesystem without user extended attributes: Swift keeps its metadata there."""
    probe = folder / "data" / "probe"
    try:
        probe.touch()
        os.setxattr(probe, "user.probe", b"1")
    except (OSError, AttributeError) as error:
        raise StorageError(
            f"S3 server: the filesystem of {folder} has no user extended attributes ({error}); "
            "choose a folder on a Linux filesystem that has them, such as ext4, xfs or btrfs"
        ) from error
    finally:
        probe.unlink(missing_ok=True)


def _credentials(path: Path) -> dict[str, str]:
    """Read the folder's credentials, or create them in a file that only its owner can read."""
    if not path.exists():
        values = {
            "access_key": f"reid:{secrets.token_hex(8)}",
            "secret_key": secrets.token_hex(20),
            "hash_suffix": secrets.token_hex(16),
        }
        write_private(path, json.dumps(values))
    return json.loads(path.read_text())


def free_ports(count: int) -> list[int]:
    """Ports on loopback that are all free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for held in sockets:
            held.bind((HOST, 0))
        return [held.getsockname()[1] for held in sockets]
