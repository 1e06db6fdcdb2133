"""Metrics broken down by the query's and the gallery's camera."""

from __future__ import annotations

import numpy as np

from reid_train.evaluation.matches import Labels
from reid_train.evaluation.metrics import RankingResult, metrics_of
from reid_train.evaluation.ranking import ranks_within
from reid_train.evaluation.scoring import Metric


def rank_by_camera_pair(
    query: np.ndarray,
    gallery: np.ndarray,
    labels: Labels,
    *,
    metric: Metric = "cosine",
    max_rank: int = 50,
) -> dict[tuple[int, int], RankingResult]:
    """Metrics by (query camera, gallery camera): as if only those two cameras existed.

    The gallery is split among its cameras, so all pairs together cost one ranking.

    Args:
        query, gallery: (Q, D), (G, D) float32.
        labels: identities and cameras.

    Returns:
        Pairs of different cameras for which some query has a match, in ascending order.
    """
    found = {}
    for seen_by in np.unique(labels.gallery_camid):
        there = np.flatnonzero(labels.gallery_camid == seen_by)
        part = Labels(
            labels.query_pid, labels.query_camid, labels.gallery_pid[there],
            labels.gallery_camid[there],
        )  # fmt: skip
        if not np.isin(labels.query_pid[labels.query_camid != seen_by], part.gallery_pid).any():
            continue
        start, ranks = ranks_within(query, gallery[there], part, metric)
        for asked_by in np.unique(labels.query_camid):
            rows = np.flatnonzero(labels.query_camid == asked_by)
            counts = np.diff(start)[rows]
            if counts.sum():
                kept = np.concatenate([ranks[start[r] : start[r + 1]] for r in rows])
                ends = np.concatenate([[0], np.cumsum(counts)])
                found[int(asked_by), int(seen_by)] = metrics_of(ends, kept, max_rank)
    return dict(sorted(found.items()))
