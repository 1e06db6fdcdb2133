"""`python -m cluster serve`: start the service on Ray Serve, and keep it until a signal."""

from __future__ import annotations

import io
import logging
import os
import platform
import re
import socket
import time
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from cluster.local import servers as local
from cluster.local.stack import open_directly
from cluster.serve.settings import Settings, token_digest
from data_shards.errors import ConfigError, Interrupted, ReidError
from data_shards.progress import display, make_console, phase
from data_shards.ray_utils import prepare_ray

logger = logging.getLogger(__name__)

START_SECONDS = 60.0  # for the proxy to listen
LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Serve:
    """Serve a search page and an HTTP API over a gallery, on Ray Serve.

    python -m cluster serve --model models:/reid-msmt17@champion --gallery s3://bucket/photos
    """

    service: Annotated[Settings, tyro.conf.arg(name="")]
    host: str = "127.0.0.1"
    """Where to listen. Beyond loopback a token is needed: in REID_SERVE_TOKEN or --token-file."""
    port: int = 8000
    """Port to listen on."""
    token_file: Path | None = None
    """File with the token that requests must have."""
    folder: Path | None = None
    """A local stack (`cluster local`) to serve on, started if need be; by default a running one."""


def serve(settings: Serve) -> None:
    """Run the service until SIGINT or SIGTERM."""
    settings.service.check()
    token = token_digest(settings.token_file, settings.host)
    console = make_console()
    folder = settings.folder
    if (
        folder is None
        and "RAY_ADDRESS" not in os.environ
        and local.running(local.FOLDER.absolute())
    ):
        folder = local.FOLDER
    with nullcontext() if folder is None else local.used(folder.absolute(), console):
        prepare_ray()
        with display(console) as progress, phase(progress, "loading PyTorch and Ray"):
            from reid_train.runs.process import stop_signals
        with stop_signals() as stop:
            with display(console) as progress:
                with phase(progress, "looking at the model and the gallery"):
                    service = checked(settings.service)
                with phase(progress, "starting the service"):
                    start(service, token, settings.host, settings.port)
            # A browser cannot open a wildcard address.
            shown = platform.node() if settings.host in ("0.0.0.0", "::") else settings.host
            url = f"http://{shown}:{settings.port}"
            console.print(f"page      {url}/")
            console.print(f"API       {url}/openapi.json")
            console.print(f"enrolled  {service.store}")
            console.print("stop it   Ctrl-C")
            try:
                while stop.signal is None:
                    time.sleep(LOOK_SECONDS)
            finally:
                with display(console) as progress, phase(progress, "stopping the service"):
                    end()
    raise Interrupted("the service was stopped", stop.signal)


def checked(settings: Settings) -> Settings:
    """The settings as replicas need them, with whole paths, once model and gallery are found.

    Raises:
        ReidError: the model, the gallery or a package is not there.
    """
    try:
        import python_multipart  # noqa: F401
        import ray.serve  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"the service needs the package {error.name}: pip install -e '.[serve]'"
        ) from None
    from reid_train.commands.gallery import open_gallery
    from reid_train.registry.load import pinned
    from reid_train.tracking.uris import registry_uri

    places = {
        name: str(Path(place).expanduser().absolute())
        for name in ("model", "gallery", "enrolled", "images")
        if (place := getattr(settings, name)) and not re.match(r"\w+:/", place)
    }
    settings = replace(settings, **places)
    if settings.model.startswith("models:/"):
        settings = replace(settings, tracking_uri=registry_uri(settings.tracking_uri))
    pinned(settings.model, settings.tracking_uri)
    open_gallery(settings.gallery, settings.split, settings.images)
    return settings


def start(settings: Settings, token: str | None, host: str, port: int) -> None:
    """Deploy the service on Ray, and return when it answers.

    Raises:
        ReidError: it does not start, or something else listens there.
    """
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    from cluster.serve.app import NAME, build_app
    from data_shards.ray_utils import start_ray

    cpus = settings.replicas * settings.cpus_per_replica
    cpus += settings.search_replicas * settings.search_cpus
    # Ray Serve says what it does in dozens of lines; they are in Ray's logs, too.
    start_ray(cpus, logs=bool(os.environ.get("REID_LOG_LEVEL")))
    if (free := ray.available_resources().get("CPU", 0)) < cpus:
        logger.warning("the service needs %d cores, and the Ray cluster has %g free", cpus, free)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if not serve.status().proxies and _is_head():
        _require_free(host, port)
    try:
        serve.start("HeadOnly", HTTPOptions(host=host, port=port), logging_config=quiet)
        serve.run(build_app(settings, token), name=NAME, logging_config=quiet)
        _wait_for_answer(f"http://{host}:{port}/healthz")
    except RuntimeError as error:
        end()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ReidError(f"the service does not start: {lines[-1]}; see Ray's logs") from None
    except BaseException:  # a second Ctrl-C, too: Ray would keep what has started
        end()
        raise


def _is_head() -> bool:
    """Whether Ray's head, where the service listens, is this machine."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    heads = [n["NodeID"] for n in ray.nodes() if "node:__internal_head__" in n["Resources"]]
    return here in heads


def _require_free(host: str, port: int) -> None:
    """Raise `ConfigError` if something listens on this port of this machine."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]  # Python adds the address
        raise ConfigError(
            f"cannot listen on port {port} of {host} ({reason}): give another --port"
        ) from None


def _wait_for_answer(url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with open_directly(url, 10):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ReidError(
                    f"the service does not answer at {url} ({error}): if Ray Serve was running "
                    "before with another --host or --port, stop it with `serve shutdown`"
                ) from None
        time.sleep(LOOK_SECONDS)


def end() -> None:
    """Stop the service; also Ray Serve, if nothing else runs on it."""
    from ray import serve

    from cluster.serve.app import NAME

    serve.delete(NAME)
    if not serve.status().applications:
        # Ray prints the end of the controller as the failure of a task.
        with redirect_stdout(io.StringIO()):
            serve.shutdown()
