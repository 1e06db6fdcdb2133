"""`python -m cluster submit`: run a command as a job on a Ray cluster, and stay with it.

What travels: the working directory without data, caches and .git, and where S3 and MLflow are. Keys
and passwords stay here. A cluster's nodes have their own, by instance profile, service account, or
the environment that Ray was started in; a job's metadata can be read by all who reach the cluster.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rich.console import Console

from cluster.local import servers as local
from data_shards.errors import ConfigError, ReidError
from reid_train.tracking.provenance import code_commit
from reid_train.tracking.uris import redact

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

SETTINGS = (
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_S3_ENDPOINT_URL",
    "MLFLOW_TRACKING_URI",
)
"""Variables that a job is given: where things are, never how to sign in."""
EXCLUDES = (
    ".git", ".venv", "venv", "__pycache__", ".demo", ".cluster", ".pytest_cache", ".ruff_cache",
    ".hypothesis", "*.egg-info", "mlruns", "mlflow.db", "*.tar", "*.zip", "*.safetensors", "*.pth",
    "*.parquet",
)  # fmt: skip
"""Left out of the working directory, beside what its .gitignore names."""
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
STOP_WAIT_SECONDS = 600
"""Between SIGTERM to a job that is stopped and SIGKILL. Ray's 3 s are too few for a checkpoint."""
CONSTRAINTS = "constraints.txt"
PAUSE_SECONDS = 1.0
"""Between a connection's end and the next."""
GIVE_UP_SECONDS = 600.0
"""How long a server may not say how a job is before following it ends. The job goes on."""


