"""Compiled loops that keep the nearest items of every row while blocks of scores stream past.

A row's candidates are kept in an unsorted buffer. Once it is full, those are dropped that are
surely not among the k nearest: further than the k-th by more than the scores' error, twice. In
the end the few that are left are scored exactly and put in order.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from reid_train.evaluation.kernels.rank_counts import exact_score

_STRIP, _WIDE_STRIP = 32, 256  # scores looked at together, in a row and in many columns
_LANES = 64  # stretches of a row, whose extremes are found together
_ANY_ORDER = {"reassoc", "nnan", "nsz"}


@njit(nogil=True, cache=True)
def keep_nearest(score, item, count, k, best_score, best_item):
    """The k first of `count` (score, item) pairs, in order, into `best_*`; returns how many."""
    kept = 0
    for m in range(count):
        s, g = score[m], item[m]
        if kept == k:
            if s > best_score[k - 1] or (s == best_score[k - 1] and g >= best_item[k - 1]):
                continue
            kept -= 1
        place = kept
        while place > 0 and (
            best_score[place - 1] > s or (best_score[place - 1] == s and best_item[place - 1] > g)
        ):
            best_score[place] = best_score[place - 1]
            best_item[place] = best_item[place - 1]
            place -= 1
        best_score[place] = s
        best_item[place] = g
        kept += 1
    return kept


@njit(nogil=True, cache=True)
def _kth(values, k):
    """The k-th smallest, by insertion: values are a few dozen."""
    least = np.full(k, np.inf, np.float32)
    for value in values:
        if value < least[k - 1]:
            place = k - 1
            while place > 0 and least[place - 1] > value:
                least[place] = least[place - 1]
                place -= 1
            least[place] = value
    return least[k - 1]


@njit(nogil=True, cache=True)
def _compact(i, scores, items, count, limit, slack, k, metric, embedding, scale):
    """Make room in row i's full buffer and lower the score up to which it takes candidates."""
    capacity = scores.shape[1]
    kth = np.float64(_kth(scores[i, : count[i]], k))
    limit[i] = np.float32(kth + 2.01 * slack[i])
    kept = 0
    for m in range(count[i]):
        if scores[i, m] <= limit[i]:
            scores[i, kept] = scores[i, m]
            items[i, kept] = items[i, m]
            kept += 1
    count[i] = kept
    if kept <= capacity // 2:
        return
    # Many are too close to call, duplicates perhaps: only exact scores can tell them apart.
    exact, best, chosen = np.empty(kept), np.empty(k), np.empty(k, np.int64)
    for m in range(kept):
        g = items[i, m]
        exact[m] = exact_score(metric, embedding[i], embedding[g], scale[i] * scale[g])
    count[i] = keep_nearest(exact, items[i], kept, k, best, chosen)
    for m in range(k):
        scores[i, m] = np.float32(best[m])
        items[i, m] = chosen[m]
    limit[i] = np.float32(best[k - 1] + 1.01 * slack[i])


@njit(nogil=True, cache=True, inline="always")
def _take(i, score, item, scores, items, count, limit, slack, k, metric, embedding, scale):
    scores[i, count[i]] = score
    items[i, count[i]] = item
    count[i] += 1
    if count[i] == scores.shape[1]:
        _compact(i, scores, items, count, limit, slack, k, metric, embedding, scale)


# Compilers use SIMD for the extremes of many columns and for whether any score is beyond a limit,
# but not for the extremes of one row. Nor where an index might be negative, hence unsigned ones.
@njit(nogil=True, cache=True, fastmath=_ANY_ORDER)
def _lane_extremes(row, least, greatest):
    """The least and the greatest of each _LANES-th score; what is left at the end is left out."""
    least[:], greatest[:] = np.inf, -np.inf
    for first in range(0, row.shape[0] - _LANES + 1, _LANES):
        for lane in range(_LANES):
            score = row[np.uint64(first + lane)]
            least[lane] = min(least[lane], score)
            greatest[lane] = max(greatest[lane], score)


@njit(nogil=True, cache=True)
def _any_outside(row, first, stop, low, high):
    found = False
    for c in range(np.uint64(first), np.uint64(stop)):
        found |= (row[c] <= low) | (row[c] > high)
    return found


