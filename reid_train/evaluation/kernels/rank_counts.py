"""Count the gallery items before each positive: compiled loops over one block of scores.

A block holds the scores of a few queries with a block of the gallery, from a matrix
product, smaller is closer. If a score differs from a positive's by more than the product's error,
comparing the two is enough. The few other pairs are scored again in float64.
"""

from typing import NamedTuple

import numpy as np
import torch
from numba import njit

from reid_train.evaluation.measures import COSINE

GIVEN = 2  # instead of a metric's number: the scores are exact
_STRIP = 256  # gallery items looked at together: 1 KB of scores, held in the L1 cache
_BINS, _LANES = 1024, 16  # of a histogram of scores, and of what lies before or after all bins
_LEAST_SPAN = np.float32(1e-30)  # of a histogram, to divide by

# Sums may be reordered (that is what lets them use SIMD), always in the same way for one length.
_SUM = {"reassoc", "contract"}


class Vectors(NamedTuple):
    """What exact scores need: (N, D) float32 embeddings, and 1/‖x‖ of each, (N,) float64."""

    embedding: np.ndarray
    scale: np.ndarray


class Positives(NamedTuple):
    """The positives of some queries, each query's from the closest to the furthest."""

    start: np.ndarray  # (B + 1,) where each query's positives begin in the (P,) arrays
    score: np.ndarray  # (P,) float64, exact
    index: np.ndarray  # (P,) int64 gallery indices
    low: np.ndarray  # (P,) as the scores; an item with a lower one surely comes before the positive
    high: np.ndarray  # (P,) as the scores; one with a higher one surely comes after it


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
def score_pair(metric, query, q, block, g):
    """Exact score, float64, of row q of the query `Vectors` and row g of the block's."""
    if metric == COSINE:
        scale = query.scale[q] * block.scale[g]
        return -_dot(query.embedding[q], block.embedding[g]) * scale
    return _squared_distance(query.embedding[q], block.embedding[g])


@njit(nogil=True, cache=True)
def score_pairs(metric, query, block, rows, columns, out):
    """Exact scores of listed (query row, block column) pairs into `out` (M,) float64."""
    for m in range(rows.shape[0]):
        out[m] = score_pair(metric, query, rows[m], block, columns[m])


@njit(nogil=True, cache=True)
def _precedes(score, item, key, index):
    return score < key or (score == key and item < index)


@njit(nogil=True, cache=True)
def _any_upto(scores, left, right, high):
    found = False
    for i in range(np.uint64(left), np.uint64(right)):
        found |= scores[i] <= high
    return found


@njit(nogil=True, cache=True)
def _bin(score, lowest, inverse, lane):
    """Bin of a score: up to _LANES where it is below `lowest`, from _BINS on where far above all.

    Rounding changes no order: of two scores, the one in the earlier bin is smaller. Infinite scores
    and NaN have bins, too.
    """
    place = (score - lowest) * inverse + np.float32(_LANES)
    end = lane + np.float32(_BINS)
    place = place if place < end else end
    return np.int32(place if place > lane else lane)


@njit(nogil=True, cache=True)
def _bins_of(scores, left, right, lowest, inverse, out):
    # Most scores are below or above all positives. Neighbours get bins of their own there: adding
    # to the same one again would have to wait for the addition before.
    for i in range(np.uint32(right - left)):
        lane = np.float32(np.int32(i & np.uint32(_LANES - 1)))
        out[i] = _bin(scores[np.uint64(left) + np.uint64(i)], lowest, inverse, lane)


@njit(nogil=True, cache=True)
def _tally(bins, width, doubtful, counts, suspects):
    """Count a strip's items by bin; those in doubtful bins also go into `suspects`."""
    found = np.uint64(0)
    for i in range(np.uint64(width)):
        place = np.uint64(bins[i])
        counts[place] += np.int32(1)
        suspects[found] = i
        found += np.uint64(doubtful[place])
    return np.int64(found)


@njit(nogil=True, cache=True)
def _accumulate(counts, doubtful):
    """Counts by bin to how many items are in it or before, those in doubtful bins left out."""
    for i in range(counts.shape[0]):
        counts[i] *= np.int32(1 - doubtful[i])
    total = np.int32(0)
    for i in range(counts.shape[0]):
        total += counts[i]
        counts[i] = total


