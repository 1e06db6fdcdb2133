"""Re-ranking by k-reciprocal encoding (Zhong et al., CVPR 2017) in memory linear in N.

Two images are close if they share reciprocal neighbours. Each image becomes a sparse row of weights
over its reciprocal neighbours: those among its nearest that have it among theirs. The Jaccard
distance of rows is mixed with the original distance.

Published variants differ. This follows the authors of adaptive L2 regularization (METHOD §6):
- the distance is squared: (1 − cosine)², or the squared Euclidean distance. For normalised
  embeddings that is Zhong's too, up to a factor; some ports leave 1 − cosine unsquared;
- each row is divided by its greatest distance over query and gallery;
- k1 / 2 is rounded half to even; k1 + 1 and k1 / 2 + 1 neighbours are checked, itself included;
- a candidate's set joins if more than 2/3 of it is shared with the set before expansion;
- k2 = 1 turns local query expansion off.
Neighbours are ordered as in `ranking`: by exact scores, then by index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import scipy.sparse as sp

from data_shards.errors import DataError
from data_shards.progress import Progress, silent
from reid_train.evaluation.ground_truth import GroundTruth, Labels, find_ground_truth, read_only
from reid_train.evaluation.kernels import k_reciprocal
from reid_train.evaluation.kernels.k_reciprocal import Compressed, Rows, Sets
from reid_train.evaluation.kernels.rank_counts import COSINE, GIVEN, Positives, count_block
from reid_train.evaluation.measures import Metric, ReRanking
from reid_train.evaluation.metrics import RankingResult, metrics_of
from reid_train.evaluation.neighbours import (
    Block,
    Neighbours,
    all_pairs,
    block_scores,
    blocks_across,
    nearest_neighbours,
)
from reid_train.evaluation.ranking import nth
from reid_train.evaluation.similarity import (
    Features,
    check_inputs,
    full_precision,
    in_threads,
    metric_code,
    tolerance,
)
from reid_train.evaluation.tasks import Count, Joined, Pool, ignore

CHUNK = 512  # queries in a yield of distances
KEPT = 1 << 28  # bytes of scores that may be kept; more are computed a second time
ENCODED = 8192  # rows encoded at a time


NOTHING = Features(np.empty((0, 0), np.float32), np.empty(0), np.empty(0)).vectors
"""For counts that need no embeddings."""

Distances = Iterable[tuple[int, np.ndarray]]
"""Number of the first query, and distances (B, G) float32 of B queries to the whole gallery."""


@dataclass(frozen=True)
class Encoding:
    """What re-ranked distances are computed from.

    Args:
        rows: (N, N) sparse; each image's weights, queries first.
        furthest: (N,) float64, each image's greatest distance.
    """

    rows: sp.csr_array
    furthest: np.ndarray

    def __post_init__(self) -> None:
        read_only(self, "furthest")
        read_only(self.rows, "indptr", "indices", "data")


def rerank(
    query: np.ndarray,
    gallery: np.ndarray,
    settings: ReRanking | None = None,
    *,
    metric: Metric = "cosine",
    progress: Progress = silent,
) -> Iterator[tuple[int, np.ndarray]]:
    """Re-ranked distances of the queries to the gallery, some queries at a time.

    Args:
        query, gallery: (Q, D), (G, D) float32 embeddings.
        settings: by default the authors'.
        metric: "cosine" or "euclidean".
        progress: called with "neighbours" and pairs, then with "distances" and queries.

    Yields:
        Number of the first query, and distances (B, G) float32: what `rank_distances` takes.

    Raises:
        DataError: NaN or infinite embeddings, or other shapes or types.
        ConfigError: an unknown metric, or settings out of range or too large for so few images.
    """
    settings, code = settings or ReRanking(), metric_code(metric)
    settings.check()
    source = Joined(Features.joined(*check_inputs(query, gallery)), len(query))
    total = len(source.both)
    settings.check(total)
    given = source, settings.needed, code, (kept := room_for_scores(len(query), len(gallery)))
    blocks, size = all_pairs(total), attrgetter("pairs")
    (near,) = Pool(progress=progress).map("neighbours", find_neighbours, given, blocks, size)
    encoding = encode(source, near, settings, code)
    scores = _scores_across(source, code, kept, blocks_across(len(query), total))
    for first, distance in _distances(source, encoding, settings, code, scores):
        yield first, distance
        progress("distances", first + len(distance), len(query))


def room_for_scores(queries: int, gallery: int) -> np.ndarray | None:
    """An empty (Q, G) float32 array for the queries' scores, if it may be so large."""
    if 4 * queries * gallery > KEPT:
        return None
    return np.empty((queries, gallery), np.float32)


