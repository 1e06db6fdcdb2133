"""OpenStack Swift's four servers and the process that supervises them; see `s3_server.py`.

`S3Server` runs it as a command. It writes rings of one replica, starts Swift's account, container,
object and proxy servers, and stops them when its parent ends. It polls for that, because Linux's
parent-death signal is already sent when the starting *thread* ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

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
# No cache filter: it would use any memcached that runs on this machine.
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
# Delete the segments of a large object with it: no expirer runs that would do it later.
allow_async_delete = false
"""


def write_settings(
    folder: Path, ports: list[int], credentials: dict[str, str], host: str = HOST
) -> None:
    """Write the servers' settings, readable by their owner only.

    Args:
        folder: the server's.
        ports: in the order of `SERVERS`.
        credentials: `access_key` as account:user, `secret_key`, `hash_suffix`.
        host: where the proxy, the one server that clients talk to, listens.
    """
    conf = folder / "conf"
    suffix = credentials["hash_suffix"]
    write_private(conf / "swift.conf", f"[swift-hash]\nswift_hash_path_suffix = {suffix}\n")
    user = credentials["access_key"].replace(":", "_")
    for name, port in zip(SERVERS, ports, strict=True):
        text = COMMON_CONF + (PROXY_CONF if name == "proxy" else STORAGE_CONF)
        values = {"host": HOST, "port": port, "conf": conf, "data": folder / "data", "name": name}
        values["bind"] = host if name == "proxy" else HOST
        secret = credentials["secret_key"]
        text = text.format(**values, region=REGION, user=user, secret_key=secret)
        write_private(conf / f"{name}.conf", text)


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, atomically."""
    temporary = path.with_suffix(".partial")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    os.replace(temporary, path)


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
            stop_process(server, seconds=5)


if __name__ == "__main__":
    _supervise(Path(sys.argv[1]), int(sys.argv[2]), [int(port) for port in sys.argv[3:]])