@njit(nogil=True, cache=True)
def _outside(row, first, stop, low, high, hits):
    """Columns of those scores of a strip into `hits`; returns how many. Without a branch: some
    strips have several, and each wrong guess costs as much as the strip."""
    found = np.uint64(0)
    for c in range(np.uint64(first), np.uint64(stop)):
        hits[found] = c
        found += np.uint64((row[c] <= low) | (row[c] > high))
    return np.int64(found)


@njit(nogil=True, cache=True, fastmath=_ANY_ORDER)
def _scan_columns(row, left, width, limit, furthest, first):
    """Whether any of a strip's scores is within its column's own limit; updates the greatest."""
    # Counted in float32, whose lanes are as wide as the scores': integers would be added as int64.
    within, one, zero = np.float32(0), np.float32(1), np.float32(0)
    for c in range(np.uint64(width)):
        score, i = row[np.uint64(left) + c], np.uint64(first) + c
        within += one if score <= limit[i] else zero
        furthest[i] = max(furthest[i], score)
    return within > zero


@njit(nogil=True, cache=True)
def _within_columns(row, left, width, limit, first, hits):
    """Those columns of a strip, from its first on, into `hits`; returns how many."""
    found = np.uint64(0)
    for c in range(np.uint64(width)):
        hits[found] = c
        found += np.uint64(row[np.uint64(left) + c] <= limit[np.uint64(first) + c])
    return np.int64(found)


@njit(nogil=True, cache=True)
def offer_columns(
    block, row, column, scores, items, count, limit, furthest, slack, k, metric, embedding, scale
):
    """Offer a block's columns to its rows.

    Args:
        block: (B, W) float32 scores of items row, row + 1, … with column, column + 1, ….
        scores, items, count, limit, furthest: the buffers of all rows, updated.
        slack: (N,) how far a score may be from the exact one.
        k: how many to keep at least.
        metric, embedding, scale: what `exact_score` needs.
    """
    least, greatest = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    hits = np.empty(_STRIP + 1, np.int64)
    for r in range(block.shape[0]):
        i, scored = row + r, block[r]
        if limit[i] == np.inf and k <= _LANES:
            # The k-th of the lanes' least scores is no less than the k-th of all.
            _lane_extremes(scored, least, greatest)
            limit[i] = np.float32(np.float64(_kth(least, k)) + 2.01 * slack[i])
            furthest[i] = max(furthest[i], greatest.max())
        for left in range(0, block.shape[1], _STRIP):
            right = min(left + _STRIP, block.shape[1])
            if not _any_outside(scored, left, right, limit[i], furthest[i]):
                continue
            for m in range(_outside(scored, left, right, limit[i], furthest[i], hits)):
                c = hits[m]
                furthest[i] = max(furthest[i], scored[c])
                if scored[c] <= limit[i]:
                    _take(
                        i, scored[c], column + c, scores, items, count, limit, slack,
                        k, metric, embedding, scale,
                    )  # fmt: skip


@njit(nogil=True, cache=True)
def offer_rows(
    block, row, column, scores, items, count, limit, furthest, slack, k, metric, embedding, scale
):
    """Offer a block's rows to its columns; arguments as in `offer_columns`."""
    hits = np.empty(_WIDE_STRIP + 1, np.int64)
    for left in range(0, block.shape[1], _WIDE_STRIP):
        width, first = min(_WIDE_STRIP, block.shape[1] - left), column + left
        for r in range(block.shape[0]):
            scored = block[r]
            if not _scan_columns(scored, left, width, limit, furthest, first):
                continue
            for m in range(_within_columns(scored, left, width, limit, first, hits)):
                c = hits[m]
                _take(
                    first + c, scored[left + c], row + r, scores, items, count, limit, slack,
                    k, metric, embedding, scale,
                )  # fmt: skip


@njit(nogil=True, cache=True)
def settle(
    scores, items, count, limit, slack, k, metric, embedding, scale, first, out_item, out_score
):
    """The k nearest of each row, in order of exact score, then of index; −1 and ∞ where fewer."""
    exact = np.empty(items.shape[1])
    for r in range(out_item.shape[0]):
        i = first + r
        if count[i] > k:
            _compact(i, scores, items, count, limit, slack, k, metric, embedding, scale)
        for m in range(count[i]):
            g = items[i, m]
            exact[m] = exact_score(metric, embedding[i], embedding[g], scale[i] * scale[g])
        kept = keep_nearest(exact, items[i], count[i], k, out_score[r], out_item[r])
        out_item[r, kept:] = -1
        out_score[r, kept:] = np.inf
