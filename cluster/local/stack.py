"""The local stack: S3, MLflow and Ray on loopback, kept by one background process.

`servers.py` starts it as a command and talks to it through its folder:

    lock            held while the stack lives; contains its process id
    stack.json      the addresses, while everything answers
    environment     the variables that clients need; only its owner can read it
    ray-token       the token that Ray asks every client for; only its owner can read it
    s3/ mlflow.db   the data, which stays
    logs/           of all services
"""

import fcntl
import json
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
from contextlib import ExitStack, suppress
from dataclasses import asdict, astuple, dataclass
from http.client import HTTPResponse
from pathlib import Path

from cluster.local import s3_server
from cluster.local.s3_server import HOST, S3Server, write_private
from data_shards.command_line import run_command
from data_shards.errors import ReidError

BUCKET = "reid"
TOKEN = "ray-token"
MARK = "REID_STACK"  # environment variable of the processes of a stack, by which `down` finds them
START_SECONDS = 240.0
STOP_SECONDS = 10.0  # for a service to end; the head of a Ray that trained does not by itself


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
    """Run the stack until SIGTERM, or until one of its services ends."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    for name in ("environment", "stack.json"):
        (folder / name).unlink(missing_ok=True)
    free = s3_server.free_ports(4)
    ports = Ports(*(port or other for port, other in zip(astuple(ports), free, strict=True)))
    with ExitStack() as stack:
        s3 = stack.enter_context(S3Server(folder / "s3", ports.s3))
        s3.create_bucket(BUCKET)
        mlflow, dashboard = (f"http://{HOST}:{port}" for port in (ports.mlflow, ports.dashboard))
        addresses = Addresses(s3.endpoint, mlflow, f"{HOST}:{ports.ray}", dashboard)
        environment = s3.environment() | _environment(folder, addresses)
        os.environ |= environment
        # A job's `python` is this one.
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        services = {
            "mlflow": _start("mlflow", _mlflow(folder, ports), folder),
            "ray": _start("ray", _ray(folder, ports, stack), folder),
        }
        for service in services.values():
            stack.callback(s3_server.stop_process, service, STOP_SECONDS)
        _wait_until_healthy(addresses, services, folder)
        exports = [f"export {name}={shlex.quote(value)}\n" for name, value in environment.items()]
        files = {"environment": "".join(exports), "stack.json": json.dumps(asdict(addresses))}
        for name, text in files.items():
            write_private(folder / name, text)
            stack.callback((folder / name).unlink, missing_ok=True)
        while s3.running and all(service.poll() is None for service in services.values()):
            time.sleep(0.3)
        ended = [name for name, service in services.items() if service.poll() is not None] or ["s3"]
        raise ReidError(f"{ended[0]} ended, so the whole stack stops; see {folder / 'logs'}")


def healthy(addresses: Addresses) -> dict[str, bool]:
    """Whether MLflow and Ray answer."""
    return {
        "mlflow": _answers(f"{addresses.mlflow}/health"),
        "ray": _answers(f"{addresses.dashboard}/api/gcs_healthz"),
    }


def _environment(folder: Path, addresses: Addresses) -> dict[str, str]:
    """What clients of MLflow and Ray need, beside the S3 server's variables."""
    token = folder / TOKEN
    if not token.exists():
        write_private(token, secrets.token_hex(32))
    return {
        "MLFLOW_TRACKING_URI": addresses.mlflow,
        "RAY_ADDRESS": addresses.ray,
        "RAY_API_SERVER_ADDRESS": addresses.dashboard,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        # Ray's default is 15: beside anything else on this machine its workers would hardly run.
        "RAY_worker_niceness": "0",
        # Without it Ray replaces a loopback address by the machine's own and listens there.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def _mlflow(folder: Path, ports: Ports) -> list[str]:
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # eight processes that nobody needs
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST]
    command += ["--port", str(ports.mlflow), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    return [*command, "--artifacts-destination", f"s3://{BUCKET}/mlflow"]


def _ray(folder: Path, ports: Ports, stack: ExitStack) -> list[str]:
    # Ray's sockets are in its folder, and the path of a socket has at most about 100 characters.
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
        "ray-client-server-port": s3_server.free_ports(1)[0],
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


def _wait_until_healthy(
    addresses: Addresses, services: dict[str, subprocess.Popen[bytes]], folder: Path
) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not all((answers := healthy(addresses)).values()):
        for name, service in services.items():
            late = not answers[name] and time.monotonic() > deadline
            if late or service.poll() is not None:
                log = folder / "logs" / f"{name}.log"
                last = s3_server.last_lines([log])
                raise ReidError(f"{name} did not start; {log} ends with: {last}")
        time.sleep(0.3)


def open_directly(request: str | urllib.request.Request, seconds: float) -> HTTPResponse:
    """Ask a server without the environment's proxies, which neither reach it nor see a token."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(request, timeout=seconds)


def _answers(url: str) -> bool:
    try:
        with open_directly(url, 5) as answer:
            return answer.status == 200
    except OSError:
        return False


def _main(folder: Path, ports: Ports) -> int:
    with open(folder / "lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0  # another `up` was first
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        return run_command(lambda: serve(folder, ports))


if __name__ == "__main__":
    raise SystemExit(_main(Path(sys.argv[1]), Ports(*map(int, sys.argv[2:]))))
