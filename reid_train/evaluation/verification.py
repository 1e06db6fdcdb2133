"""Verification: how many true pairs are accepted when few false ones are."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from reid_train.evaluation import similarity
from reid_train.evaluation.ground_truth import GroundTruth
from reid_train.evaluation.kernels.rank_counts import histogram
from reid_train.evaluation.measures import EUCLIDEAN
from reid_train.evaluation.tasks import Count, Source, gallery_blocks, ranges

BINS = 1 << 18
BLOCK = 8192  # gallery images in a product; fixed, so that each task computes the same scores
CHUNK = 512  # queries in a product


def count_distances(
    source: Source,
    truth: GroundTruth,
    metric: int,
    longest: float,
    own: Sequence[range],
    images: Count,
) -> np.ndarray:
    """How many true and false pairs lie in each bin of distance: (2, BINS) int64.

    `longest` is the greatest norm in the whole gallery, whose ranges have BLOCK images.
    """
    lowest, span = -1.0, 2.0
    if metric == EUCLIDEAN:
        lowest, span = 0.0, float((source.query.norm.max() + longest) ** 2) or 1.0
    genuine, impostor = found = np.zeros((2, BINS), np.int64)
    for scored in scored_pairs(source, truth, metric, own, images):
        histogram(scored.genuine, lowest, span, genuine)
        histogram(scored.impostor.reshape(-1), lowest, span, impostor)
    return found


class ScoredPairs(NamedTuple):
    """Scores of a block of queries with a block of the gallery."""

    query: int  # the first of the block
    gallery: int
    impostor: np.ndarray  # (B, W) float32; ∞ for pairs of one identity
    genuine: np.ndarray  # (n,) float32
    genuine_query: np.ndarray  # (n,) int64, the query of each


def scored_pairs(
    source: Source, truth: GroundTruth, metric: int, own: Sequence[range], images: Count
) -> Iterator[ScoredPairs]:
    """Yield the scores of all queries with consecutive gallery ranges, which have BLOCK images."""
    query, row = source.query, truth.row
    chunks = [(q.start, query[q.start : q.stop]) for q in ranges(len(query), CHUNK)]
    with similarity.full_precision():
        lefts = [similarity.left_operand(part, metric) for _, part in chunks]
        for first, block in gallery_blocks(source, own, BLOCK):
            right = similarity.right_operand(block, metric)
            known = truth.within(first, len(block))
            for (q, part), left in zip(chunks, lefts, strict=True):
                scores = similarity.quick_scores(left, right, block, metric).numpy()
                if metric == EUCLIDEAN:  # distances of different queries need ‖q‖²
                    scores += np.float32(part.norm[:, None] ** 2)
                here = known[slice(*np.searchsorted(row[known], [q, q + len(part)]))]
                rows, columns = row[here] - q, truth.index[here] - first
                positive = truth.positive[here]
                genuine = scores[rows[positive], columns[positive]]
                scores[rows, columns] = np.inf
                yield ScoredPairs(q, first, scores, genuine, rows[positive] + q)
            images(len(block))


def rates_of(counts: np.ndarray, rates: Sequence[float]) -> dict[float, float]:
    """True accept rate by false accept rate, from `count_distances` of all pairs but junk.

    A pair is accepted below a distance. Distances are told apart to 1 / 262,144 of their range,
    and a bin is accepted as a whole or not at all, so a false accept rate is never exceeded.
    """
    genuine, impostor = counts
    accepted, total = np.cumsum(impostor), impostor.sum()
    found = np.concatenate([[0], np.cumsum(genuine)])
    # The last bin up to which no more than the rate's share of false pairs is accepted.
    last = np.searchsorted(accepted, np.asarray(rates) * total, side="right")
    return {rate: float(found[bin] / found[-1]) for rate, bin in zip(rates, last, strict=True)}
