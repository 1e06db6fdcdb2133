"""Query expansion and database augmentation: replace embeddings by means with their nearest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reid_train.evaluation.kernels.rank_counts import COSINE
from reid_train.evaluation.measures import check_expansion
from reid_train.evaluation.neighbours import (
    Block,
    Neighbours,
    all_pairs,
    nearest_neighbours,
    query_gallery_pairs,
)
from reid_train.evaluation.similarity import Features, check_features, check_inputs
from reid_train.evaluation.tasks import Count, Joined

_ROWS = 1024  # their neighbours' embeddings are gathered at a time


def expand_queries(
    query: np.ndarray, gallery: np.ndarray, *, k: int = 10, alpha: float = 3.0
) -> np.ndarray:
    """α query expansion (Radenović et al., TPAMI 2019).

    Args:
        query, gallery: (Q, D), (G, D) float32 of any length.
        k: gallery images that join each query, at most G.
        alpha: the weight of an image is its cosine similarity to the power α; images with a
            similarity of 0 or less weigh nothing.

    Returns:
        (Q, D) float32, of length 1.
    """
    both = Features.joined(*check_inputs(query, gallery))
    check_expansion(k, alpha, len(gallery))
    blocks = query_gallery_pairs(len(query), len(both))
    nearest = nearest_neighbours(both, k, COSINE, blocks).rows(0, len(query))
    return _mean_with_nearest(both, nearest, alpha, with_self=True)


def augment_gallery(gallery: np.ndarray, *, k: int = 10, alpha: float = 3.0) -> np.ndarray:
    """Database augmentation: every image becomes a mean with its k nearest, weighted as above.

    Args:
        gallery: (G, D) float32 of any length.
        k: images averaged over, the image itself included, at most G.

    Returns:
        (G, D) float32, of length 1.
    """
    features = check_features("gallery", gallery)
    check_expansion(k, alpha, len(features))
    nearest = nearest_neighbours(features, k, COSINE, all_pairs(len(features)))
    return _mean_with_nearest(features, nearest, alpha, with_self=False)


def gallery_neighbours(
    source: Joined, k: int, metric: int, own: Sequence[Block], pairs: Count
) -> Neighbours:
    """The nearest of the gallery within the gallery, as far as a task's blocks tell."""
    return nearest_neighbours(source.gallery, k, metric, own, pairs)


def averaged(
    source: Joined, query_near: Neighbours | None, gallery_near: Neighbours | None, alpha: float
) -> Joined:
    """Queries, gallery or both, replaced by means with their nearest; None keeps them."""
    query, gallery = source.query.embedding, source.gallery.embedding
    if query_near is not None:
        query = _mean_with_nearest(source.both, query_near, alpha, with_self=True)
    if gallery_near is not None:
        gallery = _mean_with_nearest(source.gallery, gallery_near, alpha, with_self=False)
    return Joined(Features.of(np.concatenate([query, gallery])), source.queries)


def _mean_with_nearest(
    features: Features, nearest: Neighbours, alpha: float, *, with_self: bool
) -> np.ndarray:
    """Normalised sums of normalised embeddings, each weighted by its similarity.

    Args:
        features: all N embeddings.
        nearest: of the first n images.
        with_self: add the image itself with a weight of 1.

    Returns:
        (n, D) float32.
    """
    similarity = np.clip(-nearest.score, 0, None)
    weights = np.where(similarity > 0, similarity**alpha, 0) * features.scale[nearest.index]
    weights = weights.astype(np.float32)[:, None]
    out = np.empty((len(weights), features.embedding.shape[1]), np.float32)
    for first in range(0, len(out), _ROWS):
        rows = slice(first, first + _ROWS)
        total = (weights[rows] @ features.embedding[nearest.index[rows]])[:, 0]
        if with_self:
            own = features.rows(first, first + len(total))
            total += own.embedding * own.scale[:, None].astype(np.float32)
        out[rows] = total * Features.of(total).scale[:, None]
    return out
