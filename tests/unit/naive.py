"""Dense, sorting references for ranking and re-ranking, in float64: slow and plain."""

from __future__ import annotations

import numpy as np


def dense_scores(query: np.ndarray, gallery: np.ndarray, metric: str) -> np.ndarray:
    """(Q, G) float64; smaller is closer."""
    q, g = query.astype(np.float64), gallery.astype(np.float64)
    if metric == "euclidean":
        return (q**2).sum(1)[:, None] + (g**2).sum(1)[None] - 2 * q @ g.T
    length = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(g, axis=1)[None]
    return -np.divide(q @ g.T, length, out=np.zeros_like(length), where=length > 0)


def sorted_metrics(distance: np.ndarray, labels, max_rank: int) -> dict[str, np.ndarray]:
    """Per-query metrics and CMC by a stable sort of the whole gallery."""
    precision, penalty = np.full((2, len(distance)), np.nan)
    first = np.zeros(len(distance), int)
    for i, row in enumerate(distance):
        order = np.argsort(row, kind="stable")
        same = labels.gallery_pid[order] == labels.query_pid[i]
        junk = same & (labels.gallery_camid[order] == labels.query_camid[i])
        rank = np.flatnonzero(same[~junk]) + 1
        if len(rank):
            precision[i] = np.mean(np.arange(1, len(rank) + 1) / rank)
            penalty[i] = len(rank) / rank[-1]
            first[i] = rank[0]
    found = first[first > 0]
    cmc = np.array([np.mean(found <= r) for r in range(1, max_rank + 1)])
    return {"cmc": cmc, "precision": precision, "penalty": penalty, "first": first}


def dense_reranking(query, gallery, metric: str, k1: int, k2: int, weight: float) -> np.ndarray:
    """k-reciprocal encoding with N × N matrices, as the paper writes it."""
    both = np.concatenate([query, gallery])
    count, queries = len(both), len(query)
    scores = dense_scores(both, both, metric)
    original = (1 + scores) ** 2 if metric == "cosine" else scores
    furthest = original.max(axis=1, keepdims=True)
    original = original / np.where(furthest > 0, furthest, 1)
    order = np.argsort(scores, axis=1, kind="stable")

    def reciprocal(i: int, k: int) -> np.ndarray:
        forward = order[i, : k + 1]
        return forward[(order[forward, : k + 1] == i).any(axis=1)]

    weights = np.zeros((count, count))
    for i in range(count):
        near = reciprocal(i, k1)
        expanded = near
        for candidate in near:
            also = reciprocal(candidate, int(np.around(k1 / 2)))
            if 3 * len(np.intersect1d(also, near)) > 2 * len(also):
                expanded = np.append(expanded, also)
        expanded = np.unique(expanded)
        weights[i, expanded] = np.exp(-original[i, expanded])
        weights[i] /= max(weights[i].sum(), 1e-300)
    if k2 > 1:
        weights = np.stack([weights[order[i, :k2]].mean(axis=0) for i in range(count)])
    overlap = np.minimum(weights[:queries, None], weights[None, queries:]).sum(axis=2)
    jaccard = 1 - overlap / (2 - overlap)
    return jaccard * (1 - weight) + original[:queries, queries:] * weight
