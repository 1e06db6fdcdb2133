"""What a worker does with its share of a measurement: arrays in, arrays out, no Ray.

`distributed` puts the shares together. A share is a list of consecutive stretches of the gallery,
or of tiles of the product of everything with everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from reid_train.evaluation.camera_pairs import split_by_camera
from reid_train.evaluation.distance_ranking import positive_ranks
from reid_train.evaluation.embedding_store import EmbeddingFiles
from reid_train.evaluation.expansion import mean_with_nearest
from reid_train.evaluation.ground_truth import Labels, Matches, find_matches
from reid_train.evaluation.neighbours import Neighbours, Tile, nearest_neighbours
from reid_train.evaluation.ranking import BLOCK, count_before, score_own
from reid_train.evaluation.reranking import (
    Encoding,
    ReRanking,
    distances,
    encode,
    scores_across,
)
from reid_train.evaluation.similarity import Metric, Side
from reid_train.evaluation.verification import count_distances

Stretch = tuple[int, int]
"""Consecutive gallery items: number of the first, and of the one past the last."""


@dataclass(frozen=True)
class Streamed:
    """Queries in memory, and a gallery that stays on storage."""

    query: Side
    files: EmbeddingFiles

    def blocks(self, share: list[Stretch], size: int) -> Iterator[tuple[int, Side]]:
        """The gallery's items of a share, `size` at a time."""
        for first, embedding in self.files.stretches("gallery", share[0][0], share[-1][1], size):
            yield first, Side.of(embedding)


@dataclass(frozen=True)
class Held:
    """Everything in memory, queries first."""

    side: Side
    queries: int

    @property
    def query(self) -> Side:
        """The queries alone."""
        return self.side.rows(0, self.queries)

    @property
    def gallery(self) -> Side:
        """The gallery alone."""
        return self.side.rows(self.queries, len(self.side.norm))

    def blocks(self, share: list[Stretch], size: int) -> Iterator[tuple[int, Side]]:
        """The gallery's items of a share, `size` at a time."""
        for first in range(share[0][0], share[-1][1], size):
            yield first, self.gallery.rows(first, min(first + size, share[-1][1]))


Source = Streamed | Held


def hold(files: EmbeddingFiles) -> Held:
    """Read everything."""
    everything = Side.of(files.read("query", "gallery"))
    return Held(everything, int(np.count_nonzero(files.split == "query")))


def join(held: Held, expanded: int, *stretches: np.ndarray) -> Held:
    """New queries, a new gallery, or both, in place of those that are held.

    Args:
        expanded: how many of the stretches are queries'; the others are the gallery's.
    """
    query = stretches[:expanded] or [held.query.embedding]
    gallery = stretches[expanded:] or [held.gallery.embedding]
    return Held(Side.of(np.concatenate([*query, *gallery])), held.queries)


def score_share(
    source: Source, matches: Matches, metric: Metric, share: list[Stretch]
) -> np.ndarray:
    """Scores (M,) float64 of the matches in a share of the gallery, NaN elsewhere."""
    return score_own(source.query, source.blocks(share, BLOCK), matches, metric)


def count_share(
    source: Source, matches: Matches, metric: Metric, scores: np.ndarray, share: list[Stretch]
) -> np.ndarray:
    """How many of a share of the gallery come before each positive, (P,) int64."""
    return count_before(source.query, source.blocks(share, BLOCK), matches, scores, metric)


def count_pairs_share(
    source: Source,
    labels: Labels,
    matches: Matches,
    metric: Metric,
    scores: np.ndarray,
    share: list[Stretch],
) -> list[np.ndarray]:
    """How many of a share and of one camera come before each positive of that camera.

    Returns:
        (P,) int64 for each camera of `split_by_camera`.
    """
    # Held in memory, as every camera needs a part of each block.
    blocks, counts = list(source.blocks(share, BLOCK)), []
    for seen_by, there, part in split_by_camera(labels):
        own = scores[labels.gallery_camid[matches.index] == seen_by]
        seen = _of_camera(blocks, labels.gallery_camid == seen_by, there)
        counts.append(count_before(source.query, seen, find_matches(part), own, metric))
    return counts


def _of_camera(
    blocks: list[tuple[int, Side]], seen: np.ndarray, there: np.ndarray
) -> Iterator[tuple[int, Side]]:
    """One camera's items of each block, and which of that camera's items is the first."""
    for first, block in blocks:
        inside = seen[first : first + len(block.norm)]
        if inside.any():
            yield int(np.searchsorted(there, first)), block.only(inside)


def longest_share(source: Source, share: list[Stretch]) -> float:
    """The greatest norm in a share of the gallery."""
    return max(float(block.norm.max()) for _, block in source.blocks(share, BLOCK))


def distances_share(
    source: Source, matches: Matches, metric: Metric, longest: float, share: list[Stretch]
) -> np.ndarray:
    """Counts (2, BINS) of `roc.count_distances`, each stretch in one piece."""
    blocks = source.blocks(share, share[0][1] - share[0][0])
    return count_distances(source.query, blocks, matches, metric, longest)


def nearest_share(held: Held, k: int, metric: int, share: list[Tile]) -> Neighbours:
    """The nearest neighbours of everything, as far as a share of the tiles tells."""
    return nearest_neighbours(held.side, k, metric, share)


def nearest_gallery_share(held: Held, k: int, metric: int, share: list[Tile]) -> Neighbours:
    """The nearest neighbours within the gallery, as far as a share of its tiles tells."""
    return nearest_neighbours(held.gallery, k, metric, share)


def mean_share(
    held: Held, near: Neighbours, alpha: float, expand: bool, share: list[Stretch]
) -> np.ndarray:
    """A stretch of the expanded queries or of the augmented gallery, (n, D) float32."""
    first, stop = share[0][0], share[-1][1]
    side = held.side if expand else held.gallery
    return mean_with_nearest(side, near.rows(first, stop), alpha, with_self=expand, first=first)


def encode_held(held: Held, near: Neighbours, settings: ReRanking, metric: int) -> Encoding:
    """Everything's sparse row."""
    return encode(held.side, near, settings, metric)


def distance_share(
    held: Held,
    encoding: Encoding,
    settings: ReRanking,
    metric: int,
    matches: Matches,
    share: list[list[Tile]],
) -> np.ndarray:
    """Ranks of the re-ranked positives of a share of the queries, 0 elsewhere."""
    scores = scores_across(held.side, held.queries, metric, share)
    return positive_ranks(distances(held.queries, encoding, settings, metric, scores), matches)
