"""A real S3 server on this machine: OpenStack Swift with its S3 API, on loopback, data on disk.

It checks signatures, keeps its data over restarts and needs no root. `S3Server` runs this file as a
command, which supervises Swift's account, container, object and proxy servers. It stops them when
its parent ends, and polls for that: Linux's parent-death signal is already sent when the starting
*thread* ends.
"""

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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from data_shards.errors import StorageError

logger = logging.getLogger(__name__)

START_SECONDS = 60.0
HOST = "127.0.0.1"
REGION = "us-east-1"
STORAGE = ("account", "container", "object")
SERVERS = (*STORAGE, "proxy")

# Long timeouts: no updater runs beside the servers, so an update that timed out on a busy machine
# would never reach the bucket's listing.
COMMON_CONF = """\
[DEFAULT]
bind_ip = {bind}
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
# The proxy's filters, in order. No cache: it would use any memcached that runs on this machine.
FILTERS = {
    "catch_errors": "",
    "listing_formats": "",
    "s3api": "location = {region}\nmax_upload_part_num = 10000\n",
    "tempauth": "user_{user} = {secret_key} .admin\n",
    "bulk": "",
    # Delete the segments of a large object with it: no expirer runs that would do it later.
    "slo": "max_manifest_segments = 10000\nallow_async_delete = false\n",
}
PROXY_CONF = f"""\
[pipeline:main]
pipeline = {" ".join(FILTERS)} proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
""" + "".join(f"[filter:{name}]\nuse = egg:swift#{name}\n{FILTERS[name]}" for name in FILTERS)


class S3Server:
    """An S3 server for one machine, which ends with the process that starts it.

        with S3Server("/tmp/objects") as server:
            os.environ.update(server.environment())
            server.create_bucket("runs")

    Objects, settings, logs and credentials are in `folder`: a server started later on it has the
    same objects and credentials. Port 0 picks a free one at each start.
    """

    def __init__(self, folder: str | Path, port: int = 0, host: str = HOST) -> None:
        self.folder = Path(folder).resolve()
        self.logs = self.folder / "logs"
        self._port, self._host = port, host
        self._endpoint: str | None = None
        self._credentials: dict[str, str] = {}
        self._supervisor: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
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
        """Start the server and return when it answers; do nothing when it runs."""
        if self.running:
            return
        if importlib.util.find_spec("swift") is None:
            hint = "pip install -e '.[local]'"
            raise StorageError(f"S3 server: Swift is not installed; {hint}")
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
            _write_settings(self.folder, ports, self._credentials, self._host)
            # The supervisor inherits the lock and holds it while it lives.
            command = [sys.executable, "-m", "cluster.local.s3_server", self.folder]
            self._supervisor = subprocess.Popen(
                [*command, *map(str, (os.getpid(), *ports))],
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
    """A boto3 client of the server that `S3Server.environment` describes; see `S3Server.client`."""
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


def _write_settings(folder: Path, ports: list[int], credentials: dict[str, str], host: str) -> None:
    """Write the servers' settings; only the proxy, which clients talk to, listens on `host`."""
    conf = folder / "conf"
    suffix = credentials["hash_suffix"]
    write_private(conf / "swift.conf", f"[swift-hash]\nswift_hash_path_suffix = {suffix}\n")
    values = {"host": HOST, "conf": conf, "data": folder / "data", "region": REGION, **credentials}
    values["user"] = credentials["access_key"].replace(":", "_")
    for name, port in zip(SERVERS, ports, strict=True):
        text = COMMON_CONF + (PROXY_CONF if name == "proxy" else STORAGE_CONF)
        bind = host if name == "proxy" else HOST
        write_private(conf / f"{name}.conf", text.format(**values, name=name, port=port, bind=bind))


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, atomically."""
    temporary = path.with_suffix(".partial")
    temporary.unlink(missing_ok=True)
    temporary.touch(0o600, exist_ok=False)
    temporary.write_text(text)
    temporary.replace(path)


def stop_process(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Ask a process to end; kill it if it is still there after so many seconds."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def last_lines(logs: Iterable[Path], count: int = 3) -> str:
    """The end of some logs in one line, for a message."""
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines() if line]
    return " | ".join(lines[-count:]) or "nothing"


def _build_rings(conf: Path, ports: list[int]) -> None:
    """Write the rings that map everything to the one disk; new each time, because ports change."""
    from swift.common.ring import RingBuilder  # pyright: ignore[reportMissingImports]

    device = {"region": 1, "zone": 1, "ip": HOST, "device": "disk", "weight": 1}
    for name, port in zip(STORAGE, ports, strict=False):
        builder = RingBuilder(part_power=4, replicas=1, min_part_hours=0)
        builder.add_dev(device | {"port": port})
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
            program = Path(sys.executable).parent / f"swift-{name}-server"
            command = [sys.executable, program, folder / "conf" / f"{name}.conf", "-v"]
            with open(folder / "logs" / f"{name}.log", "ab") as log:
                server = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    preexec_fn=lambda: libc.prctl(set_parent_death_signal, signal.SIGKILL),
                )
            servers.append(server)
        while os.getppid() == parent and all(server.poll() is None for server in servers):
            time.sleep(0.2)
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            stop_process(server, seconds=5)


if __name__ == "__main__":
    _supervise(Path(sys.argv[1]), int(sys.argv[2]), [int(port) for port in sys.argv[3:]])
