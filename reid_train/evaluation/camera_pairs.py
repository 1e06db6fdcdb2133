"""Metrics by the query's and the gallery's camera, as if only those two cameras existed.

The gallery is split among its cameras, so all pairs together cost one ranking.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from reid_train.evaluation.ground_truth import GroundTruth, Labels, find_ground_truth
from reid_train.evaluation.metrics import RankingResult, metrics_of
from reid_train.evaluation.ranking import BLOCK, Blocks, count_before
from reid_train.evaluation.tasks import Count, Source, gallery_blocks, ignore


def count_by_camera(
    source: Source,
    labels: Labels,
    truth: GroundTruth,
    metric: int,
    scores: np.ndarray,
    own: Sequence[range],
    count: Count,
) -> list[np.ndarray]:
    """`count_before` of the positives of each gallery camera that has a match, in its images."""
    # Held in memory: every camera needs a part of each block.
    blocks, counts = list(gallery_blocks(source, own, BLOCK)), []
    for camera, images, part in _cameras(labels):
        known = scores[labels.gallery_camid[truth.index] == camera]
        given = source, find_ground_truth(part), metric, known, own, ignore
        counts.append(count_before(*given, blocks=_of_camera(blocks, images)))
    count(own[-1].stop - own[0].start)
    return counts


def metrics_by_cameras(
    labels: Labels, counts: Sequence[np.ndarray], max_rank: int
) -> dict[tuple[int, int], RankingResult]:
    """Metrics by (query camera, gallery camera), for pairs with a query that has a match."""
    found = {}
    for (camera, _, part), before in zip(_cameras(labels), counts, strict=True):
        lengths = np.diff(find_ground_truth(part).positives())
        for asked in np.unique(labels.query_camid):
            rows = labels.query_camid == asked
            start = np.concatenate([[0], np.cumsum(lengths[rows])])
            if start[-1]:
                kept = before[np.repeat(rows, lengths)]
                found[int(asked), camera] = metrics_of(start, kept, max_rank)
    return dict(sorted(found.items()))


def _cameras(labels: Labels) -> Iterator[tuple[int, np.ndarray, Labels]]:
    """Each gallery camera with a match: its id, its images (n,) int64, labels with only those."""
    for camera in np.unique(labels.gallery_camid):
        images = np.flatnonzero(labels.gallery_camid == camera)
        pid, camid = labels.gallery_pid[images], labels.gallery_camid[images]
        if np.isin(labels.query_pid[labels.query_camid != camera], pid).any():
            yield int(camera), images, Labels(labels.query_pid, labels.query_camid, pid, camid)


def _of_camera(blocks: Blocks, images: np.ndarray) -> Blocks:
    """A camera's images (n,) of each block, and the number of the first among that camera's."""
    for first, block in blocks:
        start, stop = np.searchsorted(images, [first, first + len(block)])
        if start < stop:
            yield int(start), block[images[start:stop] - first]
