"""The k nearest neighbours of all images among all, exact, without an N × N matrix; their means."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch

from reid_train.evaluation import similarity
from reid_train.evaluation.kernels import topk
from reid_train.evaluation.measures import EUCLIDEAN
from reid_train.evaluation.similarity import Features, check_features
from reid_train.evaluation.tasks import Count, Joined, ignore, ranges

BLOCK = 1536  # rows and columns of a product; fixed, so that each task computes the same scores
_ROWS = 1024  # images averaged at a time: their neighbours' embeddings are gathered


class Neighbours(NamedTuple):
    """The nearest of each image, itself included."""

    index: np.ndarray  # (N, k) int32, by exact score, then by index; −1 where fewer are known
    score: np.ndarray  # (N, k) float64, ascending; ∞ where fewer are known
    furthest: np.ndarray  # (N,) float32, the greatest score


def merge(a: Neighbours, b: Neighbours) -> Neighbours:
    """What `nearest_neighbours` gives for the blocks of both."""
    index = np.concatenate([a.index, b.index], axis=1)
    score = np.concatenate([a.score, b.score], axis=1)
    order = np.lexsort((index, score), axis=1)[:, : a.index.shape[1]]
    index, score = (np.take_along_axis(values, order, axis=1) for values in (index, score))
    return Neighbours(index, score, np.maximum(a.furthest, b.furthest))


@dataclass(frozen=True)
class Block:
    """Pairs of consecutive rows and columns; its length is the number of distances that it gives.

    A block above the diagonal is `mirrored`: it also gives its columns' scores with its rows.
    """

    rows: range
    columns: range
    mirrored: bool = False

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns) * (1 + self.mirrored)


def all_pairs(count: int, first: int = 0) -> list[Block]:
    """All images from `first` on with all of them: half of the products are enough.

    The diagonal comes first. After it every row has a limit on how far its nearest are, and few of
    the other blocks need a second look.
    """
    edges = ranges(count, BLOCK, first)
    mirrored = [Block(a, b, mirrored=True) for i, a in enumerate(edges) for b in edges[i + 1 :]]
    return [Block(a, a) for a in edges] + mirrored


def blocks_across(queries: int, count: int) -> list[list[Block]]:
    """Those blocks of `all_pairs` that have the queries' scores with the gallery, by their rows.

    As blocks are fixed, these scores are the same to the bit.
    """
    edges = ranges(count, BLOCK)
    return [
        [Block(a, b, mirrored=a != b) for b in edges[i:] if b.stop > queries]
        for i, a in enumerate(edges)
        if a.start < queries
    ]


def query_gallery_pairs(queries: int, count: int) -> list[Block]:
    """The first `queries` images with all others."""
    columns = ranges(count, BLOCK, first=queries)
    return [Block(a, b) for a in ranges(queries, BLOCK) for b in columns]


def block_scores(features: Features, metric: int) -> Callable[[Block], np.ndarray]:
    """A function from a block to its quick scores (height, width) float32.

    Threads may call it at once, within `full_precision`. It keeps operands: those of all columns,
    and those of the last rows, as many as there are threads.
    """
    lock, threads = Lock(), torch.get_num_threads()
    rights: dict[range, torch.Tensor] = {}
    lefts: dict[range, torch.Tensor] = {}

    def scores_of(block: Block) -> np.ndarray:
        rows, columns = (features[edge.start : edge.stop] for edge in (block.rows, block.columns))
        # Made outside the lock: sometimes twice, but no thread waits for another's.
        if (left := lefts.get(block.rows)) is None:
            left = similarity.left_operand(rows, metric)
            with lock:
                lefts[block.rows] = left
                if len(lefts) > threads:
                    del lefts[next(iter(lefts))]
        if (right := rights.get(block.columns)) is None:
            right = rights[block.columns] = similarity.right_operand(columns, metric)
        scores = similarity.quick_scores(left, right, columns, metric).numpy()
        if metric == EUCLIDEAN:
            scores += (rows.norm[:, None] ** 2).astype(np.float32)
        return scores

    return scores_of


def copy_across(
    block: Block, scores: np.ndarray, out: np.ndarray, first: int, queries: int
) -> None:
    """Copy a block's scores of queries with the gallery into `out` (B, G), from row `first` on."""
    row, column = block.rows.start - first, block.columns.start - queries
    part = scores[: max(queries - block.rows.start, 0), max(-column, 0) :]
    left = max(column, 0)
    out[row : row + len(part), left : left + part.shape[1]] = part


