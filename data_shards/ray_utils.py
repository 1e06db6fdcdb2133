"""What to do before Ray is imported: quiet, off the network, and a cluster that answers."""

import logging
import os
import shlex
import socket
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_shards.building.parallel import cores
from data_shards.errors import ConfigError, ReidError

ANSWER_SECONDS = 10.0  # for the head of a cluster to answer
NOISE = (  # lines of workers that are not shown here; Ray's log files have them
    # Ray Train's own actor; nothing depends on its restart (Ray's issue 53727).
    "PreemptionWatcher",
    # It is specified so that gradient buckets keep their layout, and a resumed run its sums.
    "find_unused_parameters=True was specified",
    # Machines without a name service: the connection stands.
    "hostname of the client socket cannot be retrieved",
    # Actors that need no CPU, such as the board, count as too many processes.
    "PYTHON worker processes have been started",
)


def prepare_ray() -> None:
    """Set Ray's environment variables; call it before anything imports Ray.

    Ray listens on the machine's outward address. A cluster that this process starts stays on
    loopback: Ray has a switch for systems with firewalls that ask, and it works on all others too.
    """
    try:
        Path.home()
    except RuntimeError:  # an unknown user id, as containers have, without HOME: Ray needs one
        os.environ["HOME"] = tempfile.gettempdir()
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "|".join(NOISE))
    if not _address():
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # Ray's default for a new cluster, which it otherwise prints a notice about.
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _address() -> str:
    """The cluster's address, or "" to start Ray on this machine, which Ray also calls "local"."""
    address = os.environ.get("RAY_ADDRESS", "")
    return "" if address == "local" else address


def require_ray_cluster() -> None:
    """Check that the cluster at RAY_ADDRESS answers, if it is set; Ray would wait for minutes."""
    address = _address()
    if address in ("", "auto"):
        return
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.scheme in ("http", "https"):
        raise ConfigError(
            f"RAY_ADDRESS is {address}, the address of a job server. Send the command there as a "
            f"job: `python -m cluster submit --address {shlex.quote(address)} -- python -m …`. Or "
            "set RAY_ADDRESS to the cluster's head, HOST:6379, or unset it to run on this machine"
        )
    advice = "start the cluster, correct RAY_ADDRESS, or unset it to run on this machine"
    try:
        host, port = parts.hostname or "", parts.port or 0
    except ValueError:
        host, port = "", 0
    if not (host and port):
        raise ConfigError(f"RAY_ADDRESS is {address}, not HOST:PORT of a cluster's head")
    try:
        socket.create_connection((host, port), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        none = f"no Ray cluster answers at RAY_ADDRESS {address} ({error})"
        raise ReidError(f"{none}: {advice}") from None
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return
    import grpc  # a dependency of Ray

    with grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_SECONDS)
        except grpc.FutureTimeoutError:
            wrong = f"what answers at RAY_ADDRESS {address} is no Ray head"
            raise ReidError(f"{wrong}: {advice}") from None


def connect(address: str) -> None:
    """Connect to a cluster by its HOST:PORT, or start Ray on this machine if it is "local"."""
    os.environ["RAY_ADDRESS"] = address
    prepare_ray()
    start_ray(1)


def start_ray(cpus: int, *, logs: bool = True) -> None:
    """Connect to the cluster at RAY_ADDRESS, or start Ray here with at least `cpus` CPUs."""
    import ray

    if ray.is_initialized():
        return
    require_ray_cluster()
    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": logs}
    if not _address():
        options |= {"address": "local", "num_cpus": max(cpus, cores())}
    try:
        ray.init(**options)
    except ReidError:
        raise
    except Exception as error:  # Ray raises plain ones, such as when its node starts too slowly
        reason = " ".join(str(error).split())
        if not (address := _address()):
            raise ReidError(f"Ray does not start on this machine: {reason}") from error
        raise ReidError(
            f"the Ray cluster at {address} does not let this program join: {reason}. If its logs "
            "speak of a token, set RAY_AUTH_MODE=token and use the cluster's token"
        ) from error
