"""Query expansion and database augmentation: replace embeddings by means with their nearest."""

import numpy as np

from reid_train.evaluation.neighbours import Neighbours
from reid_train.evaluation.similarity import Features
from reid_train.evaluation.tasks import Joined, ranges

_ROWS = 1024  # their neighbours' embeddings are gathered at a time


def averaged(
    source: Joined, query_near: Neighbours | None, gallery_near: Neighbours | None, alpha: float
) -> Joined:
    """Queries, gallery or both, replaced by means with their nearest; None keeps them.

    α query expansion (Radenović et al., TPAMI 2019) adds the nearest gallery images to each query.
    Database augmentation makes every gallery image a mean of its nearest, itself included. An image
    weighs its cosine similarity to the power α, and nothing if that is 0 or less. Means have
    length 1.
    """
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
