"""`python -m cluster submit`: run a command as a job on a Ray cluster, and follow its log.

The job gets the working directory, without data, caches and .git, and the addresses of S3 and
MLflow. It gets no keys or passwords: everyone who reaches the cluster can read a job's metadata.
Nodes have their own, from an instance profile, a service account, or the environment of Ray.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cluster.local import servers as local
from data_shards.errors import ConfigError, ReidError
from data_shards.progress import make_console
from reid_train.tracking.provenance import code_commit
from reid_train.tracking.uris import redact

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient
    from rich.console import Console

SETTINGS = (  # variables that a job gets: addresses, never keys
    "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_S3_ENDPOINT_URL",
    "MLFLOW_TRACKING_URI",
)  # fmt: skip
EXCLUDES = (  # not sent with the working directory, as everything that its .gitignore names
    ".git", ".venv", "venv", "__pycache__", ".demo", ".cluster", ".pytest_cache", ".ruff_cache",
    ".hypothesis", "*.egg-info", "mlruns", "mlflow.db", "*.tar", "*.zip", "*.safetensors", "*.pth",
    "*.parquet",
)  # fmt: skip
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
STOP_WAIT_SECONDS = 600  # between SIGTERM and SIGKILL; Ray's 3 s are too few for a checkpoint
ANSWER_SECONDS = 20.0  # how long a job server may take for its first answer
PAUSE_SECONDS = 1.0  # between the end of a connection and the next one
# Ray's first line in a job's log, which says nothing about the job.
SETTING_UP = re.compile(r"^.* -- Runtime env is setting up\.\n", re.MULTILINE)
GIVE_UP_SECONDS = 600.0  # a job server silent for so long is no longer asked; the job continues


@dataclass(frozen=True)
class Submit:
    """Run a command as a job on a Ray cluster, follow its log, and end with its exit code.

    python -m cluster submit -- python -m reid_train train --recipe msmt17_resnet50 …
    """

    address: str | None = None
    """Job server, such as http://HOST:8265; None: RAY_API_SERVER_ADDRESS, or the local stack."""
    working_dir: Path = Path()
    """Folder that is sent and that the job runs in, without data, caches and .git."""
    install: bool = False
    """Install the dependencies of constraints.txt on the nodes; cluster/Dockerfile has them."""
    detach: bool = False
    """Return as soon as the job is accepted."""


def submit(command: Sequence[str], options: Submit) -> int:
    """Run a command as a job; follow its log; return its exit code."""
    if not command:
        raise ConfigError(
            "no command after --: python -m cluster submit -- python -m reid_train train …"
        )
    console = make_console(stderr=True)
    address = _address(options.address)
    client = _connect(address)
    runtime_env: dict[str, Any] = {"working_dir": str(options.working_dir)}
    runtime_env |= {"excludes": list(EXCLUDES), "env_vars": settings(os.environ)}
    if options.install:
        runtime_env["pip"] = requirements(options.working_dir)
    try:
        job = client.submit_job(entrypoint=shlex.join(command), runtime_env=runtime_env)
    except (RuntimeError, ValueError, OSError) as error:
        raise ReidError(
            f"{address} refused the job: {_line(error)}. If the package is too large, name what is "
            "not needed in .gitignore"
        ) from None
    at = f"--address {shlex.quote(address)}"
    how = f"ray job logs {job} --follow {at}"
    pasted = how.replace(f" {at}", f" \\\n    {at}")  # a terminal would break it
    console.print(f"job {job} on {address}")
    if options.detach:
        console.print(f"follow it: {pasted}")
        console.print(f"stop it:   ray job stop {job} \\\n    {at}")
        return 0
    here = local.running(local.FOLDER.absolute())
    log = _Log(job, how, here=here is not None and here.dashboard == address)
    try:
        details = asyncio.run(_follow(client, log))
    except KeyboardInterrupt:
        if not _asked_to_stop(console):
            console.print(f"the job continues; follow it:\n{pasted}")
            return 130
        try:
            client.stop_job(job)
        except (RuntimeError, OSError) as error:
            raise ReidError(
                f"the job was not stopped ({_line(error)}). Try again: ray job stop {job} {at}"
            ) from None
        console.print("stopping the job; a training first writes a checkpoint: up to minutes")
        details = asyncio.run(_follow(client, log))
    if details.status == "SUCCEEDED":
        console.print("the job succeeded")
        return 0
    if details.status == "STOPPED":
        console.print("the job was stopped")
        return 130
    code = details.driver_exit_code
    # Ray's message is the end of the log once more, which has been shown.
    why = f"exit code {code}" if code and log.shown else _line(details.message or "", 400)
    console.print(f"the job failed: {why}")
    return code or 1


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a job gets; none is secret: the tracking URI loses user and password."""
    chosen = {name: environment[name] for name in SETTINGS if environment.get(name)}
    # A file on this machine is of no use to the job.
    if urlsplit(chosen.get("MLFLOW_TRACKING_URI", "")).scheme not in ("http", "https"):
        chosen.pop("MLFLOW_TRACKING_URI", None)
    chosen[STOP_WAIT] = environment.get(STOP_WAIT) or str(STOP_WAIT_SECONDS)
    if commit := code_commit():
        chosen["REID_COMMIT"] = commit
    return {name: redact(value) for name, value in chosen.items()}


def requirements(working_dir: Path) -> list[str]:
    """Lines of a requirements file: the project's dependencies, pinned by its constraints."""
    try:
        project = tomllib.loads((working_dir / "pyproject.toml").read_text())["project"]
        (working_dir / "constraints.txt").stat()
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        where = working_dir.absolute()
        raise ConfigError(
            f"--install needs pyproject.toml and constraints.txt in {where}: {error}"
        ) from None
    return ["-c ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt", *project["dependencies"]]


