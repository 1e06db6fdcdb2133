"""The HTTP interface: what is asked and answered, without Ray."""

from __future__ import annotations

import io
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, HTTPException, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from PIL import Image, UnidentifiedImageError
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException as AnyHTTPException

from cluster.serve.guard import Guard, content_policy, is_authorized
from cluster.serve.settings import Settings
from data_shards.errors import ConfigError, DataError, ObjectMissing, ReidError, StorageError
from reid_train.commands.search import LONGEST, shape_warning

logger = logging.getLogger(__name__)

Ask = Callable[..., Awaitable[Any]]
"""Calls a method of `Searcher` by its name."""

Photo = Annotated[UploadFile, File(description="An image file, cropped to one person.")]
Rate = Annotated[
    float | None,
    Form(description="Decide at this false accept rate; by default at 0.001, if it was measured."),
]
Cameras = Annotated[
    list[str] | None, Form(description="Only images of these cameras: numbers or names.")
]
Since = Annotated[datetime | None, Form(description="Only images from this time on.")]
Until = Annotated[datetime | None, Form(description="Only images up to this time.")]


class GalleryImage(BaseModel):
    """An image of the gallery."""

    id: str
    path: str
    pid: int | None
    person: str | None = None
    """The name of the pid, in a gallery that has names."""
    camera: int | None
    camera_name: str | None = None
    time: datetime | None
    enrolled: bool


class Match(GalleryImage):
    """A gallery image in a rank list."""

    rank: int
    similarity: float
    same: bool | None


class Ranks(BaseModel):
    """The answer to a search."""

    model: str
    exact: bool
    gallery: int
    threshold: dict[str, float] | None
    matches: list[Match]
    warning: str | None = None


class Comparison(BaseModel):
    """The answer to a comparison."""

    model: str
    similarity: float
    same: bool | None
    threshold: dict[str, float] | None


class Embedding(BaseModel):
    """The answer to a request for an embedding."""

    model: str
    embedding: list[float]


class Listing(BaseModel):
    """Some images of the gallery."""

    total: int
    cameras: list[int]
    camera_names: dict[int, str] = {}
    times: bool
    images: list[GalleryImage]


