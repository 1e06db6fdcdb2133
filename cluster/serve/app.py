"""The service as a Ray Serve application: for `python -m cluster serve`, and for KubeRay."""

from __future__ import annotations

import logging
import os
import uuid
from typing import Any

import tyro
from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from cluster.serve.api import make_app
from cluster.serve.handles import call, cause
from cluster.serve.settings import Settings, token_digest
from data_shards.errors import ReidError

NAME = "reid"
CHANGES = {"name": "changes", "ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": 1000}
ONGOING = 100  # requests that a replica has at once; more wait in the callers


def build_app(settings: Settings, token: str | None) -> Application:
    """The three deployments; `token` is the SHA-256 of the bearer token, in hex."""
    gpus = settings.gpus_per_replica if settings.device == "cuda" else 0
    embedder = _embedder(
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": gpus},
        max_ongoing_requests=ONGOING,
    )
    searcher = _searcher(
        num_replicas=settings.search_replicas,
        ray_actor_options={"num_cpus": settings.search_cpus},
        max_ongoing_requests=ONGOING,
    )

    several = settings.search_replicas > 1
    changes = [serve.deployment(Changes, **CHANGES).bind()] if several else []

    def api() -> FastAPI:
        handle = serve.get_deployment_handle("searcher")
        return make_app(_asking(handle), settings, token)

    ingress = serve.deployment(
        serve.ingress(api)(),
        name="ingress",
        num_replicas=settings.ingress_replicas,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=ONGOING,
    )
    return ingress.bind(searcher.bind(settings, embedder.bind(settings), *changes))


def build(arguments: dict[str, str]) -> Application:
    """For KubeRay: `import_path: cluster.serve.app:build`, with the flags of `serve` as `args`.

    The proxies of a cluster listen beyond loopback, so the token must be in the environment.
    """
    return build_app(read_settings(arguments), token_digest(None, "0.0.0.0"))


def read_settings(arguments: dict[str, str]) -> Settings:
    """The settings in a manifest's `args`."""
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    settings = tyro.cli(Settings, args=words, prog="args")
    settings.check()
    return settings


class Changes:
    """Counts enrolments and removals, so that each replica that searches knows of the others'."""

    def __init__(self) -> None:
        self.life, self.count = uuid.uuid4().hex, 0  # after a restart all look again

    async def add(self) -> None:
        """Count a change that is stored."""
        self.count += 1

    async def latest(self) -> str:
        """A text that is another after each change."""
        return f"{self.life} {self.count}"


def _embedder(**options: Any) -> Any:
    from cluster.serve.embedder import Embedder

    return serve.deployment(Embedder, name="embedder", **options)


def _searcher(**options: Any) -> Any:
    from cluster.serve.searcher import Searcher

    class Replica(Searcher):
        """A replica that has its gallery before it gets requests."""

        async def __init__(self, *given: Any) -> None:
            logging.getLogger("cluster.serve").setLevel(os.environ.get("REID_LOG_LEVEL", "INFO"))
            super().__init__(*given)
            await self.start()

    return serve.deployment(Replica, name="searcher", **options)


def _asking(handle: Any) -> Any:
    async def ask(method: str, *arguments: Any, **options: Any) -> Any:
        try:
            return await call(getattr(handle, method), *arguments, **options)
        except ReidError as error:
            raise cause(error) from None

    return ask
