"""Re-ranking by k-reciprocal encoding (Zhong et al., CVPR 2017) in memory linear in N.

Two images are close if they share reciprocal neighbours. Each image becomes a sparse row of weights
over its reciprocal neighbours: those among its nearest that have it among theirs. The Jaccard
distance of rows is mixed with the original distance.

Published variants differ. This follows the authors of adaptive L2 regularization (docs/METHOD.md):
- the distance is squared: (1 − cosine)², or the squared Euclidean distance. For normalised
  embeddings that is Zhong's too, up to a factor; some ports leave 1 − cosine unsquared;
- each row is divided by its greatest distance over query and gallery;
- k1 / 2 is rounded half to even; k1 + 1 and k1 / 2 + 1 neighbours are checked, itself included;
- a candidate's set joins if more than 2/3 of it is shared with the set before expansion;
- k2 = 1 turns local query expansion off.
Neighbours are ordered as in `ranking`: by exact scores, then by index.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import scipy.sparse as sp

from data_shards.errors import DataError
from data_shards.progress import Progress, silent
from reid_train.evaluation import neighbours, similarity
from reid_train.evaluation.ground_truth import GroundTruth, Labels, find_ground_truth, read_only
from reid_train.evaluation.kernels import k_reciprocal
from reid_train.evaluation.kernels.k_reciprocal import Compressed, Rows, Sets
from reid_train.evaluation.kernels.rank_counts import GIVEN, Positives, count_block
from reid_train.evaluation.measures import COSINE, Measures, metric_code
from reid_train.evaluation.metrics import RankingResult, metrics_of
from reid_train.evaluation.neighbours import Block, Neighbours
from reid_train.evaluation.similarity import Features
from reid_train.evaluation.tasks import Count, Joined, Pool, ignore, ranges

CHUNK = 512  # queries in a yield of distances
KEPT = 1 << 28  # bytes of scores that may be kept; more are computed a second time
ENCODED = 8192  # rows encoded at a time

NOTHING = Features.of(np.empty((0, 0), np.float32)).vectors  # for given distances
Distances = Iterable[tuple[int, np.ndarray]]  # first query, and (B, G) float32 to the gallery


@dataclass(frozen=True)
class Encoding:
    """What re-ranked distances are computed from."""

    rows: sp.csr_array  # (N, N) each image's weights, queries first
    furthest: np.ndarray  # (N,) float64, each image's greatest distance

    def __post_init__(self) -> None:
        read_only(self, "furthest")
        read_only(self.rows, "indptr", "indices", "data")


def rerank(
    query: np.ndarray,
    gallery: np.ndarray,
    measures: Measures | None = None,
    *,
    progress: Progress = silent,
) -> Iterator[tuple[int, np.ndarray]]:
    """Re-ranked distances of the queries to the gallery, some queries at a time.

    Args:
        query, gallery: (Q, D), (G, D) float32 embeddings.
        measures: `metric`, `k1`, `k2` and `weight` count; by default the cosine, and the authors'.
        progress: called with "neighbours" and pairs, then with "distances" and queries.

    Yields:
        Number of the first query, and distances (B, G) float32: what `rank_distances` takes.

    Raises:
        DataError: NaN or infinite embeddings, or other shapes or types.
        ConfigError: an unknown metric, or settings out of range or too large for so few images.
    """
    measures = measures or Measures()
    metric = metric_code(measures.metric)
    measures.check_reranking()
    source = Joined(Features.joined(*similarity.check_inputs(query, gallery)), len(query))
    measures.check_reranking(total := len(source.both))
    kept, blocks = room_for_scores(len(query), len(gallery)), neighbours.all_pairs(total)
    given = source, measures.needed, metric, kept
    (near,) = Pool(progress=progress).map("neighbours", find_neighbours, given, blocks)
    encoding, across = encode(source, near, measures), neighbours.blocks_across(len(query), total)
    for first, distance in _distances(source, encoding, measures, kept, across):
        yield first, distance
        progress("distances", first + len(distance), len(query))


def room_for_scores(queries: int, gallery: int) -> np.ndarray | None:
    """An empty (Q, G) float32 array for the queries' scores, if it may be so large."""
    fits = 4 * queries * gallery <= KEPT
    return np.empty((queries, gallery), np.float32) if fits else None


def find_neighbours(
    source: Joined, k: int, metric: int, kept: np.ndarray | None, own: Sequence[Block], pairs: Count
) -> Neighbours:
    """`nearest_neighbours` in a task's blocks; `kept` gets the queries' scores with the gallery."""
    return neighbours.nearest_neighbours(source.both, k, metric, own, pairs, kept)


def encode(source: Joined, near: Neighbours, measures: Measures) -> Encoding:
    """Every image as a sparse row of weights over its expanded reciprocal neighbours."""
    both, count, metric = source.both, len(source.both), metric_code(measures.metric)
    spread = near.furthest.astype(np.float64) + (metric == COSINE)
    furthest = spread**2 if metric == COSINE else spread
    # If all images are the same, the greatest distance is only a rounding error.
    furthest[spread <= similarity.tolerance(both, both, metric, certain=True)] = 1.0
    # Python rounds half to even.
    full, half = (_reciprocal(near.index, k) for k in (measures.k1, round(measures.k1 / 2)))
    widest = min(full.item.shape[1] * (1 + half.item.shape[1]), count)
    vectors = both.vectors
    fill = partial(k_reciprocal.encode, near, full, half, furthest, metric, vectors)
    rows = _rows_of(fill, count, widest)
    if measures.k2 > 1:
        nearest = np.ascontiguousarray(near.index[:, : measures.k2])
        longest = int(np.diff(rows.indptr).max(initial=0))
        fill = partial(k_reciprocal.average, nearest, _compressed(rows))
        rows = _rows_of(fill, count, min(measures.k2 * longest, count))
    return Encoding(rows, furthest)


