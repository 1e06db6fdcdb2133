"""Verification: how many true pairs are accepted when few false ones are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from reid_train.evaluation.ground_truth import Matches
from reid_train.evaluation.kernels import rank_counts as counting
from reid_train.evaluation.similarity import (
    Metric,
    Side,
    full_precision,
    left_operand,
    metric_code,
    quick_scores,
    right_operand,
)

BINS = 1 << 18
STRETCH = 8192
"""Gallery items of a product. Fixed, so that a pair's score is the same whoever computes it."""


def tar_at_far(
    query: Side,
    gallery: Side,
    matches: Matches,
    metric: Metric,
    rates: Sequence[float],
    chunk: int = 512,
) -> dict[float, float]:
    """True accept rate at given false accept rates, over all pairs but junk.

    A pair is accepted below a distance. Distances are told apart to 1 / 262,144 of their range,
    and a bin is accepted whole or not at all, so a false accept rate is never exceeded.
    """
    starts = range(0, len(gallery.norm), STRETCH)
    blocks = ((first, gallery.rows(first, first + STRETCH)) for first in starts)
    longest = float(gallery.norm.max())
    return rates_of(count_distances(query, blocks, matches, metric, longest, chunk), rates)


def count_distances(
    query: Side,
    blocks: Iterable[tuple[int, Side]],
    matches: Matches,
    metric: Metric,
    longest: float,
    chunk: int = 512,
) -> np.ndarray:
    """How many true and false pairs lie in each bin of distance: (2, BINS) int64.

    Args:
        blocks: whole stretches of the gallery of STRETCH items (the last one of what is left).
        longest: the greatest norm in the whole gallery.
    """
    code = metric_code(metric)
    # The Euclidean score lacks ‖q‖², so distances to different queries need it back.
    lowest, span = -1.0, 2.0
    if code == counting.EUCLIDEAN:
        lowest, span = 0.0, float((query.norm.max() + longest) ** 2) or 1.0
    cpu = torch.device("cpu")
    genuine, impostor = found = np.zeros((2, BINS), np.int64)
    row = matches.row
    starts = range(0, len(query.norm), chunk)
    with full_precision():
        lefts = [left_operand(query.rows(q, q + chunk), code, cpu) for q in starts]
        for first, block in blocks:
            right = right_operand(block, code, cpu)
            for q, left in zip(starts, lefts, strict=True):
                scores = quick_scores(left, right, block, code).numpy()
                if code == counting.EUCLIDEAN:
                    scores += np.float32(query.norm[q : q + chunk, None] ** 2)
                own = slice(matches.start[q], matches.start[q + len(scores)])
                inside = (matches.index[own] >= first) & (
                    matches.index[own] < first + scores.shape[1]
                )
                rows, columns = row[own][inside] - q, matches.index[own][inside] - first
                positive = matches.positive[own][inside]
                counting.histogram(scores[rows[positive], columns[positive]], lowest, span, genuine)
                scores[rows, columns] = np.inf
                counting.histogram(scores.reshape(-1), lowest, span, impostor)
    return found


def rates_of(counts: np.ndarray, rates: Sequence[float]) -> dict[float, float]:
    """True accept rate by false accept rate, of what `count_distances` gives for all pairs."""
    genuine, impostor = counts
    accepted, total = np.cumsum(impostor), impostor.sum()
    found = np.concatenate([[0], np.cumsum(genuine)])
    # The last bin up to which no more than the rate's share of false pairs is accepted.
    last = np.searchsorted(accepted, np.asarray(rates) * total, side="right")
    return {rate: float(found[bin] / found[-1]) for rate, bin in zip(rates, last, strict=True)}
