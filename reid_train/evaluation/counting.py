"""The counting under `ranking`: compiled loops over one block of scores.

A block holds, for a few queries and a stretch of the gallery, approximate scores in float32 (a
matrix product's). Smaller is closer. An item further from a positive's score than the product
can be wrong is counted by comparing; the few others are scored again, in float64.
"""

from __future__ import annotations

import numpy as np
from numba import njit

COSINE, EUCLIDEAN, GIVEN = 0, 1, 2
_STRIP = 256  # gallery items compared at a time: 1 KB of scores, held in the L1 cache
_PART = 32  # of a strip, searched at a time for scores too close to call
_FEW = 64  # up to here, comparing a strip with every positive beats searching among them

# Sums may be reordered (that is what lets them use SIMD), always in the same way for one length.
_SUM = {"reassoc", "contract"}


@njit(nogil=True, cache=True, fastmath=_SUM)
def _dot(a: np.ndarray, b: np.ndarray) -> float:
    total = 0.0
    for i in range(a.shape[0]):
        total += np.float64(a[i]) * np.float64(b[i])
    return total


@njit(nogil=True, cache=True, fastmath=_SUM)
def _squared_distance(a: np.ndarray, b: np.ndarray) -> float:
    total = 0.0
    for i in range(a.shape[0]):
        difference = np.float64(a[i]) - np.float64(b[i])
        total += difference * difference
    return total


@njit(nogil=True, cache=True)
def norms(embedding, out):
    """‖x‖ of each row of (N, D) into `out` (N,) float64."""
    for i in range(embedding.shape[0]):
        out[i] = np.sqrt(_dot(embedding[i], embedding[i]))


@njit(nogil=True, cache=True)
def exact_score(metric: int, query: np.ndarray, item: np.ndarray, scale: float) -> float:
    """A pair's score in float64; `scale` is 1/‖query‖‖item‖ and only the cosine uses it."""
    if metric == COSINE:
        return -_dot(query, item) * scale
    return _squared_distance(query, item)


@njit(nogil=True, cache=True)
def score_pairs(metric, query, block, query_scale, block_scale, rows, columns, out):
    """Exact scores of listed (query row, block column) pairs into `out` (M,) float64."""
    for m in range(rows.shape[0]):
        q, g = rows[m], columns[m]
        out[m] = exact_score(metric, query[q], block[g], query_scale[q] * block_scale[g])


@njit(nogil=True, cache=True)
def _precedes(score, item, key, index):
    return score < key or (score == key and item < index)


@njit(nogil=True, cache=True, fastmath={"reassoc", "nsz"})
def _below_and_upto(scores, low, high):
    # Counted in float32, whose lanes are as wide as the scores': integers would be added as int64.
    below, upto, one, zero = np.float32(0), np.float32(0), np.float32(1), np.float32(0)
    for i in range(scores.shape[0]):
        score = scores[i]
        below += one if score < low else zero
        upto += one if score <= high else zero
    return np.int64(below), np.int64(upto)


@njit(nogil=True, cache=True, fastmath={"reassoc", "nnan", "nsz"})
def _least(scores):
    least = np.float32(np.inf)
    for i in range(scores.shape[0]):
        least = min(least, scores[i])
    return least


@njit(nogil=True, cache=True)
def _score_once(g, known, row, metric, query, block, query_scale, block_scale):
    """Exact score of a row's item `g` of this strip, remembered in `known` (NaN until then)."""
    i = g % _STRIP
    if np.isnan(known[i]):
        if metric == GIVEN:
            known[i] = row[g]
        else:
            known[i] = exact_score(metric, query, block[g], query_scale * block_scale[g])
    return known[i]


@njit(nogil=True, cache=True)
def count_block(
    scores, first, start, key, index, low, high,
    metric, query, block, query_scale, block_scale, below,
):  # fmt: skip
    """Add to `below` how many of a block's gallery items come before each positive.

    Args:
        scores: (B, W) float32, infinite for items of the query's own identity.
        first: gallery index of the block's first column.
        start: (B + 1,) where each row's positives begin in the arrays that follow.
        key, index: (P,) the positives' exact scores, ascending per row, and gallery indices.
        low, high: (P,) float32; scores below `low` are surely closer, above `high` surely not.
        metric, query, block, query_scale, block_scale: what `exact_score` needs.
        below: (P,) int64, added to.
    """
    known = np.empty(_STRIP)
    arrivals = np.zeros(np.diff(start).max() + 1, np.int64)
    for q in range(scores.shape[0]):
        row = scores[q]
        a, b = start[q], start[q + 1]
        if a == b:
            continue
        few = b - a <= _FEW
        arrivals[:] = 0  # at j: items surely before all positives from the j-th on
        for left in range(0, row.shape[0], _STRIP):
            right = min(left + _STRIP, row.shape[0])
            known[:] = np.nan
            if few:
                least = _least(row[left:right])
                for j in range(b - 1, a - 1, -1):
                    if least > high[j]:  # and of all closer positives, too
                        break
                    before, upto = _below_and_upto(row[left:right], low[j], high[j])
                    below[j] += before
                    if before == upto:
                        continue
                    for part in range(left, right, _PART):
                        stop = min(part + _PART, right)
                        before, upto = _below_and_upto(row[part:stop], low[j], high[j])
                        if before == upto:
                            continue
                        for g in range(part, stop):
                            if low[j] <= row[g] <= high[j]:
                                score = _score_once(
                                    g, known, row, metric, query[q], block, query_scale[q],
                                    block_scale,
                                )  # fmt: skip
                                below[j] += _precedes(score, first + g, key[j], index[j])
                continue
            for g in range(left, right):
                if row[g] > high[b - 1]:
                    continue
                certain = a + np.searchsorted(low[a:b], row[g], side="right")
                arrivals[certain - a] += 1
                for j in range(certain - 1, a - 1, -1):
                    if high[j] < row[g]:
                        break
                    score = _score_once(
                        g, known, row, metric, query[q], block, query_scale[q], block_scale
                    )
                    below[j] += _precedes(score, first + g, key[j], index[j])
        if not few:
            total = 0
            for j in range(a, b):
                total += arrivals[j - a]
                below[j] += total


@njit(nogil=True, cache=True)
def settle_pairs(start, bounds, item, score, key, index, below):
    """Compare listed items with those positives of their rows that they are too close to.

    Args:
        start: (M,) where the row's positives begin in `key`, `index` and `below`.
        bounds: (2, M) first and past the last such positive, counted from `start`.
        item, score: (M,) gallery index and exact score.
    """
    for m in range(item.shape[0]):
        for j in range(start[m] + bounds[0, m], start[m] + bounds[1, m]):
            below[j] += _precedes(score[m], item[m], key[j], index[j])


@njit(nogil=True, cache=True)
def histogram(values, lowest, span, counts):
    """Add to `counts` how many finite values fall into each of its bins over [lowest, +span]."""
    bins = counts.shape[0]
    for value in values:
        if value < np.inf:
            counts[min(max(int((value - lowest) / span * bins), 0), bins - 1)] += 1