@njit(nogil=True, cache=True)
def count_block(scores, first, positives, metric, query, block, before):
    """Add to `before` how many of a block's gallery items come before each positive.

    A histogram of each row's scores gives nearly all counts. Only items in the bins around a
    positive's score are compared one by one.

    Args:
        scores: (B, W) float32, infinite for items of the query's own identity.
        first: gallery index of the block's first column.
        positives: `Positives` of the B queries.
        metric: a metric's number, or GIVEN.
        query, block: `Vectors` of the rows and of the columns.
        before: (P,) int64.
    """
    counts = np.empty(_BINS + _LANES, np.int32)
    doubtful = np.empty(_BINS + _LANES, np.uint8)
    bins, suspects = np.empty(_STRIP, np.int32), np.empty(_STRIP + 1, np.int32)
    start, low, high = positives.start, positives.low, positives.high
    arrivals = np.empty(np.diff(start).max() + 1, np.int64)
    zero = np.float32(0)
    for q in range(scores.shape[0]):
        row, a, b = scores[q], start[q], start[q + 1]
        if a == b:
            continue
        lowest, greatest = low[a], high[b - 1]
        inverse = np.float32(_BINS - _LANES - 2) / max(greatest - lowest, _LEAST_SPAN)
        counts[:] = 0
        doubtful[:] = not greatest - lowest < np.inf  # all, if the span overflows float32
        for j in range(a, b):
            last = _bin(high[j], lowest, inverse, zero)
            for i in range(_bin(low[j], lowest, inverse, zero), last + 1):
                doubtful[i] = 1
        arrivals[:] = 0  # at j: suspects surely before all positives from the j-th on
        for left in range(0, row.shape[0], _STRIP):
            right = min(left + _STRIP, row.shape[0])
            if not _any_upto(row, left, right, greatest):
                continue
            _bins_of(row, left, right, lowest, inverse, bins)
            for i in suspects[: _tally(bins, right - left, doubtful, counts, suspects)]:
                g = left + i
                if row[g] > greatest:
                    continue
                certain = a + np.searchsorted(low[a:b], row[g], side="right")
                arrivals[certain - a] += 1
                if certain == a or row[g] > high[certain - 1]:
                    continue
                score = np.float64(row[g])
                if metric != GIVEN:
                    score = score_pair(metric, query, q, block, g)
                for j in range(certain - 1, a - 1, -1):
                    if row[g] > high[j]:
                        break
                    before[j] += _precedes(score, first + g, positives.score[j], positives.index[j])
        _accumulate(counts, doubtful)
        arrived = 0
        for j in range(a, b):
            arrived += arrivals[j - a]
            before[j] += counts[_bin(low[j], lowest, inverse, zero)] + arrived


@njit(nogil=True, cache=True)
def _settle_pairs(first, stop, item, score, positives, before):
    """Compare items (M,), given by index and exact score, each with its own range of positives."""
    for m in range(item.shape[0]):
        for j in range(first[m], stop[m]):
            before[j] += _precedes(score[m], item[m], positives.score[j], positives.index[j])


def count_on_device(
    scores: torch.Tensor,
    first: int,
    positives: Positives,
    metric: int,
    query: Vectors,
    block: Vectors,
    before: np.ndarray,
) -> None:
    """`count_block` with PyTorch: only pairs that are too close to call come back to the CPU."""
    start, device = positives.start, scores.device
    count, own = np.diff(start), slice(start[0], start[-1])
    width = int(count.max(initial=0))
    if width == 0:
        return
    filled = np.arange(width) < count[:, None]
    limits = np.full((2, len(count), width), np.inf, positives.low.dtype)
    limits[0][filled], limits[1][filled] = positives.low[own], positives.high[own]
    lows, highs = torch.from_numpy(limits).to(device)
    certain = torch.searchsorted(lows, scores, right=True, out_int32=True)
    possible = torch.searchsorted(highs, scores, out_int32=True)
    offset = torch.arange(len(count), device=device, dtype=torch.int32)[:, None] * (width + 1)
    arrivals = torch.bincount((certain + offset).flatten(), minlength=len(count) * (width + 1))
    sure = arrivals.view(len(count), width + 1).cumsum(1)[:, :width].cpu().numpy()
    before[own] += sure[filled]

    close = torch.nonzero((possible < certain) & (scores < torch.inf))
    if len(close) == 0:
        return
    places = tuple(close.T)
    low, high = (bounds[places].cpu().numpy().astype(np.int64) for bounds in (possible, certain))
    rows, columns = close.cpu().numpy().T.copy()
    exact = np.empty(len(rows))
    score_pairs(metric, query, block, rows, columns, exact)
    begin = start[rows]
    _settle_pairs(begin + low, begin + high, first + columns, exact, positives, before)


@njit(nogil=True, cache=True)
def histogram(values, lowest, span, counts):
    """Add to `counts` how many finite values fall into each of its bins over [lowest, +span]."""
    bins = counts.shape[0]
    for value in values:
        if value < np.inf:
            counts[min(max(int((value - lowest) / span * bins), 0), bins - 1)] += 1


@njit(nogil=True, cache=True)
def histogram_by_group(scores, lowest, span, classes, of_row, of_column, by_row, by_column):
    """Count scores (B, W) by class and by the group of their row, and of their column.

    Bins are those of `histogram`; `classes` has each bin's class, and scores of the last class are
    not counted. `by_row` and `by_column` (groups, classes − 1) int64 are added to.
    """
    bins, last = classes.shape[0], by_row.shape[1]
    for r in range(scores.shape[0]):
        for c in range(scores.shape[1]):
            value = scores[r, c]
            if value < np.inf:
                at = classes[min(max(int((value - lowest) / span * bins), 0), bins - 1)]
                if at < last:
                    by_row[of_row[r], at] += 1
                    by_column[of_column[c], at] += 1
