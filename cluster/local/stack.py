"""The local stack: S3, MLflow and Ray on loopback, kept by one background process.

`local.py` starts it as a command and talks to it through its folder:

    lock            held while the stack lives; contains its process id
    stack.json      the addresses, from when everything answers until it goes
    environment     what to export to use it; only its owner can read it
    s3/ mlflow.db   the data, which stays
    logs/           of all services

Ray listens on loopback alone, and asks every client for the token in `ray-token`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.local.s3_server import S3Server, free_ports
from cluster.local.swift import HOST, write_private
from data_shards.errors import ReidError

logger = logging.getLogger(__name__)

BUCKET = "reid"
MARK = "REID_STACK"
"""Environment variable of every process of a stack, so that none is forgotten when it goes."""
START_SECONDS = 240.0
STOP_SECONDS = 30.0


@dataclass(frozen=True)
class Ports:
    """Where the services listen; 0 takes a free port."""

    s3: int = 0
    """Port of the S3 server."""
    mlflow: int = 0
    """Port of the MLflow server."""
    ray: int = 0
    """Port of the Ray head."""
    dashboard: int = 0
    """Port of Ray's dashboard and job server."""


ANY_PORTS = Ports()


@dataclass(frozen=True)
class Addresses:
    """Where the services answer."""

    s3: str
    mlflow: str
    ray: str
    dashboard: str


def serve(folder: Path, ports: Ports) -> None:
    """Run the stack until SIGTERM, or until one of its services ends.

    Raises:
        ReidError: a service did not start; the message names its log.
    """
    os.environ |= {
        # A job's `python` is this one.
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        # MLflow's server would keep eight processes for jobs that nobody gives it.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    for name in ("environment", "stack.json"):
        (folder / name).unlink(missing_ok=True)
    asked = asdict(ports).values()
    ports = Ports(*(a or free for a, free in zip(asked, free_ports(len(asked)), strict=True)))
    with ExitStack() as stack:
        s3 = stack.enter_context(S3Server(folder / "s3", ports.s3))
        s3.create_bucket(BUCKET)
        addresses = Addresses(
            s3.endpoint,
            f"http://{HOST}:{ports.mlflow}",
            f"{HOST}:{ports.ray}",
            f"http://{HOST}:{ports.dashboard}",
        )
        environment = s3.environment() | _environment(folder, addresses)
        os.environ |= environment
        services = {
            "mlflow": _start("mlflow", _mlflow(folder, ports), folder),
            "ray": _start("ray", _ray(folder, ports, stack), folder),
        }
        for service in services.values():
            stack.callback(_stop, service)
        _wait_until_healthy(addresses, services, folder)
        exports = [f"export {name}={shlex.quote(value)}\n" for name, value in environment.items()]
        write_private(folder / "environment", "".join(exports))
        stack.callback((folder / "environment").unlink, missing_ok=True)
        write_private(folder / "stack.json", json.dumps(asdict(addresses)))
        stack.callback((folder / "stack.json").unlink, missing_ok=True)
        while s3.running and all(service.poll() is None for service in services.values()):
            time.sleep(0.3)
        ended = [name for name, service in services.items() if service.poll() is not None]
        raise ReidError(f"{ended[0] if ended else 's3'} ended by itself, so all of the stack does")


def healthy(addresses: Addresses) -> dict[str, bool]:
    """Which of MLflow and Ray answer now."""
    return {
        "mlflow": _answers(f"{addresses.mlflow}/health"),
        "ray": _answers(f"{addresses.dashboard}/api/gcs_healthz"),
    }


def _environment(folder: Path, addresses: Addresses) -> dict[str, str]:
    """What clients of MLflow and Ray need, beside the S3 server's own variables."""
    token = folder / "ray-token"
    if not token.exists():
        write_private(token, secrets.token_hex(32))
    return {
        "MLFLOW_TRACKING_URI": addresses.mlflow,
        "RAY_ADDRESS": addresses.ray,
        "RAY_API_SERVER_ADDRESS": addresses.dashboard,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        # Ray takes a loopback address for the machine's own, and would listen to the network. It
        # has this switch for systems with firewalls that ask; it does the same here.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def _mlflow(folder: Path, ports: Ports) -> list[str]:
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST]
    command += ["--port", str(ports.mlflow), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    return [*command, "--artifacts-destination", f"s3://{BUCKET}/mlflow"]


def _ray(folder: Path, ports: Ports, stack: ExitStack) -> list[str]:
    # Ray's sockets lie in its folder, and a socket's path has room for about a hundred letters.
    session = Path(tempfile.mkdtemp(prefix="reid-ray-"))
    logs = folder / "logs" / "ray"
    if logs.is_symlink():
        logs.unlink()
    shutil.rmtree(logs, ignore_errors=True)
    logs.symlink_to(session / "session_latest" / "logs")

    def keep_logs() -> None:
        logs.unlink()
        with suppress(OSError):
            shutil.copytree(session / "session_latest" / "logs", logs)
        shutil.rmtree(session, ignore_errors=True)

    stack.callback(keep_logs)
    options = {
        "node-ip-address": HOST,
        "port": ports.ray,
        "dashboard-host": HOST,
        "dashboard-port": ports.dashboard,
        "include-dashboard": "true",
        "ray-client-server-port": free_ports(1)[0],
        "dashboard-agent-listen-port": 0,
        "min-worker-port": 0,
        "max-worker-port": 0,
        "temp-dir": session,
    }
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
    return [*command, "--disable-usage-stats", *(f"--{name}={v}" for name, v in options.items())]


def _start(name: str, command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    with open(folder / "logs" / f"{name}.log", "wb") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _stop(service: subprocess.Popen[bytes]) -> None:
    service.terminate()
    try:
        service.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        service.kill()
        service.wait()


def _wait_until_healthy(
    addresses: Addresses, services: dict[str, subprocess.Popen[bytes]], folder: Path
) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not all((answers := healthy(addresses)).values()):
        for name, service in services.items():
            late = not answers[name] and time.monotonic() > deadline
            if late or service.poll() is not None:
                log = folder / "logs" / f"{name}.log"
                end = " | ".join(log.read_text(errors="replace").splitlines()[-3:])
                raise ReidError(f"{name} did not start; {log} ends with: {end}")
        time.sleep(0.3)


def _answers(url: str) -> bool:
    # Never through a proxy of the environment: these are on this machine.
    opener: Callable = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    try:
        with opener(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def _main() -> int:
    folder, ports = Path(sys.argv[1]), Ports(*(int(port) for port in sys.argv[2:]))
    with open(folder / "lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0  # another `up` was first
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            serve(folder, ports)
        except ReidError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(_main())
