"""Compiled loops of k-reciprocal encoding on sparse rows (Zhong et al., CVPR 2017)."""

from __future__ import annotations

import numpy as np
from numba import njit

from reid_train.evaluation.kernels.rank_counts import COSINE, exact_score


@njit(nogil=True, cache=True)
def distance_of(metric: int, score: float) -> float:
    """The distance that re-ranking starts from: (1 − cosine)² or the squared Euclidean one."""
    return (1.0 + score) ** 2 if metric == COSINE else score


@njit(nogil=True, cache=True)
def reciprocal_neighbours(neighbours, k, first, out, count):
    """R(i, k): those of i's k + 1 nearest that have i among theirs, in order, into `out`."""
    for r in range(out.shape[0]):
        i, kept = first + r, 0
        for j in neighbours[i, : k + 1]:
            mutual = False
            for back in neighbours[j, : k + 1]:
                mutual |= back == i
            if mutual:
                out[r, kept] = j
                kept += 1
        count[r] = kept


@njit(nogil=True, cache=True)
def encode(
    neighbours, scores, full, full_count, half, half_count, furthest, metric, embedding, scale,
    first, length, items, values,
):  # fmt: skip
    """Expanded reciprocal sets R*(i, k) as rows of weights exp(−d) that add up to 1.

    Args:
        neighbours, scores: (N, k) the nearest of all items, and their exact scores.
        full, full_count: R(·, k1) of all items, and how many.
        half, half_count: R(·, k1 / 2).
        furthest: (N,) each item's greatest distance, to divide by.
        metric, embedding, scale: what `exact_score` needs.
        first: the item of the first row.
        length: (B,) how many entries each row gets.
        items, values: (B, C) int32 ascending, and float32.
    """
    member = np.full(full.shape[0], -1, np.int64)  # of R(i, k1)
    chosen = np.full(full.shape[0], -1, np.int64)  # of R*(i, k1)
    near = np.full(full.shape[0], -1, np.int64)  # of the nearest, whose scores are known
    known = np.empty(full.shape[0])
    for r in range(length.shape[0]):
        i, count = first + r, full_count[first + r]
        for m in range(count):
            j = full[i, m]
            member[j], chosen[j], items[r, m] = i, i, j
        for c in full[i, : full_count[i]]:
            shared = 0
            for j in half[c, : half_count[c]]:
                shared += member[j] == i
            if 3 * shared <= 2 * half_count[c]:
                continue
            for j in half[c, : half_count[c]]:
                if chosen[j] != i:
                    chosen[j], items[r, count] = i, j
                    count += 1
        items[r, :count].sort()
        for m in range(neighbours.shape[1]):
            near[neighbours[i, m]], known[neighbours[i, m]] = i, scores[i, m]
        total = 0.0
        for m in range(count):
            j = items[r, m]
            if near[j] != i:
                known[j] = exact_score(metric, embedding[i], embedding[j], scale[i] * scale[j])
            weight = np.exp(-distance_of(metric, float(known[j])) / furthest[i])
            values[r, m] = weight
            total += weight
        for m in range(count):
            values[r, m] /= total
        length[r] = count


@njit(nogil=True, cache=True)
def average(neighbours, start, item, value, first, length, items, values):
    """Local query expansion: each row the mean of its neighbours' rows, itself included.

    Args:
        neighbours: (N, k2).
        start, item, value: all rows, compressed.
        first, length, items, values: as in `encode`.
    """
    total = np.zeros(start.shape[0])
    seen = np.full(start.shape[0], -1, np.int64)
    for r in range(length.shape[0]):
        i, count = first + r, 0
        for j in neighbours[i]:
            for p in range(start[j], start[j + 1]):
                g = item[p]
                if seen[g] != i:
                    seen[g], total[g], items[r, count] = i, 0.0, g
                    count += 1
                total[g] += value[p]
        items[r, :count].sort()
        for m in range(count):
            values[r, m] = total[items[r, m]] / neighbours.shape[1]
        length[r] = count


@njit(nogil=True, cache=True, fastmath={"nsz", "arcp", "contract"})
def _blend(score, overlap, metric, furthest, weight):
    for g in range(score.shape[0]):
        distance = (score[g] + np.float32(1)) ** 2 if metric == COSINE else score[g]
        t = overlap[g]
        jaccard = np.float32(1) - t / (np.float32(2) - t)
        score[g] = jaccard * (np.float32(1) - weight) + distance * furthest * weight


@njit(nogil=True, cache=True)
def blend_jaccard(
    scores, start, item, value, column_start, column_row, column_value, metric, furthest, weight
):
    """Turn scores into re-ranked distances, in place.

    Args:
        scores: (B, G) float32 of queries and gallery.
        start, item, value: the queries' rows, compressed.
        column_start, column_row, column_value: the gallery's rows by column: which of them have
            an item in their set, and its weight.
        furthest: (B,) each query's greatest distance.
        weight: λ, the share of the original distance.
    """
    overlap = np.empty(scores.shape[1], np.float32)
    for q in range(scores.shape[0]):
        overlap[:] = 0
        for p in range(start[q], start[q + 1]):
            for c in range(column_start[item[p]], column_start[item[p] + 1]):
                overlap[column_row[c]] += min(value[p], column_value[c])
        inverse = np.float32(1.0 / furthest[q])
        _blend(scores[q], overlap, metric, inverse, np.float32(weight))
