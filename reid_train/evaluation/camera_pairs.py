"""Metrics by the query's and the gallery's camera, as if only those two cameras existed.

The gallery is split among its cameras, so all pairs together cost one ranking.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from reid_train.evaluation.ground_truth import GroundTruth, Labels, find_ground_truth
from reid_train.evaluation.measures import Metric
from reid_train.evaluation.metrics import RankingResult, metrics_of
from reid_train.evaluation.ranking import BLOCK, count_in_blocks, ranks_of
from reid_train.evaluation.similarity import Features
from reid_train.evaluation.tasks import Count, Range, Source, gallery_blocks


def count_by_camera(
    source: Source,
    labels: Labels,
    truth: GroundTruth,
    metric: Metric,
    scores: np.ndarray,
    own: Sequence[Range],
    count: Count,
) -> list[np.ndarray]:
    """How many images of one camera, in a task's ranges, come before that camera's positives.

    Args:
        scores: (M,) exact scores of `truth`.

    Returns:
        (P,) int64 for each gallery camera that has a match.
    """
    # Held in memory: every camera needs a part of each block.
    blocks, counts = list(gallery_blocks(source, own, BLOCK)), []
    for camera, images, part in _cameras(labels):
        known = scores[labels.gallery_camid[truth.index] == camera]
        seen = _of_camera(blocks, labels.gallery_camid == camera, images)
        counts.append(count_in_blocks(source.query, seen, find_ground_truth(part), known, metric))
    count(own[-1][1] - own[0][0])
    return counts


def metrics_by_cameras(
    labels: Labels, counts: Sequence[np.ndarray], max_rank: int
) -> dict[tuple[int, int], RankingResult]:
    """Metrics by (query camera, gallery camera), for different ones of which a query has a match.

    Args:
        counts: those of `count_by_camera`, of the whole gallery.
    """
    found = {}
    for (camera, _, part), before in zip(_cameras(labels), counts, strict=True):
        truth = find_ground_truth(part)
        start, ranks = truth.positives(), ranks_of(truth, before)
        for asked in np.unique(labels.query_camid):
            rows = np.flatnonzero(labels.query_camid == asked)
            lengths = np.diff(start)[rows]
            if lengths.sum():
                kept = np.concatenate([ranks[start[r] : start[r + 1]] for r in rows])
                ends = np.concatenate([[0], np.cumsum(lengths)])
                found[int(asked), camera] = metrics_of(ends, kept, max_rank)
    return dict(sorted(found.items()))


def _cameras(labels: Labels) -> Iterator[tuple[int, np.ndarray, Labels]]:
    """Each gallery camera with a match: its id, its images (n,) int64, labels with only those."""
    for camera in np.unique(labels.gallery_camid):
        images = np.flatnonzero(labels.gallery_camid == camera)
        pid, camid = labels.gallery_pid[images], labels.gallery_camid[images]
        if np.isin(labels.query_pid[labels.query_camid != camera], pid).any():
            yield int(camera), images, Labels(labels.query_pid, labels.query_camid, pid, camid)


def _of_camera(
    blocks: Sequence[tuple[int, Features]], seen: np.ndarray, images: np.ndarray
) -> Iterator[tuple[int, Features]]:
    """One camera's images of each block, and the number of the first among that camera's."""
    for first, block in blocks:
        inside = seen[first : first + len(block)]
        if inside.any():
            yield int(np.searchsorted(images, first)), block.only(inside)