def find_neighbours(
    source: Joined,
    k: int,
    metric: int,
    kept: np.ndarray | None,
    own: Sequence[Block],
    pairs: Count,
) -> Neighbours:
    """The nearest of all images among all, as far as a task's blocks tell.

    Also puts the queries' scores with the gallery into `kept`, if there is room.
    """

    def keep(block: Block, scores: np.ndarray) -> None:
        if kept is not None:
            _copy_across(block, scores, kept, 0, len(kept))

    return nearest_neighbours(source.both, k, metric, own, pairs, keep)


def rank_reranked(
    source: Joined,
    encoding: Encoding,
    settings: ReRanking,
    metric: int,
    truth: GroundTruth,
    kept: np.ndarray | None,
    own: Sequence[Sequence[Block]],
    queries: Count,
) -> np.ndarray:
    """Ranks (P,) of the positives of a task's queries in the re-ranked gallery, 0 elsewhere."""
    scores = _scores_across(source, metric, kept, own)
    return positive_ranks(_distances(source, encoding, settings, metric, scores), truth, queries)


def _scores_across(
    source: Joined, metric: int, kept: np.ndarray | None, own: Sequence[Sequence[Block]]
) -> Iterator[tuple[int, np.ndarray]]:
    """The queries' scores with the gallery: those kept, or those of `blocks_across` once more."""
    both, queries = source.both, source.queries
    if kept is not None:
        yield 0, kept
        return
    scores_of = block_scores(both, metric)
    for blocks in own:
        first, stop = blocks[0].rows
        out = np.empty((min(stop, queries) - first, len(both) - queries), np.float32)
        with full_precision():
            for block in blocks:
                _copy_across(block, scores_of(block), out, first, queries)
        yield first, out


def _copy_across(
    block: Block, scores: np.ndarray, out: np.ndarray, first: int, queries: int
) -> None:
    """Copy a block's scores of queries with the gallery to their place.

    Args:
        out: (B, G), of queries from `first` on.
    """
    row, column = block.rows[0] - first, block.columns[0] - queries
    part = scores[: max(queries - block.rows[0], 0), max(-column, 0) :]
    left = max(column, 0)
    out[row : row + len(part), left : left + part.shape[1]] = part


def encode(source: Joined, near: Neighbours, settings: ReRanking, metric: int) -> Encoding:
    """Every image as a sparse row of weights over its expanded reciprocal neighbours."""
    both = source.both
    spread = near.furthest.astype(np.float64) + (metric == COSINE)
    furthest = spread**2 if metric == COSINE else spread
    # If all images are the same, the greatest distance is only a rounding error.
    furthest[spread <= tolerance(both, both, metric, certain=True)] = 1.0
    count = len(both)
    full, half = (_reciprocal(near.index, k) for k in (settings.k1, settings.half))
    widest = min(full.item.shape[1] * (1 + half.item.shape[1]), count)

    def sets(first: int, out: Rows) -> None:
        k_reciprocal.encode(near, full, half, furthest, metric, both.vectors, first, out)

    rows = _rows_of(sets, count, widest)
    if settings.k2 == 1:
        return Encoding(rows, furthest)
    nearest = np.ascontiguousarray(near.index[:, : settings.k2])
    longest = int(np.diff(rows.indptr).max(initial=0))
    single = _compressed(rows)

    def means(first: int, out: Rows) -> None:
        k_reciprocal.average(nearest, single, first, out)

    return Encoding(_rows_of(means, count, min(settings.k2 * longest, count)), furthest)


def _reciprocal(neighbours: np.ndarray, k: int) -> Sets:
    """R(·, k) of all images."""
    sets = Sets(np.empty((len(neighbours), k + 1), np.int32), np.empty(len(neighbours), np.int64))

    def fill(a: int, b: int) -> None:
        out = Sets(sets.item[a:b], sets.count[a:b])
        k_reciprocal.reciprocal_neighbours(neighbours, k, a, out)

    in_threads(fill, len(neighbours))
    return sets


