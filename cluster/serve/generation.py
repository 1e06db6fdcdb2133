"""The gallery as one version of the model sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.serve.embedder import ModelFacts
from cluster.serve.index import Index, Nearest
from cluster.serve.store import Image
from data_shards.errors import ConfigError, ObjectMissing
from reid_train.evaluation.thresholds import Threshold, Thresholds

Decide = Callable[[int | None], Threshold]
"""From a gallery image's camera to the threshold that decides."""


@dataclass
class Generation:
    """The gallery as one version of the model sees it; rows of all fields are the index's."""

    model: str  # a version, not an alias
    facts: ModelFacts
    index: Index
    thresholds: Thresholds | None
    images: list[Image] = field(default_factory=list)
    row: dict[str, int] = field(default_factory=dict)  # by id, of those that are there
    camera: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    time: np.ndarray = field(default_factory=lambda: np.empty(0))

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

    def wanted(
        self, cameras: Sequence[int], since: float | None, until: float | None
    ) -> np.ndarray | None:
        """The rows that filters leave, (count,) bool; None for all. Unknown times match none."""
        if not cameras and since is None and until is None:
            return None
        mask = np.isin(self.camera, cameras) if cameras else np.ones(len(self.camera), bool)
        if since is not None:
            mask &= self.time >= since
        return mask if until is None else mask & (self.time <= until)

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
            matches.append(place | {"same": same} | image.public())
        return matches


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
