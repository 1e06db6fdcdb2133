"""Rank the gallery for every query without sorting: count who comes before each positive, exactly.

The order of a query's gallery is that of scores in float64, then of the gallery index, as a stable
sort gives it. But few of these scores are computed. A float32 matrix product settles nearly all
comparisons. The few pairs that lie within its error of a positive are scored again in float64,
always summed in the same order. So ranks do not depend on the device, on chunks, or on the tasks
among which the gallery is divided: the counts of blocks add up.

Two passes over the gallery: `score_matches` computes the positives' exact scores, `count_before`
counts the images before them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from data_shards.errors import ConfigError
from data_shards.progress import Progress, silent
from reid_train.evaluation.ground_truth import GroundTruth, Labels, find_ground_truth
from reid_train.evaluation.kernels.rank_counts import (
    EUCLIDEAN,
    Positives,
    count_block,
    count_on_device,
    score_pairs,
)
from reid_train.evaluation.measures import Metric
from reid_train.evaluation.metrics import RankingResult, metrics_of
from reid_train.evaluation.similarity import (
    Features,
    check_inputs,
    full_precision,
    in_threads,
    left_operand,
    metric_code,
    quick_scores,
    right_operand,
    single_threaded_pool,
    tolerance,
    tolerance_at,
)
from reid_train.evaluation.tasks import (
    Count,
    Pool,
    Range,
    Separate,
    Source,
    gallery_blocks,
    ignore,
    length,
    ranges,
)

BLOCK = 2048  # gallery images in a product; they and their scores fit the cache
CHUNK = 256  # queries in a product: with more, threads wait longer for a block's last one
PROBES = 32  # scores of a product that are checked at least

Blocks = Iterable[tuple[int, Features]]
"""Blocks of the gallery: index of the first image, and W of them."""


def rank(
    query: np.ndarray,
    gallery: np.ndarray,
    query_pid: np.ndarray,
    query_camid: np.ndarray,
    gallery_pid: np.ndarray,
    gallery_camid: np.ndarray,
    *,
    metric: Metric = "cosine",
    max_rank: int = 50,
    chunk: int = CHUNK,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> RankingResult:
    """Measure how well the gallery answers the queries (METHOD §6).

    Args:
        query: (Q, D) float32 embeddings; the cosine does not depend on their lengths.
        gallery: (G, D) float32.
        query_pid, query_camid, gallery_pid, gallery_camid: (Q,) and (G,) integers ≥ 0.
        metric: "cosine" or "euclidean".
        max_rank: length of the CMC.
        chunk: queries at a time; memory grows with it, results do not change.
        device: where the product and the counting run.
        progress: called with "ranking" and gallery images.

    Raises:
        DataError: NaN or infinite embeddings, other shapes or types, or no query with a match.
        ConfigError: an unknown metric, or `max_rank` or `chunk` below 1.
    """
    metric_code(metric)
    if chunk < 1 or max_rank < 1:
        raise ConfigError(f"chunk and max_rank must be at least 1, not {chunk} and {max_rank}")
    labels = Labels(query_pid, query_camid, gallery_pid, gallery_camid)
    queries, base = check_inputs(query, gallery, labels)
    truth, source = find_ground_truth(labels), Separate(queries, base)
    own = ranges(len(base), BLOCK)
    scores, _ = score_matches(source, truth, metric, own)
    count = partial(count_before, chunk=chunk, device=device)
    given = source, truth, metric, scores
    (before,) = Pool(progress=progress).map("ranking", count, given, own, length)
    return metrics_of(truth.positives(), ranks_of(truth, before), max_rank)


def score_matches(
    source: Source, truth: GroundTruth, metric: Metric, own: Sequence[Range], images: Count = ignore
) -> tuple[np.ndarray, float]:
    """First pass: the exact scores (M,) float64 of all entries of `truth` in a task's ranges.

    Entries of other ranges stay NaN. Also returns the greatest norm in the ranges.
    """
    code, row, query = metric_code(metric), truth.row, source.query
    scores, longest = np.full(len(row), np.nan), 0.0
    for first, block in gallery_blocks(source, own, BLOCK):
        longest = max(longest, float(block.norm.max()))
        here = np.flatnonzero((truth.index >= first) & (truth.index < first + len(block)))
        scores[here] = _exact_scores(query, block, code, row[here], truth.index[here] - first)
        images(len(block))
    return scores, longest


def _exact_scores(
    query: Features, block: Features, code: int, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Exact scores (M,) float64 of listed pairs."""
    out = np.empty(len(rows))

    def score(a: int, b: int) -> None:
        score_pairs(code, query.vectors, block.vectors, rows[a:b], columns[a:b], out[a:b])

    in_threads(score, len(rows))
    return out