def _compressed(rows: sp.csr_array | sp.csc_array) -> Compressed:
    return Compressed(rows.indptr, rows.indices, rows.data)


def _rows_of(fill: Callable[[int, Rows], None], count: int, widest: int) -> sp.csr_array:
    """A sparse matrix of the rows that `fill(first, rows)` writes, some at a time."""
    lengths, indices, data = [], [], []
    for first in range(0, count, ENCODED):
        height = min(ENCODED, count - first)
        rows = Rows(
            np.zeros(height, np.int64),
            np.empty((height, widest), np.int32),
            np.empty((height, widest), np.float32),
        )

        def part(a: int, b: int, first=first, rows=rows) -> None:
            fill(first + a, Rows(*(values[a:b] for values in rows)))

        in_threads(part, height)
        used = np.arange(widest) < rows.length[:, None]
        lengths.append(rows.length)
        indices.append(rows.item[used])
        data.append(rows.value[used])
    start = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    return sp.csr_array(
        (np.concatenate(data), np.concatenate(indices), start), shape=(count, count)
    )


def _distances(
    source: Joined,
    encoding: Encoding,
    settings: ReRanking,
    metric: int,
    scores: Iterable[tuple[int, np.ndarray]],
) -> Iterator[tuple[int, np.ndarray]]:
    """Re-ranked distances, some queries at a time.

    Args:
        scores: number of the first query, and scores (B, G) float32 of B queries with the gallery,
            as `_scores_across` gives them; overwritten.
    """
    rows, columns = _compressed(encoding.rows), _compressed(encoding.rows[source.queries :].tocsc())
    for start, all_scores in scores:
        for offset in range(0, len(all_scores), CHUNK):
            first, out = start + offset, all_scores[offset : offset + CHUNK]

            def blend(a: int, b: int, first=first, out=out) -> None:
                own = Compressed(rows.start[first + a : first + b + 1], rows.item, rows.value)
                furthest = encoding.furthest[first + a : first + b]
                k_reciprocal.blend_jaccard(
                    out[a:b], own, columns, metric, furthest, settings.weight
                )

            in_threads(blend, len(out))
            yield first, out


def rank_distances(blocks: Distances, labels: Labels, *, max_rank: int = 50) -> RankingResult:
    """Measure given distances as `rank` measures embeddings; equal ones in order of the index.

    Args:
        blocks: every query once; overwritten.
        labels: identities and cameras.

    Raises:
        DataError: NaN distances, a missing query, or no query with a match.
    """
    truth = find_ground_truth(labels)
    ranks = positive_ranks(blocks, truth)
    if left := truth.row[truth.positive][ranks == 0].tolist():
        raise DataError(f"no distances of query {left[0]}")
    return metrics_of(truth.positives(), ranks, max_rank)


def positive_ranks(blocks: Distances, truth: GroundTruth, queries: Count = ignore) -> np.ndarray:
    """Ranks (P,) from 1 of each query's positives, ascending; 0 for queries not in the blocks."""
    row, starts = truth.row, truth.positives()
    ranks = np.zeros(starts[-1], np.int64)
    for q, distance in blocks:
        stop = q + len(distance)
        if np.isnan(distance).any():
            raise DataError(f"distances of queries {q} to {stop - 1} contain NaN")
        own = np.arange(truth.start[q], truth.start[stop])
        kept = own[truth.positive[own]]
        index, key = truth.index[kept], distance[row[kept] - q, truth.index[kept]]
        distance[row[own] - q, truth.index[own]] = np.inf
        order = np.lexsort((index, key, row[kept]))
        index, key = index[order], key[order]
        before, start = np.zeros(len(kept), np.int64), starts[q : stop + 1] - starts[q]

        def count(a: int, b: int, distance=distance, start=start, given=(key, index), out=before):
            key, index = given
            positives = Positives(start[a : b + 1], key.astype(np.float64), index, key, key)
            count_block(distance[a:b], 0, positives, GIVEN, NOTHING, NOTHING, out)

        in_threads(count, len(distance))
        ranks[starts[q] : starts[stop]] = before + nth(start)
        queries(len(distance))
    return ranks
