"""`python -m cluster local`: an S3 server, MLflow and a Ray head on this machine, on loopback."""

import contextlib
import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Annotated

import psutil
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.local import stack
from cluster.local.s3_server import last_lines, s3_client
from cluster.local.stack import ANY_PORTS, MARK, Addresses, Ports
from data_shards.errors import ConfigError, ReidError
from data_shards.progress import display, make_console, phase, print_table

FOLDER = Path(".cluster")


def up(
    folder: Path = FOLDER, ports: Annotated[Ports, tyro.conf.arg(name="port")] = ANY_PORTS
) -> None:
    """Start S3, MLflow and Ray unless they run; print how to use them.

    Args:
        folder: Where objects, MLflow's database and logs are kept; they stay after `down`.
        ports: Where to listen; free ports by default.
    """
    folder = folder.resolve()
    _show(folder, start(folder, ports))
    print(f"Ray's dashboard asks for a token: it is in {from_here(folder) / stack.TOKEN}")
    print("To use the servers in this shell, and to stop them:\n")
    source = shlex.quote(str(from_here(folder) / "environment"))
    print(f"  source {source}\n  {_command('down', folder)}")


def status(folder: Path = FOLDER) -> None:
    """Print whether each server answers; exit code 1 if one does not.

    Args:
        folder: The stack's.
    """
    folder = folder.resolve()
    addresses = running(folder)
    if addresses is None:
        raise ReidError(f"no stack runs on {folder}: start it with {_command('up', folder)}")
    if silent := _show(folder, addresses):
        raise ReidError(f"{', '.join(silent)} of {folder} does not answer: see {folder}/logs")


def down(folder: Path = FOLDER) -> None:
    """Stop everything that `up` started; the data stays.

    Args:
        folder: The stack's.
    """
    folder = folder.resolve()
    here = from_here(folder)
    for command in _running_jobs(folder):
        print(f"this job ends, too: {command}")
    with display() as progress, phase(progress, "stopping the servers"):
        stopped = stop(folder)
    print(f"stopped; the data is in {here}" if stopped else f"nothing runs on {here}")


def start(folder: Path, ports: Ports = ANY_PORTS, console: Console | None = None) -> Addresses:
    """Have a stack running on a folder, and return its addresses when all of it answers."""
    console = console or make_console()
    if (found := running(folder)) is not None:
        for name, port in asdict(ports).items():
            if port and not getattr(found, name).endswith(f":{port}"):
                raise ConfigError(
                    f"{name} of the stack on {folder} runs at {getattr(found, name)}, not on port "
                    f"{port}: stop it first with {_command('down', folder)}"
                )
        return found
    if not _locked(folder):
        stop(folder)  # what a killed stack may have left
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")  # keeps the keys out of the packages of jobs
    with open(folder / "logs" / "stack.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.local.stack", folder, *map(str, astuple(ports))],
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
        if process.poll() is None or not _locked(folder):  # else another `up` was first
            stop(folder)
        raise


@contextlib.contextmanager
def used(folder: Path, console: Console) -> Iterator[Addresses]:
    """Use the stack on a folder: started if none runs, and then stopped at the end.

    The environment gets the variables by which clients find it.
    """
    was_running = running(folder) is not None
    addresses = start(folder, console=console)
    os.environ |= environment(folder)
    try:
        yield addresses
    finally:
        if not was_running:
            with display(console) as progress, phase(progress, "stopping the servers"):
                stop(folder)


def _wait(folder: Path, process: subprocess.Popen[bytes]) -> Addresses:
    deadline = time.monotonic() + stack.START_SECONDS
    while (addresses := running(folder)) is None:
        ended = process.poll()
        if (ended is not None and not _locked(folder)) or time.monotonic() > deadline:
            log = folder / "logs" / "stack.log"
            why = last_lines([log], 1).removeprefix("error: ")
            raise ReidError(f"the stack on {folder} did not start: {why} (see {log.parent})")
        time.sleep(0.2)
    return addresses


