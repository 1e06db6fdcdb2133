"""Verification: how many true pairs are accepted when few false ones are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from reid_train.evaluation.ground_truth import GroundTruth
from reid_train.evaluation.kernels.rank_counts import EUCLIDEAN, histogram
from reid_train.evaluation.measures import Metric
from reid_train.evaluation.similarity import (
    full_precision,
    left_operand,
    metric_code,
    quick_scores,
    right_operand,
)
from reid_train.evaluation.tasks import Count, Range, Source, gallery_blocks

BINS = 1 << 18
BLOCK = 8192
"""Gallery images in a product. Fixed, so that a pair's score is the same in every task."""
CHUNK = 512  # queries in a product


def count_distances(
    source: Source,
    truth: GroundTruth,
    metric: Metric,
    longest: float,
    own: Sequence[Range],
    images: Count,
) -> np.ndarray:
    """How many true and false pairs lie in each bin of distance: (2, BINS) int64.

    Args:
        source: queries and gallery.
        longest: the greatest norm in the whole gallery.
        own: some of the gallery's ranges of BLOCK images.
        images: called with each block's images.
    """
    code, query = metric_code(metric), source.query
    # The Euclidean score lacks ‖q‖², which distances of different queries need.
    lowest, span = -1.0, 2.0
    if code == EUCLIDEAN:
        lowest, span = 0.0, float((query.norm.max() + longest) ** 2) or 1.0
    cpu, row = torch.device("cpu"), truth.row
    genuine, impostor = found = np.zeros((2, BINS), np.int64)
    starts = range(0, len(query), CHUNK)
    with full_precision():
        lefts = [left_operand(query.rows(q, q + CHUNK), code, cpu) for q in starts]
        for first, block in gallery_blocks(source, own, BLOCK):
            right = right_operand(block, code, cpu)
            for q, left in zip(starts, lefts, strict=True):
                scores = quick_scores(left, right, block, code).numpy()
                if code == EUCLIDEAN:
                    scores += np.float32(query.norm[q : q + CHUNK, None] ** 2)
                known = np.arange(truth.start[q], truth.start[q + len(scores)])
                index = truth.index[known]
                known = known[(index >= first) & (index < first + len(block))]
                rows, columns = row[known] - q, truth.index[known] - first
                positive = truth.positive[known]
                histogram(scores[rows[positive], columns[positive]], lowest, span, genuine)
                scores[rows, columns] = np.inf
                histogram(scores.reshape(-1), lowest, span, impostor)
            images(len(block))
    return found


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
