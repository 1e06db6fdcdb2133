"""Compiled loops of k-reciprocal encoding on sparse rows (Zhong et al., CVPR 2017)."""

from typing import NamedTuple

import numpy as np
from numba import njit

from reid_train.evaluation.kernels.rank_counts import score_pair
from reid_train.evaluation.measures import COSINE


class Sets(NamedTuple):
    """Reciprocal neighbours R(i, k) of all N items: (N, k + 1) int32, and how many (N,)."""

    item: np.ndarray
    count: np.ndarray


class Rows(NamedTuple):
    """Sparse rows to fill: (B,) lengths, (B, C) int32 items, ascending, and float32 weights."""

    length: np.ndarray
    item: np.ndarray
    value: np.ndarray


class Compressed(NamedTuple):
    """Sparse rows as SciPy holds them: (B + 1,) where each row starts, its items and weights."""

    start: np.ndarray
    item: np.ndarray
    value: np.ndarray


@njit(nogil=True, cache=True)
def reciprocal_neighbours(neighbours, k, first, out):
    """R(i, k): those of i's k + 1 nearest that have i among theirs, in order, into `Sets`."""
    for r in range(out.item.shape[0]):
        i, kept = first + r, 0
        for j in neighbours[i, : k + 1]:
            mutual = False
            for back in neighbours[j, : k + 1]:
                mutual |= back == i
            if mutual:
                out.item[r, kept] = j
                kept += 1
        out.count[r] = kept


@njit(nogil=True, cache=True)
def encode(neighbours, full, half, furthest, metric, vectors, first, out):
    """Expanded reciprocal sets R*(i, k1) as rows of weights exp(−d) that sum to 1.

    Args:
        neighbours: `Neighbours` of all items.
        full, half: `Sets` R(·, k1) and R(·, k1 / 2) of all items.
        furthest: (N,) each item's greatest distance, to divide by.
        metric, vectors: metric and `Vectors` of exact scores.
        first: the item of the first row.
        out: `Rows`.
    """
    count_of_all = full.item.shape[0]
    member = np.full(count_of_all, -1, np.int64)  # of R(i, k1)
    chosen = np.full(count_of_all, -1, np.int64)  # of R*(i, k1)
    near = np.full(count_of_all, -1, np.int64)  # of the nearest, which have known scores
    known = np.empty(count_of_all)
    for r in range(out.length.shape[0]):
        i, items, values = first + r, out.item[r], out.value[r]
        count = full.count[i]
        for m in range(count):
            j = full.item[i, m]
            member[j], chosen[j], items[m] = i, i, j
        for c in full.item[i, : full.count[i]]:
            shared = 0
            for j in half.item[c, : half.count[c]]:
                shared += member[j] == i
            if 3 * shared <= 2 * half.count[c]:
                continue
            for j in half.item[c, : half.count[c]]:
                if chosen[j] != i:
                    chosen[j], items[count] = i, j
                    count += 1
        items[:count].sort()
        for m in range(neighbours.index.shape[1]):
            j = neighbours.index[i, m]
            near[j], known[j] = i, neighbours.score[i, m]
        total = 0.0
        for m in range(count):
            j = items[m]
            if near[j] != i:
                known[j] = score_pair(metric, vectors, i, vectors, j)
            distance = (1.0 + known[j]) ** 2 if metric == COSINE else known[j]
            weight = np.exp(-distance / furthest[i])
            values[m] = weight
            total += weight
        for m in range(count):
            values[m] /= total
        out.length[r] = count


@njit(nogil=True, cache=True)
def average(neighbours, rows, first, out):
    """Local query expansion: each row becomes the mean of its neighbours' rows, its own included.

    `neighbours` (N, k2), all `rows` as `Compressed`; `first`, `out` as in `encode`.
    """
    total = np.zeros(neighbours.shape[0])
    seen = np.full(neighbours.shape[0], -1, np.int64)
    for r in range(out.length.shape[0]):
        i, count, items = first + r, 0, out.item[r]
        for j in neighbours[i]:
            for p in range(rows.start[j], rows.start[j + 1]):
                g = rows.item[p]
                if seen[g] != i:
                    seen[g], total[g], items[count] = i, 0.0, g
                    count += 1
                total[g] += rows.value[p]
        items[:count].sort()
        for m in range(count):
            out.value[r, m] = total[items[m]] / neighbours.shape[1]
        out.length[r] = count


@njit(nogil=True, cache=True, fastmath={"nsz", "arcp", "contract"})
def _blend(score, overlap, metric, furthest, weight):
    for g in range(score.shape[0]):
        distance = (score[g] + np.float32(1)) ** 2 if metric == COSINE else score[g]
        t = overlap[g]
        jaccard = np.float32(1) - t / (np.float32(2) - t)
        score[g] = jaccard * (np.float32(1) - weight) + distance * furthest * weight


@njit(nogil=True, cache=True)
def blend_jaccard(scores, rows, columns, metric, furthest, weight):
    """Turn scores into re-ranked distances, in place.

    Args:
        scores: (B, G) float32 of queries and gallery.
        rows: the B queries' rows, `Compressed`.
        columns: the gallery's rows, `Compressed` by column: for each item the gallery images that
            have it in their set, with its weight.
        furthest: (B,) each query's greatest distance.
        weight: λ, the share of the original distance.
    """
    overlap = np.empty(scores.shape[1], np.float32)
    for q in range(scores.shape[0]):
        overlap[:] = 0
        for p in range(rows.start[q], rows.start[q + 1]):
            value, item = rows.value[p], rows.item[p]
            for c in range(columns.start[item], columns.start[item + 1]):
                overlap[columns.item[c]] += min(value, columns.value[c])
        inverse = np.float32(1.0 / furthest[q])
        _blend(scores[q], overlap, metric, inverse, np.float32(weight))
