"""`python -m cluster local`: an S3 server, MLflow and a Ray head on this machine, on loopback."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import psutil
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.local.stack import (
    ANY_PORTS,
    MARK,
    START_SECONDS,
    STOP_SECONDS,
    Addresses,
    Ports,
    healthy,
)
from data_shards.errors import ConfigError, ReidError
from data_shards.progress import display, make_console, phase, print_table

FOLDER = Path(".cluster")


def up(
    folder: Path = FOLDER, ports: Annotated[Ports, tyro.conf.arg(name="port")] = ANY_PORTS
) -> None:
    """Start S3, MLflow and Ray, or find them running, and say how to use them.

    Args:
        folder: Where objects, MLflow's database and logs are kept; they stay after `down`.
        ports: Where to listen; free ports by default.
    """
    folder = folder.resolve()
    console = make_console()
    addresses = start(folder, ports, console)
    _print(folder, addresses, console)
    console.print("\nTo use them in this shell, and to stop them:\n")
    console.print(f"  source {shlex.quote(str(folder / 'environment'))}")
    console.print(f"  python -m cluster local down --folder {folder}")


def status(folder: Path = FOLDER) -> None:
    """Say what runs and whether it answers; exit code 1 if something does not.

    Args:
        folder: The stack's.
    """
    folder = folder.resolve()
    addresses = running(folder)
    if addresses is None:
        raise ReidError(f"no stack runs on {folder}: python -m cluster local up --folder {folder}")
    if silent := _print(folder, addresses, make_console()):
        raise ReidError(f"{', '.join(silent)} of {folder} does not answer: look into {folder}/logs")


def down(folder: Path = FOLDER) -> None:
    """Stop everything that `up` started; the data stays.

    Args:
        folder: The stack's.
    """
    folder = folder.resolve()
    count = stop(folder)
    print(f"stopped; the data stays in {folder}" if count else f"nothing ran on {folder}")


COMMANDS: dict[str, Callable[..., None]] = {"up": up, "status": status, "down": down}


def start(folder: Path, ports: Ports = ANY_PORTS, console: Console | None = None) -> Addresses:
    """Have a stack running on a folder, and return its addresses when all of it answers.

    Raises:
        ConfigError: one runs on other ports than those asked for.
        ReidError: it does not start.
    """
    console = console or make_console()
    if (found := running(folder)) is not None:
        _require(found, ports, folder)
        return found
    stop(folder)  # what a stack that was killed may have left
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")  # so that no package of a job takes the keys along
    command = [sys.executable, "-m", "cluster.local.stack", folder]
    with open(folder / "logs" / "stack.log", "wb") as log:
        process = subprocess.Popen(
            [*command, *(str(port) for port in asdict(ports).values())],
            cwd=Path(__file__).parents[2],
            env=os.environ | {MARK: str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        with display(console) as progress, phase(progress, "starting S3, MLflow and Ray"):
            return _wait(folder, process)
    except BaseException:
        stop(folder)
        raise


def _wait(folder: Path, process: subprocess.Popen[bytes]) -> Addresses:
    deadline = time.monotonic() + START_SECONDS
    while (addresses := running(folder)) is None:
        ended = process.poll()
        if (ended is not None and not _locked(folder)) or time.monotonic() > deadline:
            log = folder / "logs" / "stack.log"
            lines = log.read_text(errors="replace").strip().splitlines()[-1:]
            said = lines[0].removeprefix("error: ") if lines else "no word why"
            raise ReidError(f"the stack on {folder} did not start: {said} (more in {log.parent})")
        time.sleep(0.2)
    return addresses


def stop(folder: Path) -> int:
    """Stop a folder's stack and wait until none of its processes is left; returns their number."""
    left = _processes(folder)
    count = len(left)
    if _locked(folder):
        with contextlib.suppress(ValueError, psutil.NoSuchProcess):
            psutil.Process(int((folder / "lock").read_text())).terminate()
        deadline = time.monotonic() + 3 * STOP_SECONDS
        while _locked(folder) and time.monotonic() < deadline:
            time.sleep(0.1)
    while left := _processes(folder):  # also what a stack that was killed left behind
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=STOP_SECONDS)
    for name in ("environment", "stack.json"):
        (folder / name).unlink(missing_ok=True)
    return count


def running(folder: Path) -> Addresses | None:
    """Addresses of the stack on a folder; None if none is up."""
    try:
        return (
            Addresses(**json.loads((folder / "stack.json").read_text()))
            if _locked(folder)
            else None
        )
    except (OSError, ValueError, TypeError):
        return None


def environment(folder: Path) -> dict[str, str]:
    """The variables by which clients find a running stack."""
    text = (folder / "environment").read_text()
    pairs = (shlex.split(line)[1].partition("=") for line in text.splitlines())
    return {name: value for name, _, value in pairs}


def _require(found: Addresses, asked: Ports, folder: Path) -> None:
    for name, port in asdict(asked).items():
        if port and not getattr(found, name).endswith(f":{port}"):
            raise ConfigError(
                f"the stack on {folder} runs with {name} at {getattr(found, name)}: "
                f"`python -m cluster local down --folder {folder}` first"
            )


def _locked(folder: Path) -> bool:
    try:
        with open(folder / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _processes(folder: Path) -> list[psutil.Process]:
    """Every process that carries the folder's mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == str(folder) and process.pid != os.getpid():
                found.append(process)
    return found


def _print(folder: Path, addresses: Addresses, console: Console) -> list[str]:
    """Print a table of the services; those that do not answer are returned."""
    answers = {"s3": _s3_answers(folder), **healthy(addresses)}
    logs = {"s3": "../s3/logs", "mlflow": "mlflow.log", "ray": "ray/"}
    table = Table("service", "address", "state", "logs", box=box.SIMPLE_HEAD)
    for name, answer in answers.items():
        state = Text("healthy", "green") if answer else Text("no answer", "red")
        log = os.path.normpath(folder / "logs" / logs[name])
        table.add_row(name, getattr(addresses, name), state, log)
        if name == "ray":
            table.add_row("dashboard", addresses.dashboard, state, "")
    print_table(console, table)
    return [name for name, answer in answers.items() if not answer]


def _s3_answers(folder: Path) -> bool:
    """Whether a signed request is answered."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        known = environment(folder)
        client = boto3.client(
            "s3",
            endpoint_url=known["AWS_ENDPOINT_URL"],
            aws_access_key_id=known["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=known["AWS_SECRET_ACCESS_KEY"],
            region_name=known["AWS_DEFAULT_REGION"],
            config=Config(
                proxies={}, connect_timeout=5, read_timeout=10, retries={"max_attempts": 0}
            ),
        )
        client.list_buckets()
    except (OSError, KeyError, BotoCoreError, ClientError):
        return False
    return True