def ordered_positives(truth: GroundTruth, scores: np.ndarray) -> np.ndarray:
    """Entries of `truth` that are positives, each query's from the closest to the furthest."""
    kept = np.flatnonzero(truth.positive)  # equal scores stay in the order of the index
    return kept[np.lexsort((scores[kept], truth.row[kept]))]


def count_before(
    source: Source,
    truth: GroundTruth,
    metric: Metric,
    scores: np.ndarray,
    own: Sequence[Range],
    images: Count,
    **options: Any,
) -> np.ndarray:
    """Second pass: `count_in_blocks` of a task's ranges of the gallery."""
    blocks = gallery_blocks(source, own, BLOCK)
    return count_in_blocks(source.query, blocks, truth, scores, metric, images, **options)


def count_in_blocks(
    query: Features,
    blocks: Blocks,
    truth: GroundTruth,
    scores: np.ndarray,
    metric: Metric,
    images: Count = ignore,
    *,
    chunk: int = CHUNK,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """How many images of other identities, in these blocks, come before each positive.

    Args:
        scores: (M,) float64, from `score_matches`, of the whole gallery.
        images: called with each block's images.

    Returns:
        (P,) int64, in the order of `ordered_positives`.
    """
    code, target = metric_code(metric), torch.empty(0, device=device).device  # with its index
    order, row = ordered_positives(truth, scores), truth.row
    # Quick Euclidean scores leave out ‖q‖².
    quick_keys = scores - query.norm[row] ** 2 if code == EUCLIDEAN else scores
    key, key_row, start = quick_keys[order], row[order], truth.positives()
    exact = scores[order], truth.index[order]
    before = np.zeros(len(order), np.int64)
    on_host = target.type == "cpu"
    chunk = _even(len(query), chunk, torch.get_num_threads() if on_host else 1)
    chunks = [query.rows(q, q + chunk) for q in range(0, len(query), chunk)]

    def window(slack: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Quick scores outside of it surely compare as exact ones do: (P,) float32 each."""
        slack = tolerance_at(key, slack[key_row], code)
        return (key - slack).astype(np.float32), (key + slack).astype(np.float32)

    def prepare(numbered: tuple[int, Features]) -> _Block:
        first, block = numbered
        slack = tolerance(query, block, code)
        own = np.flatnonzero((truth.index >= first) & (truth.index < first + len(block)))
        ends = np.searchsorted(row[own], range(0, len(query) + chunk, chunk))
        operand = right_operand(block, code, target)
        return _Block(first, block, operand, slack, *window(slack), own, ends)

    with full_precision(), single_threaded_pool() if on_host else nullcontext() as pool:
        lefts = [left_operand(part, code, target) for part in chunks]
        for block in _one_ahead(prepare, blocks):

            def compare(i: int, block: _Block = block) -> None:
                part, own, first = (
                    chunks[i],
                    block.own[block.ends[i] : block.ends[i + 1]],
                    i * chunk,
                )
                quick = quick_scores(lefts[i], block.operand, block.features, code)
                rows, columns = row[own] - first, truth.index[own] - block.first
                checked, known, error = _errors(
                    quick, rows, columns, quick_keys[own], part, block.features, code
                )
                low, high = block.low, block.high
                expected = tolerance_at(known, block.slack[checked + first], code)
                if not np.all(error <= expected / 2):  # also if it is NaN
                    slack = tolerance(query, block.features, code, certain=True)
                    low, high = window(slack)
                    _require(error, slack[checked + first])
                _exclude(quick, rows, columns)
                starts = start[first : first + len(part) + 1]
                positives = Positives(starts, *exact, low, high)
                given = positives, code, part.vectors, block.features.vectors, before
                if on_host:
                    count_block(quick.numpy(), block.first, *given)
                else:
                    count_on_device(quick, block.first, *given)

            list((pool.map if pool else map)(compare, range(len(chunks))))
            images(len(block.features))
    return before


class _Block(NamedTuple):
    """A block of the gallery, ready to be compared with every chunk of the queries.

    `low` and `high` are those of `Positives`, for all queries; `own` are the entries of the ground
    truth that lie in the block, those of chunk i from `ends[i]` on.
    """

    first: int
    features: Features
    operand: torch.Tensor
    slack: np.ndarray
    low: np.ndarray
    high: np.ndarray
    own: np.ndarray
    ends: np.ndarray


def _one_ahead(
    prepare: Callable[[tuple[int, Features]], _Block], blocks: Blocks
) -> Iterator[_Block]:
    """Read and prepare the next block in a thread while one is compared.

    Without it, all cores but one wait in between.
    """
    prepared = map(prepare, blocks)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, prepared, None)
        while (block := coming.result()) is not None:
            coming = thread.submit(next, prepared, None)
            yield block


def _even(queries: int, chunk: int, threads: int) -> int:
    """The greatest size up to `chunk` that gives each thread as many chunks."""
    rounds = -(-queries // (chunk * threads))
    return -(-queries // (rounds * threads))


def _errors(
    quick: torch.Tensor, rows: np.ndarray, columns: np.ndarray, exact: np.ndarray,
    part: Features, block: Features, code: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """The product's errors: rows and exact scores (n,) of some of its pairs, and their errors.

    The given exact scores are known; if they are few, some more are computed. Embeddings that
    break the tight bound, being nearly one constant, break it everywhere.
    """
    if len(rows) < PROBES:
        more = np.arange(0, len(part), -(-len(part) // PROBES))
        across, found = more % len(block), np.empty(len(more))
        score_pairs(code, part.vectors, block.vectors, more, across, found)
        if code == EUCLIDEAN:
            found -= part.norm[more] ** 2
        rows, columns = np.concatenate([rows, more]), np.concatenate([columns, across])
        exact = np.concatenate([exact, found])
    if quick.device.type == "cpu":
        return rows, exact, np.abs(quick.numpy()[rows, columns] - exact)
    where = torch.from_numpy(rows).to(quick.device), torch.from_numpy(columns).to(quick.device)
    return rows, exact, np.abs(quick[where].cpu().numpy() - exact)


def _exclude(quick: torch.Tensor, rows: np.ndarray, columns: np.ndarray) -> None:
    """Make the scores of images of the query's own identity infinite: they are not counted."""
    if quick.device.type == "cpu":
        quick.numpy()[rows, columns] = np.inf  # takes a fifth of the time that PyTorch takes
        return
    where = torch.from_numpy(rows).to(quick.device), torch.from_numpy(columns).to(quick.device)
    quick[where] = torch.inf


def _require(error: np.ndarray, slack: np.ndarray) -> None:
    """Raise if the product is worse than any float32 product can be."""
    wrong = np.flatnonzero(~(error <= slack))
    if len(wrong):
        raise RuntimeError(
            f"the matrix product is off by {error[wrong[0]]:.1e}, but float32 allows only "
            f"{slack[wrong[0]]:.1e}: is a lower precision forced on it?"
        )


def ranks_of(truth: GroundTruth, before: np.ndarray) -> np.ndarray:
    """Ranks (P,) from 1 of `ordered_positives`, from the images of others before each."""
    return before + nth(truth.positives())


def nth(start: np.ndarray) -> np.ndarray:
    """1, 2, … for each query's positives, which start at `start`."""
    return np.arange(1, start[-1] + 1) - np.repeat(start[:-1], np.diff(start))


def top_matches(
    query: np.ndarray,
    gallery: np.ndarray,
    query_pid: np.ndarray,
    query_camid: np.ndarray,
    gallery_pid: np.ndarray,
    gallery_camid: np.ndarray,
    *,
    k: int = 10,
    metric: Metric = "cosine",
) -> np.ndarray:
    """Gallery indices (Q, k) closest to each query, without junk, in the order that `rank` counts.

    Fewer columns if a query has fewer than k images left.
    """
    code, labels = metric_code(metric), Labels(query_pid, query_camid, gallery_pid, gallery_camid)
    queries, base = check_inputs(query, gallery, labels)
    cpu = torch.device("cpu")
    right, slack = right_operand(base, code, cpu), tolerance(queries, base, code, certain=True)
    chosen = []
    with full_precision():
        for q in range(len(queries)):
            valid = np.flatnonzero(
                (labels.gallery_pid != labels.query_pid[q])
                | (labels.gallery_camid != labels.query_camid[q])
            )
            left = left_operand(queries.rows(q, q + 1), code, cpu)
            near = quick_scores(left, right, base, code)[0].numpy()[valid].astype(np.float64)
            if len(valid) > k:
                kth = np.partition(near, k - 1)[k - 1]
                valid = valid[near <= kth + 2 * slack[q]]
            exact = _exact_scores(queries, base, code, np.full(len(valid), q), valid)
            chosen.append(valid[np.argsort(exact, kind="stable")[:k]])
    width = min(map(len, chosen))
    return np.stack([row[:width] for row in chosen])
