"""Ranking and re-ranking spread over Ray workers, to the same bits as in one process.

Ranking: a worker streams its share of the gallery's Parquet row groups from storage, twice, and
returns counts; nobody holds the gallery. Re-ranking: workers share the tiles of the N × N
product, then the queries; each node holds the embeddings once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayTaskError

from reid_train.evaluation.distance_ranking import positive_ranks
from reid_train.evaluation.embeddings import EmbeddingFiles, Piece
from reid_train.evaluation.matches import Labels, Matches, find_matches
from reid_train.evaluation.metrics import RankingResult, metrics_of
from reid_train.evaluation.neighbours import (
    Neighbours,
    Tile,
    all_pairs,
    nearest_neighbours,
    tiles_across,
)
from reid_train.evaluation.ranking import count_before, ranks_of, score_own
from reid_train.evaluation.reranking import (
    Encoding,
    ReRanking,
    distances,
    encode,
    joined,
    scores_across,
)
from reid_train.evaluation.scoring import Metric, Side, metric_code


def rank_distributed(
    files: EmbeddingFiles,
    *,
    workers: int,
    metric: Metric = "cosine",
    max_rank: int = 50,
    cpus: float = 1,
) -> RankingResult:
    """`ranking.rank` of embeddings on storage that every worker reaches.

    Args:
        files: query and gallery.
        workers: how many tasks share the gallery.
        cpus: of each task.

    Raises:
        DataError: as `ranking.rank`.
    """
    matches = find_matches(files.labels)
    given = [ray.put(thing) for thing in (Side.of(files.read("query")), files, matches)]
    shares = [share for share in shares_of(files.pieces, workers, lambda p: p.rows) if share]
    score, count = (_remote(function, cpus) for function in (score_share, count_share))
    found = _gather([score(*given, share, metric) for share in shares])
    # Each entry was scored by the one worker that has its gallery item.
    scores = np.nanmax(found, axis=0)
    shared = ray.put(scores)
    before = np.sum(_gather([count(*given, share, shared, metric) for share in shares]), axis=0)
    return metrics_of(matches.positives(), ranks_of(matches, before), max_rank)


def rerank_distributed(
    query: np.ndarray,
    gallery: np.ndarray,
    labels: Labels,
    settings: ReRanking | None = None,
    *,
    workers: int,
    metric: Metric = "cosine",
    max_rank: int = 50,
    cpus: float = 1,
) -> RankingResult:
    """Metrics of `reranking.rerank`, the neighbours and the distances shared by `workers` tasks.

    Raises:
        DataError, ConfigError: as `reranking.rerank` and `rank_distances`.
    """
    settings, code = settings or ReRanking(), metric_code(metric)
    side, matches = joined(query, gallery), find_matches(labels)
    settings.check(len(side.norm))
    shared = ray.put(side)
    near, place = (_remote(function, cpus) for function in (nearest_share, distance_share))
    shares = shares_of(all_pairs(len(side.norm)), workers, lambda tile: tile.pairs)
    parts = _gather([near(shared, settings.needed, code, share) for share in shares if share])
    encoding = ray.put(encode(side, Neighbours.merge(parts), settings, code))
    across = shares_of(tiles_across(len(query), len(side.norm)), workers, len)
    ranks = _gather(
        [
            place(shared, len(query), encoding, settings, code, share, matches)
            for share in across
            if share
        ]
    )
    return metrics_of(matches.positives(), np.sum(ranks, axis=0), max_rank)


def shares_of(items: Sequence, workers: int, size: Callable[[Any], int]) -> list[list]:
    """Consecutive items for each worker, of about the same size in all; some may be empty."""
    ends = np.cumsum([size(item) for item in items])
    middle = ends - np.diff(ends, prepend=0) / 2
    owner = np.minimum(middle * workers // ends[-1], workers - 1).astype(int)
    return [[item for item, w in zip(items, owner, strict=True) if w == i] for i in range(workers)]


def score_share(
    query: Side, files: EmbeddingFiles, matches: Matches, share: list[Piece], metric: Metric
) -> np.ndarray:
    """Scores of the matches in a share of the gallery, NaN elsewhere."""
    return score_own(query, files.blocks("gallery", tuple(share)), matches, metric)


def count_share(
    query: Side,
    files: EmbeddingFiles,
    matches: Matches,
    share: list[Piece],
    scores: np.ndarray,
    metric: Metric,
) -> np.ndarray:
    """How many of a share of the gallery come before each positive."""
    return count_before(query, files.blocks("gallery", tuple(share)), matches, scores, metric)


def nearest_share(side: Side, k: int, metric: int, share: list[Tile]) -> Neighbours:
    """The nearest neighbours as far as a share of the tiles tells."""
    return nearest_neighbours(side, k, metric, share)


def distance_share(
    side: Side,
    queries: int,
    encoding: Encoding,
    settings: ReRanking,
    metric: int,
    share: list[list[Tile]],
    matches: Matches,
) -> np.ndarray:
    """Ranks of the positives of a share of the queries, 0 elsewhere."""
    scores = scores_across(side, queries, metric, share)
    return positive_ranks(distances(queries, encoding, settings, metric, scores), matches)


def _remote(function: Callable, cpus: float) -> Callable[..., ray.ObjectRef]:
    return ray.remote(num_cpus=cpus, max_retries=2)(function).remote


def _gather(references: list[ray.ObjectRef]) -> list:
    """Results of tasks; an error of ours comes out as itself, not wrapped."""
    try:
        return ray.get(references)
    except RayTaskError as error:
        raise error.cause from None
