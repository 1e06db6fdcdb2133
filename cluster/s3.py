"""A real S3 server on this machine: OpenStack Swift with its S3 door, on loopback, data on disk.

It checks signatures, survives restarts, needs no root, and ends with the process that started it:

    with S3Server("/tmp/objects") as server:
        os.environ.update(server.environment())
        server.create_bucket("runs")

A supervisor process (this module, run as a command) builds the one-replica rings, starts Swift's
account, container, object and proxy servers, and stops them when its parent goes. It polls its
parent's id for that, because Linux's parent-death signal fires when the starting *thread* ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.util
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from data_shards.errors import StorageError

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
REGION = "us-east-1"
STORAGE = ("account", "container", "object")
SERVERS = (*STORAGE, "proxy")
START_SECONDS = 60.0

# The time limits are generous because no updater runs beside the servers: an update that timed
# out on a busy machine would leave an object out of its bucket's listing for good.
COMMON_CONF = """\
[DEFAULT]
bind_ip = {host}
bind_port = {port}
bind_timeout = 1
workers = 0
swift_dir = {conf}
devices = {data}
mount_check = false
recon_cache_path = {conf}
log_level = WARNING
log_udp_host = {host}
log_udp_port = 9
conn_timeout = 10
node_timeout = 60
container_update_timeout = 60
error_suppression_interval = 0
"""
STORAGE_CONF = """\
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""
# No cache filter: it would share answers through whatever memcached this machine happens to run.
PROXY_CONF = """\
[pipeline:main]
pipeline = catch_errors listing_formats s3api tempauth bulk slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:s3api]
use = egg:swift#s3api
location = {region}
max_upload_part_num = 10000
[filter:tempauth]
use = egg:swift#tempauth
user_{user} = {secret_key} .admin
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
max_manifest_segments = 10000
"""


