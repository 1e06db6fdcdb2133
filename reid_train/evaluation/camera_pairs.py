"""Metrics broken down by the query's and the gallery's camera."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from reid_train.evaluation.ground_truth import Labels
from reid_train.evaluation.metrics import RankingResult, metrics_of
from reid_train.evaluation.ranking import ranks_within
from reid_train.evaluation.similarity import Metric


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
    for seen_by, there, part in split_by_camera(labels):
        start, ranks = ranks_within(query, gallery[there], part, metric)
        found |= by_query_camera(seen_by, part, start, ranks, max_rank)
    return dict(sorted(found.items()))


def split_by_camera(labels: Labels) -> Iterator[tuple[int, np.ndarray, Labels]]:
    """Each gallery camera that has a match: its number, its items (n,) int64, labels with those."""
    for seen_by in np.unique(labels.gallery_camid):
        there = np.flatnonzero(labels.gallery_camid == seen_by)
        pid, camid = labels.gallery_pid[there], labels.gallery_camid[there]
        if np.isin(labels.query_pid[labels.query_camid != seen_by], pid).any():
            yield int(seen_by), there, Labels(labels.query_pid, labels.query_camid, pid, camid)


def by_query_camera(
    seen_by: int, labels: Labels, start: np.ndarray, ranks: np.ndarray, max_rank: int
) -> dict[tuple[int, int], RankingResult]:
    """Ranks within one camera's gallery, as `ranks_within` gives them, by the query's camera."""
    found = {}
    for asked_by in np.unique(labels.query_camid):
        rows = np.flatnonzero(labels.query_camid == asked_by)
        counts = np.diff(start)[rows]
        if counts.sum():
            kept = np.concatenate([ranks[start[r] : start[r + 1]] for r in rows])
            ends = np.concatenate([[0], np.cumsum(counts)])
            found[int(asked_by), seen_by] = metrics_of(ends, kept, max_rank)
    return found