def _reciprocal(nearest: np.ndarray, k: int) -> Sets:
    """R(·, k) of all images."""
    sets = Sets(np.empty((len(nearest), k + 1), np.int32), np.empty(len(nearest), np.int64))

    def fill(a: int, b: int) -> None:
        out = Sets(sets.item[a:b], sets.count[a:b])
        k_reciprocal.reciprocal_neighbours(nearest, k, a, out)

    similarity.in_threads(fill, len(nearest))
    return sets


def _compressed(rows: sp.csr_array | sp.csc_array) -> Compressed:
    return Compressed(rows.indptr, rows.indices, rows.data)


def _rows_of(fill: Callable[[int, Rows], None], count: int, widest: int) -> sp.csr_array:
    """A sparse matrix of the rows that `fill(first, rows)` writes, some at a time."""
    lengths, items, weights = [], [], []
    for images in ranges(count, ENCODED):
        shape = len(images), widest
        rows = Rows(
            np.zeros(len(images), np.int64), np.empty(shape, np.int32), np.empty(shape, np.float32)
        )

        def part(a: int, b: int, first=images.start, rows=rows) -> None:
            fill(first + a, Rows(*(values[a:b] for values in rows)))

        similarity.in_threads(part, len(images))
        used = np.arange(widest) < rows.length[:, None]
        lengths.append(rows.length)
        items.append(rows.item[used])
        weights.append(rows.value[used])
    start = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    content = np.concatenate(weights), np.concatenate(items), start
    return sp.csr_array(content, shape=(count, count))


def _distances(
    source: Joined,
    encoding: Encoding,
    measures: Measures,
    kept: np.ndarray | None,
    own: Sequence[Sequence[Block]],
) -> Distances:
    """Re-ranked distances, some queries at a time, from scores that are `kept` (overwritten).

    If there was no room for them, they are computed again in `own`, those of `blocks_across`.
    """
    metric, weight = metric_code(measures.metric), measures.weight
    rows, columns = _compressed(encoding.rows), _compressed(encoding.rows[source.queries :].tocsc())
    for start, scores in _scores_across(source, metric, own) if kept is None else [(0, kept)]:
        for offset in range(0, len(scores), CHUNK):
            first, out = start + offset, scores[offset : offset + CHUNK]

            def blend(a: int, b: int, first=first, out=out) -> None:
                own = Compressed(rows.start[first + a : first + b + 1], rows.item, rows.value)
                furthest = encoding.furthest[first + a : first + b]
                k_reciprocal.blend_jaccard(out[a:b], own, columns, metric, furthest, weight)

            similarity.in_threads(blend, len(out))
            yield first, out


def _scores_across(source: Joined, metric: int, own: Sequence[Sequence[Block]]) -> Distances:
    """The queries' scores with the gallery, computed in the blocks of `blocks_across`."""
    both, queries = source.both, source.queries
    scores_of = neighbours.block_scores(both, metric)
    for blocks in own:
        first, stop = blocks[0].rows.start, min(blocks[0].rows.stop, queries)
        out = np.empty((stop - first, len(both) - queries), np.float32)
        with similarity.full_precision():
            for block in blocks:
                neighbours.copy_across(block, scores_of(block), out, first, queries)
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
    before = _count_before(blocks, truth)
    if len(left := truth.row[truth.positive][before < 0]):
        raise DataError(f"no distances of query {left[0]}")
    return metrics_of(truth.positives(), before, max_rank)


def count_before_reranked(
    source: Joined,
    encoding: Encoding,
    measures: Measures,
    truth: GroundTruth,
    kept: np.ndarray | None,
    own: Sequence[Sequence[Block]],
    queries: Count,
) -> np.ndarray:
    """`_count_before` in the re-ranked gallery, of a task's queries."""
    return _count_before(_distances(source, encoding, measures, kept, own), truth, queries)


def _count_before(blocks: Distances, truth: GroundTruth, queries: Count = ignore) -> np.ndarray:
    """As `ranking.count_before` counts, (P,) int64; −1 for queries that are not in the blocks."""
    row, starts = truth.row, truth.positives()
    found = np.full(starts[-1], -1)
    for q, distance in blocks:
        stop = q + len(distance)
        if np.isnan(distance).any():
            raise DataError(f"distances of queries {q} to {stop - 1} contain NaN")
        own = np.arange(truth.start[q], truth.start[stop])
        kept = own[truth.positive[own]]
        key = distance[row[kept] - q, truth.index[kept]]
        distance[row[own] - q, truth.index[own]] = np.inf
        order = np.lexsort((key, row[kept]))  # stable: equal distances stay by index
        key, index = key[order], truth.index[kept[order]]
        start, before = starts[q : stop + 1] - starts[q], found[starts[q] : starts[stop]]
        before[:] = 0
        positives = Positives(start, key.astype(np.float64), index, key, key)

        def count(a: int, b: int, distance=distance, positives=positives, before=before) -> None:
            part = positives._replace(start=positives.start[a : b + 1])
            count_block(distance[a:b], 0, part, GIVEN, NOTHING, NOTHING, before)

        similarity.in_threads(count, len(distance))
        queries(len(distance))
    return found
