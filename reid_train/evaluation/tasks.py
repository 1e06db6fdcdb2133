"""What a task does with its blocks: arrays in, arrays out.

`evaluate` combines the results. A task gets consecutive ranges of the gallery, or blocks of the
product of all images with all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from reid_train.evaluation.embedding_store import EmbeddingFiles
from reid_train.evaluation.expansion import mean_with_nearest
from reid_train.evaluation.ground_truth import (
    GroundTruth,
    Labels,
    find_ground_truth,
    split_by_camera,
)
from reid_train.evaluation.measures import Metric, ReRanking
from reid_train.evaluation.neighbours import Block, Neighbours, Range, nearest_neighbours
from reid_train.evaluation.ranking import BLOCK, count_before, positive_ranks, score_matches
from reid_train.evaluation.reranking import (
    Encoding,
    distances,
    encode,
    find_neighbours,
    scores_across,
)
from reid_train.evaluation.similarity import Features
from reid_train.evaluation.verification import count_distances

Count = Callable[[int], object]
"""Called with how much more is done."""


@dataclass(frozen=True)
class Streamed:
    """Queries in memory, and a gallery that stays on storage."""

    query: Features
    files: EmbeddingFiles

    def blocks(self, own: Sequence[Range], size: int) -> Iterator[tuple[int, Features]]:
        """The images of consecutive gallery ranges, `size` at a time."""
        for first, embedding in self.files.blocks("gallery", own[0][0], own[-1][1], size):
            yield first, Features.of(embedding)


@dataclass(frozen=True)
class Separate:
    """Queries and gallery in memory, each in an array of its own."""

    query: Features
    gallery: Features

    def blocks(self, own: Sequence[Range], size: int) -> Iterator[tuple[int, Features]]:
        """The images of consecutive gallery ranges, `size` at a time."""
        for first in range(own[0][0], own[-1][1], size):
            yield first, self.gallery.rows(first, min(first + size, own[-1][1]))


@dataclass(frozen=True)
class Joined:
    """Queries and gallery in memory in one array, queries first."""

    both: Features
    queries: int

    @property
    def query(self) -> Features:
        """Only the queries."""
        return self.both.rows(0, self.queries)

    @property
    def gallery(self) -> Features:
        """Only the gallery."""
        return self.both.rows(self.queries, len(self.both))

    def blocks(self, own: Sequence[Range], size: int) -> Iterator[tuple[int, Features]]:
        """The images of consecutive gallery ranges, `size` at a time."""
        return Separate(self.query, self.gallery).blocks(own, size)


Source = Streamed | Separate | Joined


def read_all(files: EmbeddingFiles) -> Joined:
    """Read all embeddings into memory."""
    both = Features.of(files.read("query", "gallery"))
    return Joined(both, int(np.count_nonzero(files.split == "query")))


def match_task(
    source: Source, truth: GroundTruth, metric: Metric, own: Sequence[Range], count: Count
) -> np.ndarray:
    """Exact scores (M,) of the ground truth in a task's gallery ranges, NaN elsewhere."""
    scores = score_matches(source.query, source.blocks(own, BLOCK), truth, metric)
    count(own[-1][1] - own[0][0])
    return scores


def count_task(
    source: Source,
    truth: GroundTruth,
    metric: Metric,
    scores: np.ndarray,
    own: Sequence[Range],
    count: Count,
) -> np.ndarray:
    """How many images of a task's gallery ranges come before each positive, (P,) int64."""
    blocks = source.blocks(own, BLOCK)
    return count_before(source.query, blocks, truth, scores, metric, progress=count)


def camera_task(
    source: Source,
    labels: Labels,
    truth: GroundTruth,
    metric: Metric,
    scores: np.ndarray,
    own: Sequence[Range],
    count: Count,
) -> list[np.ndarray]:
    """How many images of one camera, in a task's ranges, come before that camera's positives.

    Returns:
        (P,) int64 for each camera of `split_by_camera`.
    """
    # Held in memory: every camera needs a part of each block.
    blocks, counts = list(source.blocks(own, BLOCK)), []
    for camera, images, part in split_by_camera(labels):
        known = scores[labels.gallery_camid[truth.index] == camera]
        seen = _of_camera(blocks, labels.gallery_camid == camera, images)
        counts.append(count_before(source.query, seen, find_ground_truth(part), known, metric))
    count(own[-1][1] - own[0][0])
    return counts


def _of_camera(
    blocks: Sequence[tuple[int, Features]], seen: np.ndarray, images: np.ndarray
) -> Iterator[tuple[int, Features]]:
    """One camera's images of each block, and the number of the first among that camera's."""
    for first, block in blocks:
        inside = seen[first : first + len(block)]
        if inside.any():
            yield int(np.searchsorted(images, first)), block.only(inside)


def longest_task(source: Source, own: Sequence[Range], count: Count) -> float:
    """The greatest norm in a task's gallery ranges."""
    longest = max(float(block.norm.max()) for _, block in source.blocks(own, BLOCK))
    count(own[-1][1] - own[0][0])
    return longest


def accept_task(
    source: Source,
    truth: GroundTruth,
    metric: Metric,
    longest: float,
    own: Sequence[Range],
    count: Count,
) -> np.ndarray:
    """Counts (2, BINS) of `count_distances`, each range in one product."""
    blocks = source.blocks(own, own[0][1] - own[0][0])
    return count_distances(source.query, blocks, truth, metric, longest, count)


def neighbour_task(
    source: Joined,
    k: int,
    metric: int,
    kept: np.ndarray | None,
    own: Sequence[Block],
    count: Count,
) -> Neighbours:
    """The nearest of all images among all, as far as a task's blocks tell."""
    return find_neighbours(source.both, k, metric, own, kept, count)


def gallery_neighbour_task(
    source: Joined, k: int, metric: int, own: Sequence[Block], count: Count
) -> Neighbours:
    """The nearest of the gallery within the gallery, as far as a task's blocks tell."""
    return nearest_neighbours(source.gallery, k, metric, own, progress=count)


def replaced(
    source: Joined, query_near: Neighbours | None, gallery_near: Neighbours | None, alpha: float
) -> Joined:
    """Queries, gallery or both, replaced by means with their nearest; None keeps them."""
    query, gallery = source.query.embedding, source.gallery.embedding
    if query_near is not None:
        query = mean_with_nearest(source.both, query_near, alpha, with_self=True)
    if gallery_near is not None:
        gallery = mean_with_nearest(source.gallery, gallery_near, alpha, with_self=False)
    return Joined(Features.of(np.concatenate([query, gallery])), source.queries)


def encode_all(source: Joined, near: Neighbours, settings: ReRanking, metric: int) -> Encoding:
    """The sparse rows of all images."""
    return encode(source.both, near, settings, metric)


def distance_task(
    source: Joined,
    encoding: Encoding,
    settings: ReRanking,
    metric: int,
    truth: GroundTruth,
    kept: np.ndarray | None,
    own: Sequence[Sequence[Block]],
    count: Count,
) -> np.ndarray:
    """Re-ranked ranks of the positives of a task's queries, 0 elsewhere."""
    scores = scores_across(source.both, source.queries, metric, own, kept)
    found = distances(source.queries, encoding, settings, metric, scores)
    return positive_ranks(found, truth, count)
