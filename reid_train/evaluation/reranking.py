"""Re-ranking by k-reciprocal encoding (Zhong et al., CVPR 2017) in memory linear in N.

Two images are close if they share reciprocal neighbours. Each image becomes a sparse row of
weights over those who count it among their nearest and whom it counts among its own; the
Jaccard distance of rows is mixed with the original distance.

Published variants differ. This follows the authors of adaptive L2 regularization (METHOD §6):
- the distance is squared: (1 − cosine)², or the squared Euclidean distance. For normalised
  embeddings that is Zhong's too, up to a factor; some ports leave 1 − cosine unsquared;
- each row is divided by its greatest distance over query and gallery;
- k1 / 2 is rounded half to even; k1 + 1 and k1 / 2 + 1 neighbours are looked at, self included;
- a candidate's set joins if more than 2/3 of it is shared with the set before expansion;
- k2 = 1 leaves local query expansion out.
The order of neighbours is that of `ranking`: exact scores, equal ones by index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from data_shards.errors import ConfigError
from reid_train.evaluation.ground_truth import read_only
from reid_train.evaluation.kernels import k_reciprocal as reciprocal
from reid_train.evaluation.kernels import rank_counts as counting
from reid_train.evaluation.neighbours import (
    Neighbours,
    Tile,
    all_pairs,
    nearest_neighbours,
    tile_scores,
    tiles_across,
)
from reid_train.evaluation.similarity import (
    Metric,
    Side,
    check_dimensions,
    checked_side,
    full_precision,
    in_threads,
    metric_code,
    tolerance,
)

CHUNK = 512  # queries whose distances are given at a time
KEPT = 1 << 28  # bytes of scores that may be kept; more are computed a second time
ENCODED = 8192  # rows encoded at a time

Progress = Callable[[str, int, int], object]
"""Told the stage's name, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class ReRanking:
    """Settings of k-reciprocal encoding, with the authors' values.

    Args:
        k1: neighbours looked at for reciprocity.
        k2: neighbours averaged over; 1 leaves that out.
        weight: λ, the share of the original distance in [0, 1].
    """

    k1: int = 20
    k2: int = 6
    weight: float = 0.3

    @property
    def half(self) -> int:
        """k1 / 2, rounded half to even."""
        return round(self.k1 / 2)

    @property
    def needed(self) -> int:
        """Neighbours needed of each image, itself included."""
        return max(self.k1 + 1, self.k2)

    def check(self, count: int | None = None) -> None:
        """Raise `ConfigError` where these settings make no sense (for `count` images, if known)."""
        if self.k1 < 1 or self.k2 < 1 or not 0 <= self.weight <= 1:
            raise ConfigError(f"re-ranking needs k1 ≥ 1, k2 ≥ 1 and 0 ≤ λ ≤ 1, not {self}")
        if count is not None and self.needed > count:
            raise ConfigError(
                f"re-ranking with k1 = {self.k1} and k2 = {self.k2} needs at least {self.needed} "
                f"images in query and gallery together, not {count}: choose smaller ones"
            )


@dataclass(frozen=True)
class Encoding:
    """What the distances are made of.

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
    progress: Progress = lambda stage, done, total: None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Re-ranked distances of the queries to the gallery, a few queries at a time.

    Args:
        query, gallery: (Q, D), (G, D) float32 embeddings.

    Yields:
        Number of the first query, and distances (B, G) float32: what `rank_distances` takes.

    Raises:
        DataError: NaN or infinite embeddings, or differing dimensions.
        ConfigError: more neighbours asked for than there are images.
    """
    settings = settings or ReRanking()
    code = metric_code(metric)
    side = joined(query, gallery)
    settings.check(len(side.norm))
    pairs, done = len(side.norm) ** 2, 0

    def count(served: int) -> None:
        nonlocal done
        done += served
        progress("neighbours", done, pairs)

    queries, total = len(query), len(side.norm)
    kept = None
    if 4 * queries * len(gallery) <= KEPT:
        kept = np.empty((queries, len(gallery)), np.float32)

    def keep(tile: Tile, scores: np.ndarray) -> None:
        if kept is not None:
            copy_across(tile, scores, kept, 0, queries)

    neighbours = nearest_neighbours(
        side, settings.needed, code, all_pairs(total), seen=keep, progress=count
    )
    encoding = encode(side, neighbours, settings, code)
    if kept is None:
        scores = scores_across(side, queries, code, tiles_across(queries, total))
    else:
        scores = [(0, kept)]
    for first, distance in distances(queries, encoding, settings, code, scores):
        yield first, distance
        progress("distances", first + len(distance), queries)


def joined(query: np.ndarray, gallery: np.ndarray) -> Side:
    """Queries and gallery as one side, checked."""
    sides = checked_side("query", query), checked_side("gallery", gallery)
    check_dimensions(*sides)
    return Side.joined(*sides)


