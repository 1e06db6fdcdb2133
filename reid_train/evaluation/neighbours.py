"""The k nearest neighbours of everything among everything, exact, without an N × N matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from reid_train.evaluation import counting, nearest
from reid_train.evaluation.scoring import (
    Side,
    full_precision,
    in_threads,
    left_operand,
    quick_scores,
    right_operand,
    tolerance,
)

TILE = 2048
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


def tiles(count: int) -> list[tuple[int, int]]:
    """First row and first column of the tiles on and above the diagonal."""
    edges = range(0, count, TILE)
    return [(row, column) for row in edges for column in edges if row <= column]


def nearest_neighbours(
    side: Side,
    k: int,
    metric: int,
    chosen: Iterable[tuple[int, int]] | None = None,
    *,
    progress: Callable[[int], object] = lambda pairs: None,
) -> Neighbours:
    """The k nearest neighbours, from all tiles or from a part of them.

    A tile above the diagonal serves its rows and its columns, so that half the product is enough.

    Args:
        side: all N embeddings.
        k: how many, at most N.
        metric: code of the metric.
        chosen: tiles to compute, row by row; all by default.
        progress: told how many pairs of items each tile has served.
    """
    count, cpu = len(side.norm), torch.device("cpu")
    capacity = 4 * k
    buffers = (
        np.empty((count, capacity), np.float32),  # scores
        np.empty((count, capacity), np.int32),  # items
        np.zeros(count, np.int64),  # how many
        np.full(count, np.inf, np.float32),  # up to which score they are taken
        np.full(count, -np.inf, np.float32),  # the greatest score
    )
    rest = (tolerance(side, side, metric), k, metric, side.embedding, side.scale)
    rights: dict[int, torch.Tensor] = {}
    left, left_row = torch.empty(0), -1
    with full_precision():
        for row, column in tiles(count) if chosen is None else chosen:
            if row != left_row:
                left, left_row = left_operand(side.rows(row, row + TILE), metric, cpu), row
            block = side.rows(column, column + TILE)
            if column not in rights:
                rights[column] = right_operand(block, metric, cpu)
            scores = quick_scores(left, rights[column], block, metric).numpy()
            if metric == counting.EUCLIDEAN:
                scores += (side.norm[row : row + TILE, None] ** 2).astype(np.float32)

            def rows(a: int, b: int, scores=scores, row=row, column=column) -> None:
                nearest.offer_columns(scores[a:b], row + a, column, *buffers, *rest)

            def columns(a: int, b: int, scores=scores, row=row, column=column) -> None:
                nearest.offer_rows(scores[:, a:b], row, column + a, *buffers, *rest)

            in_threads(rows, scores.shape[0])
            if row != column:
                in_threads(columns, scores.shape[1])
            progress(scores.size * (1 if row == column else 2))
    index, score = np.empty((count, k), np.int32), np.empty((count, k))

    in_threads(lambda a, b: nearest.settle(*buffers[:4], *rest, a, index[a:b], score[a:b]), count)
    return Neighbours(index, score, buffers[4])
