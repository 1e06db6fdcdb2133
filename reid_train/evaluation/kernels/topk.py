"""Keep the k nearest items of every row while blocks of scores stream past: compiled loops.

Each row has an unsorted buffer of candidates. When it is full, drop those that are surely not among
the k nearest: further than the k-th by more than twice the scores' error. At the end, score the
few that are left exactly and sort them.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from reid_train.evaluation.kernels.rank_counts import Vectors, score_pair

_STRIP, _WIDE_STRIP = 32, 256  # scores checked together, in a row and in many columns
_LANES = 64  # parts of a row; the extremes of all are found together
_ANY_ORDER = {"reassoc", "nnan", "nsz"}


class Candidates(NamedTuple):
    """The buffers of all N rows."""

    score: np.ndarray  # (N, C) float32, unsorted
    item: np.ndarray  # (N, C) int32
    count: np.ndarray  # (N,) how many each row has
    limit: np.ndarray  # (N,) float32, the score up to which a row takes candidates
    furthest: np.ndarray  # (N,) float32, the greatest score seen


class Search(NamedTuple):
    """What is searched for."""

    k: int  # how many items to keep for each row
    metric: int
    vectors: Vectors  # the N embeddings that are searched for
    items: Vectors  # those that are searched, perhaps the same
    slack: np.ndarray  # (N,) how far a score may be from the exact one


@njit(nogil=True, cache=True)
def _keep_nearest(score, item, count, k, best_score, best_item):
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
def _compact(i, found, search):
    """Make room in row i's full buffer, and lower the score up to which it takes candidates."""
    score, item, count, limit = found.score[i], found.item[i], found.count[i], found.limit
    k, slack = search.k, search.slack[i]
    limit[i] = np.float32(np.float64(_kth(score[:count], k)) + 2.01 * slack)
    kept = 0
    for m in range(count):
        if score[m] <= limit[i]:
            score[kept] = score[m]
            item[kept] = item[m]
            kept += 1
    found.count[i] = kept
    if kept <= score.shape[0] // 2:
        return
    # Many are too close to call, perhaps duplicates: only exact scores tell them apart.
    exact, best, chosen = np.empty(kept), np.empty(k), np.empty(k, np.int64)
    for m in range(kept):
        exact[m] = score_pair(search.metric, search.vectors, i, search.items, item[m])
    found.count[i] = _keep_nearest(exact, item, kept, k, best, chosen)
    for m in range(k):
        score[m] = np.float32(best[m])
        item[m] = chosen[m]
    limit[i] = np.float32(best[k - 1] + 1.01 * slack)


@njit(nogil=True, cache=True, inline="always")
def _take(i, score, item, found, search):
    found.score[i, found.count[i]] = score
    found.item[i, found.count[i]] = item
    found.count[i] += 1
    if found.count[i] == found.score.shape[1]:
        _compact(i, found, search)


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
def offer_columns(block, row, column, found, search):
    """Offer a block's columns to its rows, and update `found`, the `Candidates`.

    `block` (B, W) float32: scores of items row, row + 1, … with column, column + 1, …. An item with
    an infinite score is never taken.
    """
    limit, furthest, k = found.limit, found.furthest, search.k
    least, greatest = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    hits = np.empty(_STRIP + 1, np.int64)
    for r in range(block.shape[0]):
        i, scored = row + r, block[r]
        if limit[i] == np.inf and k <= _LANES:
            # The k-th of the lanes' least scores is no less than the k-th of all.
            _lane_extremes(scored, least, greatest)
            limit[i] = np.float32(np.float64(_kth(least, k)) + 2.01 * search.slack[i])
            furthest[i] = max(furthest[i], greatest.max())
        for left in range(0, block.shape[1], _STRIP):
            right = min(left + _STRIP, block.shape[1])
            if not _any_outside(scored, left, right, limit[i], furthest[i]):
                continue
            for m in range(_outside(scored, left, right, limit[i], furthest[i], hits)):
                c = hits[m]
                furthest[i] = max(furthest[i], scored[c])
                if scored[c] <= limit[i] and scored[c] < np.inf:
                    _take(i, scored[c], column + c, found, search)


@njit(nogil=True, cache=True)
def offer_rows(block, row, column, found, search):
    """Offer a block's rows to its columns; arguments as in `offer_columns`."""
    limit, furthest = found.limit, found.furthest
    hits = np.empty(_WIDE_STRIP + 1, np.int64)
    for left in range(0, block.shape[1], _WIDE_STRIP):
        width, first = min(_WIDE_STRIP, block.shape[1] - left), column + left
        for r in range(block.shape[0]):
            scored = block[r]
            if not _scan_columns(scored, left, width, limit, furthest, first):
                continue
            for m in range(_within_columns(scored, left, width, limit, first, hits)):
                c = hits[m]
                _take(first + c, scored[left + c], row + r, found, search)


@njit(nogil=True, cache=True)
def settle(found, search, first, out_item, out_score):
    """The k nearest of each row, by exact score, then by index; −1 and ∞ where there are fewer."""
    exact = np.empty(found.item.shape[1])
    for r in range(out_item.shape[0]):
        i = first + r
        if found.count[i] > search.k:
            _compact(i, found, search)
        item, count = found.item[i], found.count[i]
        for m in range(count):
            exact[m] = score_pair(search.metric, search.vectors, i, search.items, item[m])
        kept = _keep_nearest(exact, item, count, search.k, out_score[r], out_item[r])
        out_item[r, kept:] = -1
        out_score[r, kept:] = np.inf