def encode(side: Side, neighbours: Neighbours, settings: ReRanking, metric: int) -> Encoding:
    """Every image as a sparse row of weights over its expanded reciprocal neighbours."""
    spread = neighbours.furthest.astype(np.float64) + (metric == counting.COSINE)
    furthest = spread**2 if metric == counting.COSINE else spread
    # Where all images are the same, nothing but rounding is left to divide by.
    furthest[spread <= tolerance(side, side, metric, certain=True)] = 1.0
    full, full_count = _reciprocal(neighbours.index, settings.k1)
    half, half_count = _reciprocal(neighbours.index, settings.half)
    widest = min(full.shape[1] * (1 + half.shape[1]), len(furthest))

    def sets(first, length, items, values) -> None:
        reciprocal.encode(
            neighbours.index, neighbours.score, full, full_count, half, half_count, furthest,
            metric, side.embedding, side.scale, first, length, items, values,
        )  # fmt: skip

    rows = _rows_of(sets, len(furthest), widest)
    if settings.k2 == 1:
        return Encoding(rows, furthest)
    nearest = np.ascontiguousarray(neighbours.index[:, : settings.k2])
    longest = int(np.diff(rows.indptr).max(initial=0))

    def means(first, length, items, values) -> None:
        reciprocal.average(
            nearest, rows.indptr, rows.indices, rows.data, first, length, items, values
        )

    return Encoding(
        _rows_of(means, len(furthest), min(settings.k2 * longest, len(furthest))), furthest
    )


def _reciprocal(neighbours: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """R(·, k) of all items (N, k + 1) int32, and how many each has (N,)."""
    out, count = np.empty((len(neighbours), k + 1), np.int32), np.empty(len(neighbours), np.int64)
    in_threads(
        lambda a, b: reciprocal.reciprocal_neighbours(neighbours, k, a, out[a:b], count[a:b]),
        len(neighbours),
    )
    return out, count


def _rows_of(fill: Callable[..., None], count: int, widest: int) -> sp.csr_array:
    """A sparse matrix whose rows `fill(first, length, items, values)` writes, a stretch each."""
    lengths, indices, data = [], [], []
    for first in range(0, count, ENCODED):
        height = min(ENCODED, count - first)
        length = np.zeros(height, np.int64)
        items = np.empty((height, widest), np.int32)
        values = np.empty((height, widest), np.float32)

        def part(a: int, b: int, first=first, length=length, items=items, values=values) -> None:
            fill(first + a, length[a:b], items[a:b], values[a:b])

        in_threads(part, height)
        used = np.arange(widest) < length[:, None]
        lengths.append(length)
        indices.append(items[used])
        data.append(values[used])
    start = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    return sp.csr_array(
        (np.concatenate(data), np.concatenate(indices), start), shape=(count, count)
    )


def distances(
    queries: int,
    encoding: Encoding,
    settings: ReRanking,
    metric: int,
    scores: Iterable[tuple[int, np.ndarray]],
) -> Iterator[tuple[int, np.ndarray]]:
    """Re-ranked distances, a few queries at a time.

    Args:
        queries: how many images of the encoding are queries.
        scores: first query's number, and scores (B, G) float32 of some queries with the gallery,
            as `scores_across` gives them; overwritten.
    """
    rows, columns = encoding.rows, encoding.rows[queries:].tocsc()
    for start, all_scores in scores:
        for offset in range(0, len(all_scores), CHUNK):
            first, out = start + offset, all_scores[offset : offset + CHUNK]

            def blend(a: int, b: int, first=first, out=out) -> None:
                reciprocal.blend_jaccard(
                    out[a:b], rows.indptr[first + a : first + b + 1], rows.indices, rows.data,
                    columns.indptr, columns.indices, columns.data,
                    metric, encoding.furthest[first + a : first + b], settings.weight,
                )  # fmt: skip

            in_threads(blend, len(out))
            yield first, out


def scores_across(
    side: Side, queries: int, metric: int, across: Iterable[Sequence[Tile]]
) -> Iterator[tuple[int, np.ndarray]]:
    """The queries' scores with the gallery, as the tiles of `tiles_across` give them."""
    scores_of = tile_scores(side, metric)
    for tiles in across:
        first, last = tiles[0].rows
        out = np.empty((min(last, queries) - first, len(side.norm) - queries), np.float32)
        with full_precision():
            for tile in tiles:
                copy_across(tile, scores_of(tile), out, first, queries)
        yield first, out


def copy_across(tile: Tile, scores: np.ndarray, out: np.ndarray, first: int, queries: int) -> None:
    """Put what a tile has of the queries' scores with the gallery where it belongs.

    Args:
        out: (B, G), of queries from `first` on.
    """
    row, column = tile.rows[0] - first, tile.columns[0] - queries
    part = scores[: max(queries - tile.rows[0], 0), max(-column, 0) :]
    left = max(column, 0)
    out[row : row + len(part), left : left + part.shape[1]] = part
