"""Rank the gallery for every query without sorting: count who comes before each positive, exactly.

The order of a query's gallery is that of scores in float64, then of the gallery index, as a stable
sort gives it. But few of these scores are computed. A matrix product, in float32 on the host and in
float64 on a GPU, settles nearly all comparisons. The few pairs that lie within its error of a
positive are scored again on the host in float64, always summed in the same order. So ranks do not
depend on the device, on chunks, or on the tasks among which the gallery is divided: the counts of
blocks add up.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from data_shards.errors import ConfigError
from data_shards.progress import Progress, silent
from reid_train.evaluation import similarity
from reid_train.evaluation.ground_truth import GroundTruth, Labels, find_ground_truth
from reid_train.evaluation.kernels import rank_counts
from reid_train.evaluation.measures import EUCLIDEAN, Metric, metric_code
from reid_train.evaluation.metrics import RankingResult, metrics_of
from reid_train.evaluation.similarity import Features
from reid_train.evaluation.tasks import Count, Pool, Separate, Source, gallery_blocks, ranges

BLOCK = 2048  # gallery images in a product; they and their scores fit the cache
PROBES = 32  # scores of a product that are checked at least

Blocks = Iterable[tuple[int, Features]]  # of the gallery: index of the first image, and W of them


class _Way(NamedTuple):
    """How one kind of device counts."""

    count: Callable[..., None]
    dtype: torch.dtype  # of the product
    block: int  # gallery images in a product
    chunk: int  # most queries in one
    threads: int | None  # that count chunks at the same time; None: as many as products use


# With more queries, threads would wait longer for a block's last chunk.
HOST = _Way(rank_counts.count_block, torch.float32, BLOCK, 256, None)
# Larger, because each chunk waits for its results a few times; about 1 GB each. While one thread
# waits, the device computes for the others. GPUs of data centres multiply in float64 as fast as in
# true float32, and only ties are left to the host.
DEVICE = _Way(rank_counts.count_on_device, torch.float64, 8 * BLOCK, 1024, 3)


def choose_way(device: torch.device) -> _Way:
    """How to count on a device."""
    return HOST if device.type == "cpu" else DEVICE


def rank(
    query: np.ndarray,
    gallery: np.ndarray,
    labels: Labels,
    *,
    metric: Metric = "cosine",
    max_rank: int = 50,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> RankingResult:
    """Measure how well the gallery answers the queries (METHOD, Evaluation).

    Args:
        query, gallery: (Q, D), (G, D) float32 embeddings; the cosine ignores their lengths.
        labels: identities and cameras.
        metric: "cosine" or "euclidean".
        max_rank: length of the CMC.
        device: where the product and the counting run; a GPU needs about 3 GB.
        progress: called with "matches", then "ranking", and gallery images.

    Raises:
        DataError: NaN or infinite embeddings, other shapes or types, or no query with a match.
        ConfigError: an unknown metric, or `max_rank` below 1.
    """
    code = metric_code(metric)
    if max_rank < 1:
        raise ConfigError(f"max_rank must be at least 1, not {max_rank}")
    source = Separate(*similarity.check_inputs(query, gallery, labels))
    truth, own, pool = find_ground_truth(labels), ranges(len(gallery), BLOCK), Pool(1, progress)
    given = source, truth, code
    ((scores, _),) = pool.map("matches", score_matches, given, own)
    count = partial(count_before, device=device)
    (before,) = pool.map("ranking", count, (*given, scores), own)
    return metrics_of(truth.positives(), before, max_rank)


def score_matches(
    source: Source, truth: GroundTruth, metric: int, own: Sequence[range], images: Count
) -> tuple[np.ndarray, float]:
    """First pass: exact scores (M,) float64, NaN out of a task's ranges; their greatest norm."""
    row, scores, longest = truth.row, np.full(len(truth.index), np.nan), 0.0
    for first, block in gallery_blocks(source, own, BLOCK):
        longest = max(longest, float(block.norm.max()))
        here = truth.within(first, len(block))
        columns = truth.index[here] - first
        scores[here] = _exact_scores(source.query, block, metric, row[here], columns)
        images(len(block))
    return scores, longest


