"""Verification: how many true pairs are accepted when few false ones are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from reid_train.evaluation import counting
from reid_train.evaluation.matches import Matches
from reid_train.evaluation.scoring import (
    Metric,
    Side,
    full_precision,
    metric_code,
    query_operand,
    quick_scores,
)

BINS = 1 << 18
_BLOCK = 8192


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
    code = metric_code(metric)
    # The Euclidean score lacks ‖q‖², so distances to different queries need it back.
    lowest, span = -1.0, 2.0
    if code == counting.EUCLIDEAN:
        lowest, span = 0.0, float((query.norm.max() + gallery.norm.max()) ** 2) or 1.0
    cpu = torch.device("cpu")
    left = query_operand(query, code, cpu)
    genuine = np.zeros(BINS, np.int64)
    impostor = np.zeros(BINS, np.int64)
    row = matches.row
    buffer = torch.empty(chunk * _BLOCK)
    with full_precision():
        for first in range(0, len(gallery.embedding), _BLOCK):
            stretch = slice(first, first + _BLOCK)
            block = Side(gallery.embedding[stretch], gallery.scale[stretch], gallery.norm[stretch])
            right = block.operand(code, 1.0, cpu)
            square = None
            if code == counting.EUCLIDEAN:
                square = torch.from_numpy(block.norm**2).float()
            for q in range(0, len(left), chunk):
                scores = quick_scores(left[q : q + chunk], right, square, buffer).numpy()
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
    accepted, total = np.cumsum(impostor), impostor.sum()
    found = np.concatenate([[0], np.cumsum(genuine)])
    # The last bin up to which no more than the rate's share of false pairs is accepted.
    last = np.searchsorted(accepted, np.asarray(rates) * total, side="right")
    return {rate: float(found[bin] / found[-1]) for rate, bin in zip(rates, last, strict=True)}
