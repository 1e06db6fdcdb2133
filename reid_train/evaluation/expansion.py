"""Query expansion and database augmentation: replace embeddings by means with their nearest."""

import numpy as np

from reid_train.evaluation import neighbours
from reid_train.evaluation.measures import COSINE, check_expansion
from reid_train.evaluation.neighbours import Neighbours
from reid_train.evaluation.similarity import Features, check_features, check_inputs
from reid_train.evaluation.tasks import Joined, ranges

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
    blocks = neighbours.query_gallery_pairs(len(query), len(both))
    nearest = neighbours.nearest_neighbours(both, k, COSINE, blocks)
    return _means(both, range(len(query)), nearest, alpha, with_self=True)


def augment_gallery(gallery: np.ndarray, *, k: int = 10, alpha: float = 3.0) -> np.ndarray:
    """Database augmentation: every image becomes a mean with its k nearest, weighted as above.

    Args:
        gallery: (G, D) float32 of any length.
        k: images averaged over, the image itself included, at most G.

    Returns:
        (G, D) float32, of length 1.
    """
    features = check_features("gallery", gallery)
    check_expansion(k, alpha, count := len(features))
    nearest = neighbours.nearest_neighbours(features, k, COSINE, neighbours.all_pairs(count))
    return _means(features, range(count), nearest, alpha, with_self=False)


def averaged(
    source: Joined, query_near: Neighbours | None, gallery_near: Neighbours | None, alpha: float
) -> Joined:
    """Queries, gallery or both, replaced by means with their nearest; None keeps them."""
    both, queries = source.both, source.queries
    out = both.embedding.copy()
    if query_near is not None:
        out[:queries] = _means(both, range(queries), query_near, alpha, with_self=True)
    if gallery_near is not None:
        images = range(queries, len(both))
        out[queries:] = _means(both, images, gallery_near, alpha, with_self=False)
    return Joined(Features.of(out), queries)


def _means(
    features: Features, images: range, nearest: Neighbours, alpha: float, *, with_self: bool
) -> np.ndarray:
    """Normalised sums of normalised embeddings, each weighted by its similarity: (n, D) float32.

    Args:
        features: all N embeddings.
        images: which to replace.
        nearest: of all N images.
        with_self: add the image itself with a weight of 1.
    """
    parts = []
    for part in ranges(images.stop, _ROWS, images.start):
        rows = slice(part.start, part.stop)
        index, near = nearest.index[rows], np.clip(-nearest.score[rows], 0, None)
        weights = np.where(near > 0, near**alpha, 0) * features.scale[index]
        total = (weights.astype(np.float32)[:, None] @ features.embedding[index])[:, 0]
        if with_self:
            total += features.embedding[rows] * features.scale[rows, None].astype(np.float32)
        parts.append((total * Features.of(total).scale[:, None]).astype(np.float32))
    return np.concatenate(parts)
