"""The k nearest neighbours of everything among everything, exact, without an N × N matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch

from reid_train.evaluation.kernels import rank_counts as counting
from reid_train.evaluation.kernels import topk as nearest
from reid_train.evaluation.similarity import (
    Side,
    full_precision,
    in_threads,
    left_operand,
    quick_scores,
    right_operand,
    single_threaded_pool,
    tolerance,
)

TILE = 1536
"""Rows and columns of a product. Fixed, so that a tile is the same whoever computes it."""


@dataclass(frozen=True)
class Neighbours:
    """The nearest of each item, itself included.

    Args:
        index: (N, k) int32, by ascending exact score, equal ones by index; −1 where fewer are
            known.
        score: (N, k) float64, ∞ where fewer are known.
        furthest: (N,) float32, the greatest score.
    """

    index: np.ndarray
    score: np.ndarray
    furthest: np.ndarray

    def rows(self, first: int, stop: int) -> Neighbours:
        """Those of consecutive items, as views."""
        part = slice(first, stop)
        return Neighbours(self.index[part], self.score[part], self.furthest[part])

    @classmethod
    def merge(cls, parts: list[Neighbours]) -> Neighbours:
        """What `nearest_neighbours` gives for all the tiles of the parts together."""
        index = np.concatenate([part.index for part in parts], axis=1)
        score = np.concatenate([part.score for part in parts], axis=1)
        order = np.lexsort((index, score), axis=1)[:, : parts[0].index.shape[1]]
        return cls(
            np.take_along_axis(index, order, axis=1),
            np.take_along_axis(score, order, axis=1),
            np.max([part.furthest for part in parts], axis=0),
        )


@dataclass(frozen=True)
class Tile:
    """Pairs of consecutive rows and columns, by the first of each and the one past the last.

    Above the diagonal it is `mirrored`: it also tells its columns about its rows.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    mirrored: bool

    @property
    def pairs(self) -> int:
        """How many distances it stands for."""
        height, width = self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]
        return height * width * (1 + self.mirrored)


def _stretches(first: int, stop: int) -> list[tuple[int, int]]:
    return [(a, min(a + TILE, stop)) for a in range(first, stop, TILE)]


def all_pairs(count: int) -> list[Tile]:
    """Everything with everything: half the products are enough.

    The diagonal comes first: after it every row knows how close its nearest are at least, and
    few of the others need a second look.
    """
    edges = _stretches(0, count)
    diagonal = [Tile(a, a, mirrored=False) for a in edges]
    return diagonal + [Tile(a, b, mirrored=True) for a in edges for b in edges if a < b]


def tiles_across(queries: int, count: int) -> list[list[Tile]]:
    """Those tiles of `all_pairs` that hold the queries' scores with the others, by their rows.

    As tiles are fixed, these scores are the same to the bit.
    """
    edges = _stretches(0, count)
    return [
        [Tile(a, b, mirrored=a != b) for b in edges if a <= b and b[1] > queries]
        for a in edges
        if a[0] < queries
    ]


def query_gallery_pairs(queries: int, count: int) -> list[Tile]:
    """The first `queries` items with all the others."""
    across = _stretches(queries, count)
    return [Tile(a, b, mirrored=False) for a in _stretches(0, queries) for b in across]


def tile_scores(side: Side, metric: int) -> Callable[[Tile], np.ndarray]:
    """A function from a tile to its quick scores (height, width) float32.

    Threads may call it at once, within `full_precision`. It remembers operands: those of all
    columns, and those of the last rows, as many as there are threads.
    """
    cpu, lock, threads = torch.device("cpu"), Lock(), torch.get_num_threads()
    rights: dict[tuple[int, int], torch.Tensor] = {}
    lefts: dict[tuple[int, int], torch.Tensor] = {}

    def scores_of(tile: Tile) -> np.ndarray:
        rows, columns = side.rows(*tile.rows), side.rows(*tile.columns)
        # Made outside of the lock: twice now and then, but no thread waits for another's.
        if (left := lefts.get(tile.rows)) is None:
            left = left_operand(rows, metric, cpu)
            with lock:
                lefts[tile.rows] = left
                if len(lefts) > threads:
                    del lefts[next(iter(lefts))]
        if (right := rights.get(tile.columns)) is None:
            right = rights[tile.columns] = right_operand(columns, metric, cpu)
        scores = quick_scores(left, right, columns, metric).numpy()
        if metric == counting.EUCLIDEAN:
            scores += (rows.norm[:, None] ** 2).astype(np.float32)
        return scores

    return scores_of


def nearest_neighbours(
    side: Side,
    k: int,
    metric: int,
    tiles: Iterable[Tile],
    *,
    seen: Callable[[Tile, np.ndarray], object] = lambda tile, scores: None,
    progress: Callable[[int], object] = lambda pairs: None,
) -> Neighbours:
    """The k nearest neighbours, as far as the tiles tell.

    Args:
        side: all N embeddings.
        k: how many, at most N.
        metric: code of the metric.
        tiles: what to compare with what; those of the same rows one after another.
        seen: told each tile's scores (height, width) float32, by several threads at once.
        progress: told each tile's pairs.
    """
    count, capacity = len(side.norm), 4 * k
    buffers = (
        np.empty((count, capacity), np.float32),  # scores
        np.empty((count, capacity), np.int32),  # items
        np.zeros(count, np.int64),  # how many
        np.full(count, np.inf, np.float32),  # up to which score they are taken
        np.full(count, -np.inf, np.float32),  # the greatest score
    )
    # An error that always holds: what is dropped does not come back for a second look, as it does
    # in `ranking`. For embeddings that are not nearly one constant this costs next to nothing.
    slack = tolerance(side, side, metric, certain=True)
    rest = (slack, k, metric, side.embedding, side.scale)
    scores_of, tiles = tile_scores(side, metric), list(tiles)
    locks = {stretch: Lock() for tile in tiles for stretch in (tile.rows, tile.columns)}

    def offer(tile: Tile) -> int:
        scores, place = scores_of(tile), (tile.rows[0], tile.columns[0])
        seen(tile, scores)
        with locks[tile.rows]:
            nearest.offer_columns(scores, *place, *buffers, *rest)
        if tile.mirrored:
            with locks[tile.columns]:
                nearest.offer_rows(scores, *place, *buffers, *rest)
        return tile.pairs

    with full_precision(), single_threaded_pool() as pool:
        for pairs in pool.map(offer, tiles):
            progress(pairs)
    index, score = np.empty((count, k), np.int32), np.empty((count, k))

    in_threads(lambda a, b: nearest.settle(*buffers[:4], *rest, a, index[a:b], score[a:b]), count)
    return Neighbours(index, score, buffers[4])