def nearest_neighbours(
    features: Features,
    k: int,
    metric: int,
    own: Sequence[Block],
    pairs: Count = ignore,
    kept: np.ndarray | None = None,
) -> Neighbours:
    """The k ≤ N nearest neighbours, as far as the blocks tell.

    Blocks of the same rows come one after another in `own`. `kept` (Q, G) float32, if given, gets
    the scores of the first Q images with the others.
    """
    count, capacity = len(features), 4 * k
    found = topk.Candidates(
        score=np.empty((count, capacity), np.float32),
        item=np.empty((count, capacity), np.int32),
        count=np.zeros(count, np.int64),
        limit=np.full(count, np.inf, np.float32),
        furthest=np.full(count, -np.inf, np.float32),
    )
    # An error that always holds: unlike in `ranking`, what is dropped is never looked at again. For
    # embeddings that are not nearly one constant this costs next to nothing.
    slack = similarity.tolerance(features, features, metric, certain=True)
    search = topk.Search(k, metric, features.vectors, features.vectors, slack)
    scores_of = block_scores(features, metric)
    locks = {edge: Lock() for block in own for edge in (block.rows, block.columns)}

    def offer(block: Block) -> int:
        scores, place = scores_of(block), (block.rows.start, block.columns.start)
        if kept is not None:
            copy_across(block, scores, kept, 0, len(kept))
        with locks[block.rows]:
            topk.offer_columns(scores, *place, found, search)
        if block.mirrored:
            with locks[block.columns]:
                topk.offer_rows(scores, *place, found, search)
        return len(block)

    with similarity.full_precision(), similarity.single_threaded_pool() as pool:
        for compared in pool.map(offer, own):
            pairs(compared)
    index, score = np.empty((count, k), np.int32), np.empty((count, k))
    similarity.in_threads(lambda a, b: topk.settle(found, search, a, index[a:b], score[a:b]), count)
    return Neighbours(index, score, found.furthest)


def nearest_in_gallery(
    query: np.ndarray, blocks: Iterable[tuple[np.ndarray, np.ndarray]], k: int, metric: int
) -> Neighbours:
    """The k nearest gallery images of each query, exact; indices are rows of the gallery.

    Args:
        query: (Q, D) float32 embeddings.
        blocks: the gallery in parts, each with its rows (n,) and its embeddings (n, D) float32, so
            that a gallery that does not fit into memory can be searched.
    """
    asked, count = check_features("query", query), len(query)
    found = Neighbours(
        index=np.full((count, k), -1, np.int32),
        score=np.full((count, k), np.inf),
        furthest=np.full(count, -np.inf, np.float32),
    )
    for rows, embedding in blocks:
        both = Features.joined(asked, check_features("gallery", embedding))
        pairs = query_gallery_pairs(count, len(both))
        near = nearest_neighbours(both, min(k, len(rows)), metric, pairs)
        index = rows[near.index[:count] - count].astype(np.int32)
        found = merge(found, Neighbours(index, near.score[:count], near.furthest[:count]))
    return found


def averaged(
    source: Joined, query_near: Neighbours | None, gallery_near: Neighbours | None, alpha: float
) -> Joined:
    """Queries, gallery or both, replaced by means with their nearest; None keeps them.

    α query expansion (Radenović et al., TPAMI 2019) adds the nearest gallery images to each query.
    Database augmentation makes every gallery image a mean of its nearest, itself included. An image
    weighs its cosine similarity to the power α, and nothing if that is 0 or less. Means have
    length 1.
    """
    both, queries = source.both, source.queries
    out = both.embedding.copy()
    if query_near is not None:
        out[:queries] = _means(both, range(queries), query_near, alpha, with_self=True)
    if gallery_near is not None:
        images = range(queries, len(both))
        out[queries:] = _means(both, images, gallery_near, alpha, with_self=False)
    return Joined(Features.of(out), queries)


def _means(
    features: Features, images: range, nearest: Neighbours, alpha: float, *, with_self: bool
) -> np.ndarray:
    """Normalised sums of normalised embeddings, each weighted by its similarity: (n, D) float32.

    `features` and `nearest` are those of all N images; `with_self` adds the image itself, weight 1.
    """
    parts = []
    for part in ranges(images.stop, _ROWS, images.start):
        rows = slice(part.start, part.stop)
        index, near = nearest.index[rows], np.clip(-nearest.score[rows], 0, None)
        weights = np.where(near > 0, near**alpha, 0) * features.scale[index]
        total = (weights.astype(np.float32)[:, None] @ features.embedding[index])[:, 0]
        if with_self:
            total += features.embedding[rows] * features.scale[rows, None].astype(np.float32)
        parts.append((total * Features.of(total).scale[:, None]).astype(np.float32))
    return np.concatenate(parts)