class S3Server:
    """An S3 server for one machine, owned by the process that starts it.

    Args:
        folder: where objects, settings, logs and credentials live. A server started on the same
            folder later has the same objects and the same credentials.
        port: the port to listen on; 0 picks a free one at each start.
    """

    def __init__(self, folder: str | Path, port: int = 0) -> None:
        self.folder = Path(folder).resolve()
        self.logs = self.folder / "logs"
        self._port = port
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
    def access_key(self) -> str:
        return self._credentials["access_key"]

    @property
    def secret_key(self) -> str:
        return self._credentials["secret_key"]

    def environment(self) -> dict[str, str]:
        """Variables by which boto3, pyarrow, Ray and MLflow find this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": REGION,
            "MLFLOW_S3_ENDPOINT_URL": self.endpoint,
        }

    def client(self, **config: Any) -> Any:
        """A boto3 S3 client signed in to this server; `config` goes to botocore's `Config`."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=REGION,
            config=Config(proxies={}, response_checksum_validation="when_required", **config),
        )

    def create_bucket(self, name: str) -> None:
        """Create a bucket; one that is there already is left as it is."""
        client = self.client()
        with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=name)

    def start(self) -> None:
        """Start the server and return when it answers; does nothing when it runs already.

        Raises:
            StorageError: Swift is not installed, the folder cannot hold its data or is served by
                another process, or the servers do not come up (the message has their log's end).
        """
        if self._supervisor is not None and self._supervisor.poll() is None:
            return
        if importlib.util.find_spec("swift") is None:
            raise StorageError(
                "S3 server: Swift is not installed; pip install adaptive-reid[local]"
            )
        for name in ("conf", "data/disk", "logs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        _check_attributes(self.folder)
        self._credentials = _credentials(self.folder / "credentials.json")
        with open(self.folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StorageError(
                    f"S3 server: {self.folder} is served by another process; stop that one, "
                    "or choose another folder"
                ) from None
            ports = _free_ports(self._port)
            _write_settings(self.folder, ports, self._credentials)
            # The supervisor inherits the lock and so holds it for as long as it lives.
            self._supervisor = subprocess.Popen(
                [sys.executable, "-m", "cluster.s3", self.folder, str(os.getpid())]
                + [str(port) for port in ports],
                cwd=Path(__file__).parents[1],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=open(self.logs / "supervisor.log", "wb"),  # noqa: SIM115
                pass_fds=[lock.fileno()],
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )
        self._endpoint = f"http://{HOST}:{ports[-1]}"
        try:
            self._wait_until_healthy(ports)
        except BaseException:
            self.stop()
            raise
        logger.info("S3 server at %s, data in %s", self._endpoint, self.folder)

    def stop(self) -> None:
        """Stop the server and wait until all its processes are gone; the data stays."""
        if self._supervisor is not None:
            self._supervisor.terminate()
            try:
                self._supervisor.wait(timeout=15)
            except subprocess.TimeoutExpired:
                self._supervisor.kill()  # its servers have its death as their own kill signal
                self._supervisor.wait()
        self._supervisor = self._endpoint = None

    def _wait_until_healthy(self, ports: list[int]) -> None:
        """Wait for all four servers to listen and for a signed request to be answered."""
        assert self._supervisor is not None
        deadline = time.monotonic() + START_SECONDS
        client = self.client(connect_timeout=2, read_timeout=10, retries={"max_attempts": 0})
        while True:
            try:
                for port in ports:
                    socket.create_connection((HOST, port), timeout=2).close()
                client.list_buckets()
                return
            except Exception as error:
                if self._supervisor.poll() is not None or time.monotonic() > deadline:
                    raise StorageError(
                        f"S3 server on {self.folder} did not start ({error}); its logs in "
                        f"{self.logs} end with: {_last_lines(self.logs)}"
                    ) from error
            time.sleep(0.05)


def _check_attributes(folder: Path) -> None:
    """Refuse a filesystem without user extended attributes: Swift keeps its metadata there."""
    probe = folder / "data" / "probe"
    try:
        probe.touch()
        os.setxattr(probe, "user.probe", b"1")
    except (OSError, AttributeError) as error:
        raise StorageError(
            f"S3 server: the filesystem of {folder} takes no user extended attributes ({error}); "
            "choose a folder on a Linux filesystem that does, such as ext4, xfs or btrfs"
        ) from error
    finally:
        probe.unlink(missing_ok=True)


def _credentials(path: Path) -> dict[str, str]:
    """Read the folder's credentials, or generate them into a file that only its owner can read."""
    if not path.exists():
        values = {
            "access_key": f"reid:{secrets.token_hex(8)}",
            "secret_key": secrets.token_hex(20),
            "hash_suffix": secrets.token_hex(16),
        }
        _write_private(path, json.dumps(values))
    return json.loads(path.read_text())


def _write_private(path: Path, text: str) -> None:
    temporary = path.with_suffix(".partial")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    os.replace(temporary, path)


def _free_ports(proxy: int) -> list[int]:
    """Ports in the order of `SERVERS`, all free now; the proxy's is `proxy` unless that is 0."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in SERVERS]
        for held in sockets:
            held.bind((HOST, 0))
        ports = [held.getsockname()[1] for held in sockets]
    return [*ports[:-1], proxy or ports[-1]]


def _write_settings(folder: Path, ports: list[int], credentials: dict[str, str]) -> None:
    conf = folder / "conf"
    suffix = credentials["hash_suffix"]
    _write_private(conf / "swift.conf", f"[swift-hash]\nswift_hash_path_suffix = {suffix}\n")
    user = credentials["access_key"].replace(":", "_")
    for name, port in zip(SERVERS, ports, strict=True):
        text = COMMON_CONF + (PROXY_CONF if name == "proxy" else STORAGE_CONF)
        values = {"host": HOST, "port": port, "conf": conf, "data": folder / "data", "name": name}
        secret = credentials["secret_key"]
        text = text.format(**values, region=REGION, user=user, secret_key=secret)
        _write_private(conf / f"{name}.conf", text)


def _last_lines(logs: Path) -> str:
    lines = [line for log in sorted(logs.glob("*.log")) for line in log.read_text().splitlines()]
    return " | ".join(lines[-5:]) or "nothing"


def _build_rings(conf: Path, ports: list[int]) -> None:
    """Write the rings that map everything to the one disk; made anew because ports change."""
    from swift.common.ring import RingBuilder  # pyright: ignore[reportMissingImports]

    for name, port in zip(STORAGE, ports, strict=False):
        builder = RingBuilder(part_power=4, replicas=1, min_part_hours=0)
        device = {"region": 1, "zone": 1, "ip": HOST, "port": port, "device": "disk", "weight": 1}
        builder.add_dev(device)
        builder.rebalance(seed="0")
        builder.get_ring().save(str(conf / f"{name}.ring.gz"))


def _supervise(folder: Path, parent: int, ports: list[int]) -> None:
    """Run the four servers until told to stop, one of them ends, or `parent` is gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    set_parent_death_signal = 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _build_rings(folder / "conf", ports)
    servers = []
    try:
        for name in SERVERS:
            command = Path(sys.executable).parent / f"swift-{name}-server"
            with open(folder / "logs" / f"{name}.log", "ab") as log:
                servers.append(
                    subprocess.Popen(
                        [sys.executable, command, folder / "conf" / f"{name}.conf", "-v"],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        preexec_fn=lambda: libc.prctl(set_parent_death_signal, signal.SIGKILL),
                    )
                )
        while os.getppid() == parent and all(server.poll() is None for server in servers):
            time.sleep(0.2)
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            try:
                server.wait(timeout=5)
            except subprocess.TimeoutExpired:
                server.kill()


if __name__ == "__main__":
    _supervise(Path(sys.argv[1]), int(sys.argv[2]), [int(port) for port in sys.argv[3:]])