def _exact_scores(
    query: Features, block: Features, metric: int, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Exact scores (M,) float64 of listed pairs."""
    out, vectors = np.empty(len(rows)), (query.vectors, block.vectors)

    def score(a: int, b: int) -> None:
        rank_counts.score_pairs(metric, *vectors, rows[a:b], columns[a:b], out[a:b])

    similarity.in_threads(score, len(rows))
    return out


def count_before(
    source: Source,
    truth: GroundTruth,
    metric: int,
    scores: np.ndarray,
    own: Sequence[range],
    images: Count,
    *,
    blocks: Blocks | None = None,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """Second pass: how many images of other identities come before each positive, (P,) int64.

    Each query's positives are ordered by distance, then by index. `scores` (M,) float64 are those
    of the whole gallery. `blocks`, if given, are counted in instead of `own`.
    """
    query, row, start = source.query, truth.row, truth.positives()
    target = torch.empty(0, device=device).device  # with its index
    order = np.flatnonzero(truth.positive)
    order = order[np.lexsort((scores[order], row[order]))]  # stable: equal scores stay by index
    # Quick Euclidean scores leave out ‖q‖².
    quick_keys = scores - query.norm[row] ** 2 if metric == EUCLIDEAN else scores
    key, key_row, exact = quick_keys[order], row[order], (scores[order], truth.index[order])
    before, way = np.zeros(len(order), np.int64), choose_way(target)
    scalar = np.float32 if way.dtype == torch.float32 else np.float64
    # Of the sizes that give each thread as many chunks, the greatest up to the way's.
    threads = way.threads or torch.get_num_threads()
    rounds = -(-len(query) // (way.chunk * threads))
    chunk = -(-len(query) // (rounds * threads))
    chunks = [query[part.start : part.stop] for part in ranges(len(query), chunk)]

    def window(slack: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Quick scores outside of it surely compare as exact ones do: (P,) of their dtype each."""
        slack = similarity.tolerance_at(key, slack[key_row], metric)
        return (key - slack).astype(scalar), (key + slack).astype(scalar)

    def prepare(numbered: tuple[int, Features]) -> _Block:
        first, block = numbered
        slack = similarity.tolerance(query, block, metric, dtype=way.dtype)
        own = truth.within(first, len(block))
        ends = np.searchsorted(row[own], range(0, len(query) + chunk, chunk))
        operand = similarity.right_operand(block, metric, target, way.dtype)
        return _Block(first, block, operand, slack, *window(slack), own, ends)

    def compare(i: int, block: _Block) -> None:
        part, first, features = chunks[i], i * chunk, block.features
        own = block.own[block.ends[i] : block.ends[i + 1]]
        quick = similarity.quick_scores(lefts[i], block.operand, features, metric)
        pairs = row[own] - first, truth.index[own] - block.first
        if way is HOST:
            quick = quick.numpy()  # indexing takes a fifth of the time that PyTorch takes
        checked, known, error = _errors(quick, *pairs, quick_keys[own], part, features, metric)
        low, high = block.low, block.high
        expected = similarity.tolerance_at(known, block.slack[checked + first], metric)
        if not np.all(error <= expected / 2):  # also if it is NaN
            slack = similarity.tolerance(query, features, metric, certain=True, dtype=way.dtype)
            low, high = window(slack)
            _require(error, slack[checked + first])
        # Images of the query's own identity are not counted.
        quick[_indices(quick, *pairs)] = np.inf
        positives = rank_counts.Positives(start[first : first + len(part) + 1], *exact, low, high)
        vectors = part.vectors, features.vectors
        way.count(quick, block.first, positives, metric, *vectors, before)

    pools = similarity.single_threaded_pool() if way is HOST else ThreadPoolExecutor(threads)
    with similarity.full_precision(), pools as pool:
        lefts = [similarity.left_operand(part, metric, target, way.dtype) for part in chunks]
        for block in _one_ahead(map(prepare, blocks or gallery_blocks(source, own, way.block))):
            list(pool.map(partial(compare, block=block), range(len(chunks))))
            images(len(block.features))
    return before


class _Block(NamedTuple):
    """A block of the gallery, ready to be compared with every chunk of the queries."""

    first: int
    features: Features
    operand: torch.Tensor
    slack: np.ndarray
    low: np.ndarray  # as in `Positives`, of all queries
    high: np.ndarray
    own: np.ndarray  # the entries of the ground truth that lie in the block
    ends: np.ndarray  # those of chunk i begin at ends[i]


def _one_ahead(blocks: Iterator[_Block]) -> Iterator[_Block]:
    """Make the next block in a thread while one is compared, so that no core waits for it."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = thread.submit(next, blocks, None)
            yield block


def _errors(
    quick: np.ndarray | torch.Tensor,
    rows: np.ndarray,
    columns: np.ndarray,
    exact: np.ndarray,
    part: Features,
    block: Features,
    metric: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The product's errors: rows and exact scores (n,) of some of its pairs, and their errors.

    The given exact scores are known; if they are few, some more are computed. Embeddings that
    break the tight bound, being nearly one constant, break it everywhere.
    """
    if len(rows) < PROBES:
        more = np.arange(0, len(part), -(-len(part) // PROBES))
        across, found = more % len(block), np.empty(len(more))
        rank_counts.score_pairs(metric, part.vectors, block.vectors, more, across, found)
        if metric == EUCLIDEAN:
            found -= part.norm[more] ** 2
        rows, columns = np.concatenate([rows, more]), np.concatenate([columns, across])
        exact = np.concatenate([exact, found])
    scores = quick[_indices(quick, rows, columns)]
    scores = scores if isinstance(scores, np.ndarray) else scores.cpu().numpy()
    return rows, exact, np.abs(scores - exact)


def _indices(scores: np.ndarray | torch.Tensor, *indices: np.ndarray) -> tuple:
    """Indices as `scores[…]` takes them: on its device."""
    if isinstance(scores, np.ndarray):
        return indices
    return tuple(torch.from_numpy(values).to(scores.device) for values in indices)


def _require(error: np.ndarray, slack: np.ndarray) -> None:
    """Raise if the product is worse than any float32 product can be."""
    if len(wrong := np.flatnonzero(~(error <= slack))):
        raise RuntimeError(
            f"the matrix product is off by {error[wrong[0]]:.1e}, but its precision allows only "
            f"{slack[wrong[0]]:.1e}: is a lower one forced on it?"
        )


def top_matches(
    query: np.ndarray,
    gallery: np.ndarray,
    labels: Labels,
    *,
    k: int = 10,
    metric: Metric = "cosine",
) -> np.ndarray:
    """Gallery indices (Q, k) closest to each query, without junk, in the order that `rank` counts.

    Fewer columns if a query has fewer than k images left.
    """
    code = metric_code(metric)
    queries, base = similarity.check_inputs(query, gallery, labels)
    right = similarity.right_operand(base, code)
    slack = similarity.tolerance(queries, base, code, certain=True)
    chosen = []
    with similarity.full_precision():
        for q in range(len(queries)):
            valid = np.flatnonzero(
                (labels.gallery_pid != labels.query_pid[q])
                | (labels.gallery_camid != labels.query_camid[q])
            )
            left = similarity.left_operand(queries[q : q + 1], code)
            near = similarity.quick_scores(left, right, base, code)[0].numpy()[valid]
            if len(valid) > k:
                near = near.astype(np.float64)
                kth = np.partition(near, k - 1)[k - 1]
                valid = valid[near <= kth + 2 * slack[q]]
            exact = _exact_scores(queries, base, code, np.full(len(valid), q), valid)
            chosen.append(valid[np.argsort(exact, kind="stable")[:k]])
    width = min(map(len, chosen))
    return np.stack([row[:width] for row in chosen])
