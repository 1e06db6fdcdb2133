"""The gallery as one version of the model sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from cluster.serve.embedder import ModelFacts
from cluster.serve.index import Index, Nearest
from cluster.serve.store import Image, digest
from data_shards.errors import ConfigError, ObjectMissing
from data_shards.manifest import Names
from data_shards.records import NO_CAMERA
from reid_train.commands.gallery import Gallery
from reid_train.evaluation.similarity import check_features
from reid_train.evaluation.thresholds import Threshold, Thresholds

TOGETHER = 32  # queries that one product answers at most
Decide = Callable[[int | None], Threshold]
"""From a gallery image's camera to the threshold that decides."""


@dataclass
class Generation:
    """The gallery as one version of the model sees it; rows of all fields are the index's."""

    model: str  # a version, not an alias
    facts: ModelFacts
    index: Index
    thresholds: Thresholds | None
    names: Names = field(default_factory=Names)
    images: list[Image] = field(default_factory=list)
    row: dict[str, int] = field(default_factory=dict)  # by id, of those that are there
    camera: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    time: np.ndarray = field(default_factory=lambda: np.empty(0))
    _waiting: list[tuple[np.ndarray, int, asyncio.Future[Nearest]]] = field(default_factory=list)
    _searching: asyncio.Task[None] | None = None

    def add(self, images: Sequence[Image], embedding: np.ndarray) -> None:
        """Append images with their embeddings (n, D)."""
        new = [i for i, image in enumerate(images) if image.id not in self.row]
        if not new:
            return
        rows = self.index.add(embedding[new])
        added = [images[i] for i in new]
        self.images += added
        self.row |= {image.id: row for image, row in zip(added, rows, strict=True)}
        cameras = [-1 if image.camera is None else image.camera for image in added]
        times = [np.nan if image.time is None else image.time for image in added]
        self.camera = np.concatenate([self.camera, np.array(cameras, np.int64)])
        self.time = np.concatenate([self.time, np.array(times, float)])

    def remove(self, name: str) -> None:
        """Drop an image, if it is there."""
        if (row := self.row.pop(name, None)) is not None:
            self.index.remove(row)

    def number(self, what: Literal["person", "camera"], given: int | str | None) -> int | None:
        """The number of a person or camera that is given by number or by name."""
        return None if given is None else self.names.number(what, given)

    def wanted(
        self, cameras: Sequence[int | str], since: float | None, until: float | None
    ) -> np.ndarray | None:
        """The rows that filters leave, (count,) bool; None for all. Unknown times match none."""
        if not cameras and since is None and until is None:
            return None
        numbers = [self.names.number("camera", camera) for camera in cameras]
        mask = np.isin(self.camera, numbers) if cameras else np.ones(len(self.camera), bool)
        if since is not None:
            mask &= self.time >= since
        return mask if until is None else mask & (self.time <= until)

    async def nearest(self, query: np.ndarray, k: int) -> Nearest:
        """The k most similar rows of a query, (D,) float32.

        Queries that come while others are searched for share one product: it takes as long as the
        memory needs to deliver the gallery, for one query as for many.
        """
        check_features("query", query[None])  # now, so that it fails no other query
        found = asyncio.get_running_loop().create_future()
        self._waiting.append((query, k, found))
        if self._searching is None or self._searching.done():
            self._searching = asyncio.create_task(self._search())
        return await found

    async def _search(self) -> None:
        while asked := self._waiting[:TOGETHER]:
            del self._waiting[:TOGETHER]
            queries = np.stack([query for query, _, _ in asked])
            most = max(k for _, k, _ in asked)
            try:
                found = await asyncio.to_thread(self.index.nearest, queries, most)
            except Exception as error:
                for _, _, future in asked:
                    if not future.done():  # the request may have been cancelled
                        future.set_exception(error)
                continue
            for n, (_, k, future) in enumerate(asked):
                if not future.done():
                    own = found.row[n : n + 1, :k], found.similarity[n : n + 1, :k]
                    future.set_result(Nearest(*own, found.exact))

    def find(self, name: str) -> int:
        """The row of an image. Raises `ObjectMissing`."""
        if (row := self.row.get(name)) is None:
            raise ObjectMissing(f"the gallery has no image {name[:40]}")
        return row

    def matches(self, found: Nearest, decide: Decide | None) -> list[dict[str, Any]]:
        """What a search found for its only query, as answers show it."""
        matches = []
        for row, similarity in zip(found.row[0], found.similarity[0], strict=True):
            if row < 0:
                continue
            image = self.images[row]
            same = None if decide is None else bool(similarity > decide(image.camera).similarity)
            place = {"rank": len(matches) + 1, "similarity": round(float(similarity), 6)}
            matches.append(place | {"same": same} | image.public(self.names))
        return matches


def gallery_images(gallery: Gallery) -> list[Image]:
    """The images of the gallery that the service was started with, in its order."""
    images = []
    for row, (path, pid, camera) in enumerate(
        zip(gallery.path, gallery.pid.tolist(), gallery.camid.tolist(), strict=True)
    ):
        name = str(path) or f"row {row}"
        camera = camera if 0 <= camera < NO_CAMERA else None
        pid = None if pid < 0 else pid
        images.append(Image(digest("gallery", name), name, pid, camera, row=row))
    return images


def decider(
    known: Thresholds | None, rate: float | None, query_camera: int | None
) -> Decide | None:
    """How to decide at a rate of false accepts; None if the model has no thresholds."""
    if known is None:
        if rate is not None:
            raise ConfigError(
                "the model has no thresholds: measure them with `evaluate --thresholds`"
            )
        return None
    if (chosen := known.usual_rate if rate is None else rate) is None:
        return None
    known.find(chosen)  # raises if it was not measured

    def decide(camera: int | None) -> Threshold:
        pair = None if camera is None or query_camera is None else (query_camera, camera)
        return known.find(chosen, pair)

    return decide