def _address(given: str | None) -> str:
    """The job server's address; for the local stack, this process takes its variables too."""
    found = given or os.environ.get("RAY_API_SERVER_ADDRESS")
    folder = local.FOLDER.absolute()
    stack = local.running(folder)
    if stack is not None and found in (None, stack.dashboard):
        os.environ |= local.environment(folder)
        return stack.dashboard
    if found is None:
        raise ConfigError(
            "no cluster: give --address http://HOST:8265, set RAY_API_SERVER_ADDRESS, or start one "
            "here with `python -m cluster local up`"
        )
    if urlsplit(found).scheme not in ("http", "https"):
        raise ConfigError(f"{found} is no address of a job server: give http://HOST:8265")
    return found


def _connect(address: str) -> JobSubmissionClient:
    from data_shards.storage.retry import bypass_proxy

    bypass_proxy(address)  # which would see the local stack's token
    try:  # Ray's client would wait without a limit
        urllib.request.urlopen(f"{address}/api/version", timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # a server answers; what it refuses, Ray explains
    except (OSError, ValueError) as error:
        raise ReidError(
            f"no Ray job server answers at {address} ({_line(error)}): start the cluster, or give "
            "its --address"
        ) from None
    # For Ray's client this variable, and RAY_ADDRESS, come before the address that it is given.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    # Ray reads the local stack's variables when it is imported.
    from ray.job_submission import JobSubmissionClient

    # Ray lists every ignored file and every connection.
    dashboard = "ray.dashboard.modules"
    talkative = ("ray", "ray.dashboard", f"{dashboard}.dashboard_sdk", f"{dashboard}.job.sdk")
    for name in (*talkative, "ray._private.runtime_env.packaging"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return JobSubmissionClient(address)
    except Exception as error:  # of requests, of Ray's authentication, or RuntimeError
        raise ReidError(f"{address} is no Ray job server for you: {_line(error)}") from None


def _asked_to_stop(console: Console) -> bool:
    """Ask what becomes of the job: without a terminal, or after Ctrl-C once more, it continues."""
    with suppress(EOFError, KeyboardInterrupt):
        while sys.stdin.isatty():
            answer = console.input("\nstop the job (s), or leave it running (l)? [l] ").strip()
            if "leave".startswith(answer.lower()):
                return False
            if "stop".startswith(answer.lower()):
                return True
    return False


def _line(error: object, most: int = 300) -> str:
    return " ".join(str(error).split())[:most]


@dataclass
class _Log:
    """The log of a job, and how much of it has been shown."""

    job: str
    how: str  # the command that follows it
    here: bool = False  # whether it runs on the local stack
    shown: int = 0  # characters


async def _follow(client: JobSubmissionClient, log: _Log) -> JobDetails:
    """Print a job's log until the job ends; connect again when needed."""
    from aiohttp import ClientError  # Ray's client does not catch it

    job, silent_since, complaint = log.job, None, ""
    while True:
        seen = 0
        try:
            async for text in client.tail_job_logs(job):
                fresh = text[max(log.shown - seen, 0) :]
                seen += len(text)
                print(SETTING_UP.sub("", fresh), end="", flush=True)
                log.shown, complaint = max(log.shown, seen), ""
        except (ClientError, RuntimeError, OSError) as error:
            if log.here and local.running(local.FOLDER.absolute()) is None:
                raise ReidError(f"the local stack was stopped, and job {job} with it") from None
            if str(error) != complaint:  # once, if it stays the same
                complaint = str(error)
                minutes = f"for up to {GIVE_UP_SECONDS / 60:.0f} minutes"
                text = f"the connection to the log ended ({complaint}); retrying {minutes}"
                print(text, file=sys.stderr)
        try:
            details = client.get_job_info(job)
            if details.status.is_terminal():
                return details
            silent_since = None
        except (RuntimeError, OSError) as error:  # errors of requests are OSErrors
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > GIVE_UP_SECONDS:
                raise ReidError(
                    f"the job server was silent about {job} for {GIVE_UP_SECONDS / 60:.0f} minutes "
                    f"({_line(error)}). The job continues if its cluster does; follow it: {log.how}"
                ) from None
        await asyncio.sleep(PAUSE_SECONDS)