def stop(folder: Path) -> int:
    """Stop a folder's stack; return how many processes it had when none of them is left."""
    left = _processes(folder)
    count = len(left)
    if _locked(folder):
        with contextlib.suppress(ValueError, psutil.NoSuchProcess):
            psutil.Process(int((folder / "lock").read_text())).terminate()
        deadline = time.monotonic() + 3 * stack.STOP_SECONDS
        while _locked(folder) and time.monotonic() < deadline:
            time.sleep(0.1)
    # Ray's agents outlive it by seconds, and a killed stack leaves everything.
    while left := {process for process in left | _processes(folder) if _alive(process)}:
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=1)
    for name in ("environment", "stack.json"):
        (folder / name).unlink(missing_ok=True)
    return count


def _running_jobs(folder: Path) -> list[str]:
    """The commands that use the stack's Ray: submitted jobs, and programs that joined it."""
    if (addresses := running(folder)) is None:
        return []
    try:
        headers = {"Authorization": f"Bearer {(folder / stack.TOKEN).read_text().strip()}"}
        request = urllib.request.Request(f"{addresses.dashboard}/api/jobs/", headers=headers)
        with stack.open_directly(request, 10) as answer:
            jobs = json.load(answer)
    except (OSError, ValueError):  # a stack that does not answer is stopped as well
        return []
    return [job["entrypoint"] for job in jobs if job["status"] in ("PENDING", "RUNNING")]


def running(folder: Path) -> Addresses | None:
    """Addresses of the stack on a folder; None if none is up."""
    try:
        addresses = Addresses(**json.loads((folder / "stack.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return addresses if _locked(folder) else None


def environment(folder: Path) -> dict[str, str]:
    """The variables by which clients find a running stack."""
    lines = (folder / "environment").read_text().splitlines()
    return dict(shlex.split(line)[1].split("=", 1) for line in lines)


def _command(name: str, folder: Path) -> str:
    here = from_here(folder)
    option = "" if here == FOLDER else f" --folder {shlex.quote(str(here))}"
    return f"python -m cluster local {name}{option}"


def from_here(folder: Path) -> Path:
    """A path as short as it can be written in this folder, so that a terminal does not break it."""
    with contextlib.suppress(ValueError):
        return folder.relative_to(Path.cwd())
    return folder


def _locked(folder: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), open(folder / "lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _processes(folder: Path) -> set[psutil.Process]:
    """The processes with the folder's mark, and theirs: Ray's agents overwrite the mark."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == str(folder) and process.pid != os.getpid():
                found |= {process, *process.children(recursive=True)}
    return found


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _show(folder: Path, addresses: Addresses) -> list[str]:
    """Print a table of the services; return those that do not answer."""
    answers = {"s3": _s3_answers(folder), **stack.healthy(addresses)}
    logs = {"s3": "s3/logs", "mlflow": "logs/mlflow.log", "ray": "logs/ray/"}
    table = Table("service", "address", "state", "logs", box=box.SIMPLE_HEAD)
    for name, answer in answers.items():
        state = Text("healthy", "green") if answer else Text("no answer", "red")
        table.add_row(name, getattr(addresses, name), state, logs[name])
        if name == "ray":
            table.add_row("dashboard", addresses.dashboard, state, "")
    console = make_console()
    print_table(console, table)
    console.print(f"data and logs in {from_here(folder)}")
    return [name for name, answer in answers.items() if not answer]


def _s3_answers(folder: Path) -> bool:
    """Whether a signed request is answered."""
    from botocore.exceptions import BotoCoreError, ClientError

    limits = {"connect_timeout": 5, "read_timeout": 10, "retries": {"max_attempts": 0}}
    try:
        s3_client(environment(folder), **limits).list_buckets()
    except (OSError, KeyError, BotoCoreError, ClientError):
        return False
    return True