def submit(
    command: Sequence[str],
    *,
    address: str | None = None,
    working_dir: Path = Path(),
    install: bool = False,
    detach: bool = False,
) -> int:
    """Run a command as a job; follow its log; return its exit code.

    Args:
        command: the job's words, such as `python -m reid_train train …`.
        address: of the job server; by default as the environment says, or the local stack's.
        working_dir: what the job runs in; packaged and sent.
        install: install the dependencies on the nodes, at the versions of constraints.txt.
        detach: return when the job is accepted.

    Raises:
        ConfigError: no command, no cluster, or nothing fit to send.
        ReidError: the cluster cannot be reached, or not any more.
    """
    if not command:
        raise ConfigError("no command: python -m cluster submit -- python -m reid_train train …")
    console = Console(stderr=True)
    address = _address(address)
    client = _connect(address)
    runtime_env = {
        "working_dir": str(working_dir),
        "excludes": list(EXCLUDES),
        "env_vars": settings(os.environ),
    }
    if install:
        runtime_env["pip"] = requirements(working_dir)
    try:
        job = client.submit_job(entrypoint=shlex.join(command), runtime_env=runtime_env)
    except (RuntimeError, ValueError, OSError) as error:
        raise ReidError(
            f"{address} does not take the job: {' '.join(str(error).split())[:400]}. If the package"
            " is too large, name what is not needed in .gitignore"
        ) from None
    how = f"ray job logs {job} --follow --address {address}"
    console.print(f"job {job} on {address}", highlight=False)
    if detach:
        console.print(f"follow it: {how}\nstop it:   ray job stop {job} --address {address}")
        return 0
    try:
        details = asyncio.run(_follow(client, job, how))
    except KeyboardInterrupt:
        if not _asked_to_stop(console):
            console.print(f"the job goes on; follow it: {how}", soft_wrap=True)
            return 130
        client.stop_job(job)
        console.print("stopping it; a training writes a checkpoint first, which may take minutes")
        details = asyncio.run(_follow(client, job, how, quiet=True))
    return _exit_code(details, console)


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a job is given: no secret is among them.

    A tracking URI's user and password are left out, and one that is a file here is, too.
    """
    chosen = {name: environment[name] for name in SETTINGS if environment.get(name)}
    if urlsplit(chosen.get("MLFLOW_TRACKING_URI", "")).scheme not in ("http", "https"):
        chosen.pop("MLFLOW_TRACKING_URI", None)
    chosen[STOP_WAIT] = environment.get(STOP_WAIT) or str(STOP_WAIT_SECONDS)
    commit = code_commit()
    return {name: redact(value) for name, value in chosen.items()} | (
        {"REID_COMMIT": commit} if commit else {}
    )


def requirements(working_dir: Path) -> list[str]:
    """Lines of a requirements file: the project's dependencies, pinned by its constraints.

    Raises:
        ConfigError: the working directory is no project with constraints.
    """
    try:
        project = tomllib.loads((working_dir / "pyproject.toml").read_text())["project"]
        (working_dir / CONSTRAINTS).stat()
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"--install needs pyproject.toml and {CONSTRAINTS} in {working_dir.absolute()}: {error}"
        ) from None
    return [f"-c ${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{CONSTRAINTS}", *project["dependencies"]]


def _address(given: str | None) -> str:
    """The job server's address; the local stack's variables are taken over if it is that."""
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
    return found


def _connect(address: str) -> JobSubmissionClient:
    # Only now: Ray reads the local stack's variables as it is imported.
    from ray.job_submission import JobSubmissionClient

    # Its own lines tell of every file and connection; ours say what matters.
    for name in ("ray", "ray.dashboard", "ray._private.runtime_env.packaging"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return JobSubmissionClient(address)
    except Exception as error:  # whatever requests, Ray's sign-in or a wrong address raise
        said = " ".join(str(error).split())[:300]
        raise ReidError(f"no Ray job server answers at {address}: {said}") from None


async def _follow(
    client: JobSubmissionClient, job: str, how: str, *, quiet: bool = False
) -> JobDetails:
    """Print a job's log until the job has ended, over as many connections as it takes.

    Args:
        client: of the job server.
        job: its id.
        how: the command that follows it, for messages.
        quiet: print nothing of the log.

    Returns:
        What the server says of the job that ended.

    Raises:
        ReidError: the server did not say for `GIVE_UP_SECONDS` how the job is.
    """
    from aiohttp import ClientError  # comes with Ray, whose client lets it through

    shown, silent_since, complaint = 0, None, ""
    while True:
        seen = 0
        try:
            async for text in client.tail_job_logs(job):
                fresh = text[max(shown - seen, 0) :]
                seen += len(text)
                if not quiet:
                    print(fresh, end="", flush=True)
                shown, complaint = max(shown, seen), ""
        except (ClientError, RuntimeError, OSError) as error:
            if str(error) != complaint:  # once, if it stays the same
                complaint = str(error)
                print(f"the log was cut off ({complaint}); asking again", file=sys.stderr)
        try:
            details = client.get_job_info(job)
            if details.status.is_terminal():
                return details
            silent_since = None
        except (RuntimeError, OSError) as error:  # of requests, whose errors are OSErrors
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > GIVE_UP_SECONDS:
                raise ReidError(
                    f"no word of job {job} for {GIVE_UP_SECONDS / 60:.0f} minutes ("
                    f"{' '.join(str(error).split())[:300]}): it goes on where its cluster does;"
                    f" follow it: {how}"
                ) from None
        await asyncio.sleep(PAUSE_SECONDS)


def _asked_to_stop(console: Console) -> bool:
    """Ask whether to stop the job; where nobody can answer, it goes on."""
    if not sys.stdin.isatty():
        return False
    try:
        return console.input("\nstop the job (s), or leave it running (l)? [l] ").strip() == "s"
    except (EOFError, KeyboardInterrupt):
        return False


def _exit_code(details: JobDetails, console: Console) -> int:
    if details.status == "SUCCEEDED":
        return 0
    if details.status == "STOPPED":
        console.print("the job was stopped")
        return 130
    message = " ".join((details.message or "").split())
    console.print(f"the job failed: {message[:400]}", highlight=False, soft_wrap=True)
    return details.driver_exit_code or 1