def make_app(ask: Ask, settings: Settings, token: str | None) -> FastAPI:
    """Build the application; `token` is the SHA-256 of the bearer token, in hex."""
    # The pages that show the API load scripts from elsewhere, so there are none.
    app = FastAPI(title="adaptive-reid", docs_url=None, redoc_url=None)
    metrics = _Metrics()
    limit = settings.max_upload_bytes
    page = (Path(__file__).parent / "page.html").read_text()
    policy = content_policy(page)
    app.add_middleware(Guard, token=token, limit=limit, policy=policy, count=metrics.count)

    @app.exception_handler(ReidError)
    async def refuse(_: Request, error: ReidError) -> JSONResponse:
        return _error(_status(error), str(error))

    @app.exception_handler(AnyHTTPException)
    async def explain(request: Request, error: AnyHTTPException) -> JSONResponse:
        return _error(error.status_code, f"{error.detail} ({request.url.path[:80]})")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "the request"
        return _error(422, f"{where}: {first['msg']}")

    @app.exception_handler(Exception)
    async def fail(_: Request, error: Exception) -> JSONResponse:
        logger.error("a request failed", exc_info=error)
        return _error(500, "the service failed; its log says why. Try again")

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(page, media_type="text/html")

    @app.post("/search")
    async def search(
        photo: Annotated[UploadFile | None, File(description="The photo to search for.")] = None,
        id: Annotated[
            str | None, Form(description="Or an image of the gallery, by its id.")
        ] = None,
        top: Annotated[int, Form(ge=1, le=LONGEST, description="How many images to find.")] = 20,
        false_accept_rate: Rate = None,
        query_camera: Annotated[
            str | None, Form(description="The camera of the photo: its number or name.")
        ] = None,
        camera: Cameras = None,
        since: Since = None,
        until: Until = None,
    ) -> Ranks:
        """Rank the gallery by its similarity to a photo, or to one of its own images."""
        if (photo is None) == (id is None):
            raise ConfigError("give a photo, or the id of an image of the gallery")
        data, warning = (None, None) if photo is None else await read(photo)
        found = await ask(
            "search",
            data,
            id,
            top=top,
            rate=false_accept_rate,
            query_camera=query_camera,
            cameras=camera or (),
            since=_seconds(since),
            until=_seconds(until),
        )
        return Ranks(**found, warning=warning)

    @app.post("/compare")
    async def compare(a: Photo, b: Photo, false_accept_rate: Rate = None) -> Comparison:
        """Say how similar the people on two photos are."""
        (first, _), (second, _) = await read(a), await read(b)
        return Comparison(**await ask("compare", first, second, false_accept_rate))

    @app.post("/embed")
    async def embed(photo: Photo) -> Embedding:
        """Return the embedding of a photo. Compare embeddings of one model by their cosine."""
        return Embedding(**await ask("embed", (await read(photo))[0]))

    @app.post("/gallery", status_code=201)
    async def enrol(
        photo: Photo,
        pid: Annotated[
            str | None, Form(description="The person's number, or a name that is known.")
        ] = None,
        camera: Annotated[
            str | None, Form(description="The camera's number, or a name that is known.")
        ] = None,
        time: Annotated[datetime | None, Form(description="When it was taken.")] = None,
    ) -> GalleryImage:
        """Add an image to the gallery. It is stored before this is answered."""
        data, _ = await read(photo)
        seconds = _seconds(time)
        stored = await ask("enrol", data, pid, camera, None if seconds is None else int(seconds))
        return GalleryImage(**stored)

    @app.get("/gallery")
    async def gallery(
        offset: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=LONGEST)] = 60,
        camera: Annotated[list[str] | None, Query()] = None,
        since: datetime | None = None,
        until: datetime | None = None,
        pid: str | None = None,
    ) -> Listing:
        """List images of the gallery."""
        when = {"since": _seconds(since), "until": _seconds(until)}
        limits = {"offset": offset, "limit": limit, "cameras": camera or (), "pid": pid}
        return Listing(**await ask("list", **limits, **when))

    @app.get("/gallery/{id}/image", response_class=Response)
    async def picture(id: str) -> Response:
        """Return an image of the gallery as JPEG."""
        return Response(await ask("picture", id), media_type="image/jpeg")

    @app.delete("/gallery/{id}")
    async def remove(id: str) -> dict[str, bool]:
        """Remove an image from the gallery. That is stored before this is answered.

        The answer says whether it was there: a second request for the same image does nothing.
        """
        return {"removed": await ask("remove", id)}

    @app.get("/healthz")
    async def health(request: Request) -> dict[str, Any]:
        """Say whether the service answers and, with the token, what it serves."""
        status = await ask("status")
        return {"status": "ok"} | (status if is_authorized(request.scope, token) else {})

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Return the metrics of the replica that answers, in the format of Prometheus."""
        metrics.show(await ask("status"))
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    async def read(photo: UploadFile) -> tuple[bytes, str | None]:
        """The bytes of an uploaded photo, and a warning of its shape."""
        data = await photo.read()
        width, height = _size(data)
        if width * height > settings.max_pixels:
            raise HTTPException(
                413,
                f"the photo has {width} × {height} pixels, and {settings.max_pixels:,} are "
                "allowed: scale it down",
            )
        return data, shape_warning("the photo", height, width)

    return app


def _size(data: bytes) -> tuple[int, int]:
    """Width and height by the header of an image; nothing is decoded. Raises `DataError`."""
    if not data:
        raise DataError("the photo is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except Image.DecompressionBombError:
        raise HTTPException(413, "the photo has too many pixels: scale it down") from None
    except (UnidentifiedImageError, ValueError, OSError, SyntaxError):
        raise DataError(
            "the photo is not a readable image: send a JPEG, PNG or WebP file"
        ) from None


def _seconds(time: datetime | None) -> float | None:
    """Seconds since 1970; a time without a zone is UTC."""
    if time is None:
        return None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _status(error: ReidError) -> int:
    if isinstance(error, ObjectMissing):
        return 404
    if isinstance(error, StorageError):
        return 503
    return 422 if isinstance(error, ConfigError | DataError) else 500


def _error(status: int, text: str) -> JSONResponse:
    return JSONResponse({"error": " ".join(text.split())}, status)


class _Metrics:
    """Counts of one replica."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "reid_serve_requests", "Requests answered.", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "reid_serve_seconds", "Seconds to an answer.", ["path"], registry=registry
        )
        self.gallery = Gauge(
            "reid_serve_gallery_images", "Images that are searched.", registry=registry
        )
        self.recall = Gauge(
            "reid_serve_recall",
            "Recall@10 of the approximate index; 1 if exact.",
            registry=registry,
        )
        self.model = Gauge("reid_serve_model", "The version in use.", ["model"], registry=registry)

    def count(self, path: str, status: int, seconds: float) -> None:
        self.requests.labels(path, status).inc()
        self.seconds.labels(path).observe(seconds)

    def show(self, status: dict[str, Any]) -> None:
        self.gallery.set(status["gallery"])
        self.recall.set(status["recall"]["against_exact"] if status["recall"] else 1)
        self.model.clear()
        self.model.labels(status["model"]).set(1)
