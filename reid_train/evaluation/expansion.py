"""Query expansion and database augmentation: embeddings replaced by means with their nearest."""

from __future__ import annotations

import numpy as np

from data_shards.errors import ConfigError
from reid_train.evaluation.counting import COSINE
from reid_train.evaluation.neighbours import (
    Neighbours,
    all_pairs,
    nearest_neighbours,
    query_gallery_pairs,
)
from reid_train.evaluation.reranking import joined
from reid_train.evaluation.scoring import Side, check_embeddings

_ROWS = 1024  # whose neighbours' embeddings are gathered at a time


def expand_queries(
    query: np.ndarray, gallery: np.ndarray, *, k: int = 10, alpha: float = 3.0
) -> np.ndarray:
    """α query expansion (Radenović et al., TPAMI 2019).

    Args:
        query, gallery: (Q, D), (G, D) float32 of any length.
        k: gallery items that join each query, at most G.
        alpha: the weight of an item is its cosine similarity to the power α; items that are no
            more similar than orthogonal ones weigh nothing.

    Returns:
        (Q, D) float32, of length 1.
    """
    side = joined(query, gallery)
    _check(k, alpha, len(gallery), "gallery items")
    tiles = query_gallery_pairs(len(query), len(side.norm))
    found = nearest_neighbours(side, k, COSINE, tiles)
    nearest = Neighbours(found.index[: len(query)], found.score[: len(query)], found.furthest)
    return _mean(side, nearest, alpha, with_self=True)


def augment_gallery(gallery: np.ndarray, *, k: int = 10, alpha: float = 3.0) -> np.ndarray:
    """Database augmentation: every item becomes a mean with its k nearest, weighted as above.

    Args:
        gallery: (G, D) float32 of any length.
        k: items averaged over, the item itself included, at most G.

    Returns:
        (G, D) float32, of length 1.
    """
    side = Side.of(check_embeddings("gallery", gallery))
    _check(k, alpha, len(gallery), "gallery items")
    found = nearest_neighbours(side, k, COSINE, all_pairs(len(gallery)))
    return _mean(side, found, alpha, with_self=False)


def _check(k: int, alpha: float, count: int, what: str) -> None:
    if not 1 <= k <= count:
        raise ConfigError(f"expansion takes 1 ≤ k ≤ {count} {what}, not {k}")
    if alpha < 0:
        raise ConfigError(f"expansion takes α ≥ 0, not {alpha}")


def _mean(side: Side, nearest: Neighbours, alpha: float, *, with_self: bool) -> np.ndarray:
    """Normalised sums of normalised embeddings, each weighted by its similarity."""
    similarity = np.clip(-nearest.score, 0, None)
    weights = np.where(similarity > 0, similarity**alpha, 0) * side.scale[nearest.index]
    weights = weights.astype(np.float32)[:, None]
    out = np.empty((len(weights), side.embedding.shape[1]), np.float32)
    for first in range(0, len(out), _ROWS):
        rows = slice(first, min(first + _ROWS, len(out)))
        total = (weights[rows] @ side.embedding[nearest.index[rows]])[:, 0]
        if with_self:
            total += side.embedding[rows] * side.scale[rows, None].astype(np.float32)
        out[rows] = total * Side.of(total).scale[:, None]
    return out
