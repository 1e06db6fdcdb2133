"""Metrics of distances that are given, as re-ranking gives them, a few queries at a time."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from data_shards.errors import DataError
from reid_train.evaluation.ground_truth import Labels, Matches, find_matches
from reid_train.evaluation.kernels import rank_counts as counting
from reid_train.evaluation.metrics import RankingResult, metrics_of
from reid_train.evaluation.ranking import count_on_host
from reid_train.evaluation.similarity import Side

Distances = Iterable[tuple[int, np.ndarray]]
"""First query's number, and distances (B, G) float32 of a few queries to the whole gallery."""

_NOTHING = Side(np.empty((0, 0), np.float32), np.empty(0), np.empty(0))


def rank_distances(blocks: Distances, labels: Labels, *, max_rank: int = 50) -> RankingResult:
    """Measure given distances, as `ranking.rank` does embeddings; equal ones by gallery index.

    Args:
        blocks: every query once; overwritten.
        labels: identities and cameras.

    Raises:
        DataError: NaN distances, a query left out, or no query with a match.
    """
    matches = find_matches(labels)
    ranks = positive_ranks(blocks, matches)
    if left := matches.row[matches.positive][ranks == 0].tolist():
        raise DataError(f"no distances of query {left[0]}")
    return metrics_of(matches.positives(), ranks, max_rank)


def positive_ranks(blocks: Distances, matches: Matches) -> np.ndarray:
    """Ranks (P,) from 1 of each query's positives, ascending; 0 for queries not in the blocks."""
    row, starts = matches.row, matches.positives()
    ranks = np.zeros(starts[-1], np.int64)
    for q, distance in blocks:
        stop = q + len(distance)
        if np.isnan(distance).any():
            raise DataError(f"distances of queries {q} to {stop - 1} contain NaN")
        own = np.arange(matches.start[q], matches.start[stop])
        kept = own[matches.positive[own]]
        index, key = matches.index[kept], distance[row[kept] - q, matches.index[kept]]
        distance[row[own] - q, matches.index[own]] = np.inf
        order = np.lexsort((index, key, row[kept]))
        index, key = index[order], key[order]
        before = np.zeros(len(kept), np.int64)
        start = starts[q : stop + 1] - starts[q]
        count_on_host(
            torch.from_numpy(distance), 0, start,
            key.astype(np.float64), index, key, key, counting.GIVEN,
            _NOTHING.embedding, _NOTHING.embedding, _NOTHING.scale, _NOTHING.scale, before,
        )  # fmt: skip
        fellows = np.arange(len(kept)) - np.repeat(start[:-1], np.diff(start))
        ranks[starts[q] : starts[stop]] = before + fellows + 1
    return ranks
