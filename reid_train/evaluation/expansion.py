"""Query expansion and database augmentation: embeddings replaced by means with their nearest."""

from __future__ import annotations

import numpy as np

from data_shards.errors import ConfigError
from reid_train.evaluation.kernels.rank_counts import COSINE
from reid_train.evaluation.neighbours import (
    Neighbours,
    all_pairs,
    nearest_neighbours,
    query_gallery_pairs,
)
from reid_train.evaluation.reranking import joined
from reid_train.evaluation.similarity import Side, checked_side

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
    check_expansion(k, alpha, len(gallery))
    tiles = query_gallery_pairs(len(query), len(side.norm))
    found = nearest_neighbours(side, k, COSINE, tiles)
    nearest = found.rows(0, len(query))
    return mean_with_nearest(side, nearest, alpha, with_self=True)


def augment_gallery(gallery: np.ndarray, *, k: int = 10, alpha: float = 3.0) -> np.ndarray:
    """Database augmentation: every item becomes a mean with its k nearest, weighted as above.

    Args:
        gallery: (G, D) float32 of any length.
        k: items averaged over, the item itself included, at most G.

    Returns:
        (G, D) float32, of length 1.
    """
    side = checked_side("gallery", gallery)
    check_expansion(k, alpha, len(gallery))
    found = nearest_neighbours(side, k, COSINE, all_pairs(len(gallery)))
    return mean_with_nearest(side, found, alpha, with_self=False)


def check_expansion(k: int, alpha: float, gallery: int | None = None) -> None:
    """Raise `ConfigError` where k and α make no sense (for so many gallery items, if known)."""
    if k < 1 or (gallery is not None and k > gallery):
        most = "" if gallery is None else f" ≤ {gallery}"
        raise ConfigError(f"expansion takes 1 ≤ k{most} gallery items, not {k}")
    if alpha < 0:
        raise ConfigError(f"expansion takes α ≥ 0, not {alpha}")


def mean_with_nearest(
    side: Side, nearest: Neighbours, alpha: float, *, with_self: bool, first: int = 0
) -> np.ndarray:
    """Normalised sums of normalised embeddings, each weighted by its similarity.

    Args:
        side: all N embeddings.
        nearest: of some consecutive items, n of them.
        first: number of the first of these.

    Returns:
        (n, D) float32.
    """
    similarity = np.clip(-nearest.score, 0, None)
    weights = np.where(similarity > 0, similarity**alpha, 0) * side.scale[nearest.index]
    weights = weights.astype(np.float32)[:, None]
    out = np.empty((len(weights), side.embedding.shape[1]), np.float32)
    for done in range(0, len(out), _ROWS):
        rows = slice(done, min(done + _ROWS, len(out)))
        total = (weights[rows] @ side.embedding[nearest.index[rows]])[:, 0]
        if with_self:
            own = slice(first + rows.start, first + rows.stop)
            total += side.embedding[own] * side.scale[own, None].astype(np.float32)
        out[rows] = total * Side.of(total).scale[:, None]
    return out
