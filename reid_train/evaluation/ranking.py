"""Retrieval metrics without sorting: every positive's rank is counted, exactly.

The order of a query's gallery is that of scores in float64, equal scores by gallery index, as a
stable sort would put them. Nobody computes all those scores. A float32 matrix product gives
nearly all comparisons for sure, and the few pairs within its error of a positive are scored
again in float64, always summed in the same order. So ranks do not depend on the device, the
chunks or the workers that the gallery is split over: counts of parts just add up.

Two passes over the gallery, in blocks: `score_own` finds the positives' scores, `count_before`
counts who comes before them. `rank` runs both in one process, `distributed` over many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from data_shards.errors import DataError
from reid_train.evaluation.ground_truth import Labels, Matches, find_matches
from reid_train.evaluation.kernels import rank_counts as counting
from reid_train.evaluation.kernels.device_rank_counts import count_block_on_device
from reid_train.evaluation.metrics import RankingResult, metrics_of
from reid_train.evaluation.similarity import (
    Metric,
    Side,
    check_dimensions,
    checked_side,
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
from reid_train.evaluation.verification import tar_at_far

BLOCK = 2048  # gallery items a product; they and their scores stay in the cache meanwhile
CHUNK = 256  # queries a product: more, and threads wait longer for the last one of a block
PROBES = 32  # scores of a product that are checked at least

Blocks = Iterable[tuple[int, Side]]
"""Stretches of the gallery: index of the first item, and W of them."""


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
    false_accept_rates: Sequence[float] = (),
    chunk: int = CHUNK,
    device: str | torch.device = "cpu",
    progress: Callable[[int], object] = lambda pairs: None,
) -> RankingResult:
    """Measure how well the gallery answers the queries (METHOD §6).

    Args:
        query: (Q, D) float32 embeddings, of any length for the cosine.
        gallery: (G, D) float32.
        query_pid, query_camid, gallery_pid, gallery_camid: (Q,) and (G,) integers.
        metric: "cosine" or "euclidean".
        max_rank: length of the CMC.
        false_accept_rates: give the true accept rate at these, at the price of a second product.
        chunk: queries at a time; memory grows with it, results do not change.
        device: where the product and the counting run.
        progress: told how many pairs of query and gallery item have been compared since.

    Raises:
        DataError: NaN or infinite embeddings, differing dimensions, an empty side, or no query
            with a match.
    """
    labels = Labels(query_pid, query_camid, gallery_pid, gallery_camid)
    start, ranks = ranks_within(query, gallery, labels, metric, chunk, device, progress)
    result = metrics_of(start, ranks, max_rank)
    if not false_accept_rates:
        return result
    sides = (
        Side.of(np.ascontiguousarray(query, np.float32)),
        Side.of(np.ascontiguousarray(gallery, np.float32)),
    )
    rates = tar_at_far(*sides, find_matches(labels), metric, false_accept_rates, chunk)
    return replace(result, tar_at_far=rates)


def ranks_within(
    query: np.ndarray,
    gallery: np.ndarray,
    labels: Labels,
    metric: Metric,
    chunk: int = CHUNK,
    device: str | torch.device = "cpu",
    progress: Callable[[int], object] = lambda pairs: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of all positives; arguments and errors as for `rank`.

    Returns:
        (Q + 1,) where each query's positives start, and their ranks (P,) from 1, ascending.
    """
    side, base = checked_side("query", query), checked_side("gallery", gallery)
    check_agreement(labels, side, base)
    matches = find_matches(labels)
    scores = score_own(side, [(0, base)], matches, metric)
    blocks = ((first, base.rows(first, first + BLOCK)) for first in range(0, len(gallery), BLOCK))
    before = count_before(side, blocks, matches, scores, metric, chunk, device, progress)
    return matches.positives(), ranks_of(matches, before)


def check_agreement(labels: Labels, query: Side, gallery: Side) -> None:
    """Raise `DataError` where labels and embeddings, or both sides' dimensions, differ."""
    for name, side, pid in (
        ("query", query, labels.query_pid),
        ("gallery", gallery, labels.gallery_pid),
    ):
        if len(side.norm) != len(pid):
            raise DataError(f"{name}: {len(side.norm)} embeddings but {len(pid)} labels")
    check_dimensions(query, gallery)


def score_own(query: Side, blocks: Blocks, matches: Matches, metric: Metric) -> np.ndarray:
    """First pass: the exact scores (M,) float64 of all `matches` that lie in the blocks.

    Entries of other blocks stay NaN.
    """
    code, row = metric_code(metric), matches.row
    scores = np.full(len(row), np.nan)
    for first, block in blocks:
        here = np.flatnonzero((matches.index >= first) & (matches.index < first + len(block.norm)))
        rows, columns, found = row[here], matches.index[here] - first, np.empty(len(here))

        def score(a: int, b: int, block=block, rows=rows, columns=columns, found=found) -> None:
            counting.score_pairs(
                code, query.embedding, block.embedding, query.scale, block.scale,
                rows[a:b], columns[a:b], found[a:b],
            )  # fmt: skip

        in_threads(score, len(here))
        scores[here] = found
    return scores


def ordered_positives(matches: Matches, scores: np.ndarray) -> np.ndarray:
    """Entries of `matches` that are positives, for each query from the closest to the furthest."""
    kept = np.flatnonzero(matches.positive)  # equal scores stay as they are: by index
    return kept[np.lexsort((scores[kept], matches.row[kept]))]


def count_before(
    query: Side,
    blocks: Blocks,
    matches: Matches,
    scores: np.ndarray,
    metric: Metric,
    chunk: int = CHUNK,
    device: str | torch.device = "cpu",
    progress: Callable[[int], object] = lambda pairs: None,
) -> np.ndarray:
    """Second pass: how many items of other identities come before each positive.

    Args:
        scores: (M,) float64, from `score_own`, of the whole gallery.

    Returns:
        (P,) int64 counts within these blocks, in the order of `ordered_positives`.
    """
    code, target = metric_code(metric), torch.empty(0, device=device).device  # with its index
    # In the product's terms, which leave out ‖q‖².
    own_row = matches.row
    own_quick = scores - query.norm[own_row] ** 2 if code == counting.EUCLIDEAN else scores
    order = ordered_positives(matches, scores)
    key, index, start = scores[order], matches.index[order], matches.positives()
    quick_key, row = own_quick[order], own_row[order]
    before = np.zeros(len(order), np.int64)
    on_host = target.type == "cpu"
    count = count_on_host if on_host else count_block_on_device
    chunk = _even(len(query.norm), chunk, torch.get_num_threads() if on_host else 1)
    parts = [query.rows(q, q + chunk) for q in range(0, len(query.norm), chunk)]

    def prepare(numbered: tuple[int, Side]) -> _Block:
        first, side = numbered
        slack = tolerance(query, side, code)
        bounds = _window(quick_key, tolerance_at(quick_key, slack[row], code))
        own = np.flatnonzero((matches.index >= first) & (matches.index < first + len(side.norm)))
        ends = np.searchsorted(own_row[own], range(0, len(query.norm) + chunk, chunk))
        return _Block(first, side, right_operand(side, code, target), slack, *bounds, own, ends)

    with full_precision(), single_threaded_pool() if on_host else nullcontext() as pool:
        lefts = [left_operand(part, code, target) for part in parts]
        for block in _one_ahead(prepare, blocks):

            def compare(i: int, block: _Block = block) -> int:
                part, mine = parts[i], block.own[block.ends[i] : block.ends[i + 1]]
                quick = quick_scores(lefts[i], block.right, block.side, code)
                rows, columns = own_row[mine] - i * chunk, matches.index[mine] - block.first
                checked, exact, error = _check(
                    quick, rows, columns, own_quick[mine], part, block.side, code
                )
                low, high = block.low, block.high
                expected = tolerance_at(exact, block.slack[checked + i * chunk], code)
                if not np.all(error <= expected / 2):  # NaN, too
                    slack = tolerance(query, block.side, code, certain=True)
                    low, high = _window(quick_key, tolerance_at(quick_key, slack[row], code))
                    _require(error, slack[checked + i * chunk])
                _take_out(quick, rows, columns)
                count(
                    quick, block.first, start[i * chunk : i * chunk + len(part.norm) + 1],
                    key, index, low, high, code, part.embedding, block.side.embedding,
                    part.scale, block.side.scale, before,
                )  # fmt: skip
                return len(part.norm) * len(block.side.norm)

            for pairs in (pool.map if pool else map)(compare, range(len(parts))):
                progress(pairs)
    return before


class _Block(NamedTuple):
    """A stretch of the gallery, ready to be compared with every chunk of the queries.

    `low` and `high` are of all positives, as in `counting.count_block`; `own` are those entries of
    the matches that lie in the block, chunk i's from `ends[i]` on.
    """

    first: int
    side: Side
    right: torch.Tensor
    slack: np.ndarray
    low: np.ndarray
    high: np.ndarray
    own: np.ndarray
    ends: np.ndarray


def _one_ahead(prepare: Callable[[tuple[int, Side]], _Block], blocks: Blocks) -> Iterator[_Block]:
    """The next block is read and laid out in a thread while one is compared.

    Done in between, it would keep all cores but one waiting.
    """
    prepared = map(prepare, blocks)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, prepared, None)
        while (block := coming.result()) is not None:
            coming = thread.submit(next, prepared, None)
            yield block


def _window(score: np.ndarray, slack: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quick scores outside of it compare with the exact `score` for sure: (P,) float32, twice."""
    return (score - slack).astype(np.float32), (score + slack).astype(np.float32)


def _even(queries: int, chunk: int, threads: int) -> int:
    """The greatest chunk up to `chunk` of which each thread gets as many."""
    rounds = -(-queries // (chunk * threads))
    return -(-queries // (rounds * threads))


def _check(
    quick: torch.Tensor, rows: np.ndarray, columns: np.ndarray, exact: np.ndarray,
    part: Side, block: Side, code: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """How good the product is: rows and exact scores (n,) of some of its pairs, and their errors.

    Those given are known; where they are few, some more are found out. What breaks the tight bound,
    embeddings that are nearly one constant, breaks it everywhere.
    """
    if len(rows) < PROBES:
        more = np.arange(0, len(part.norm), -(-len(part.norm) // PROBES))
        across, found = more % len(block.norm), np.empty(len(more))
        counting.score_pairs(
            code, part.embedding, block.embedding, part.scale, block.scale, more, across, found
        )
        if code == counting.EUCLIDEAN:
            found -= part.norm[more] ** 2
        rows, columns = np.concatenate([rows, more]), np.concatenate([columns, across])
        exact = np.concatenate([exact, found])
    if quick.device.type == "cpu":
        return rows, exact, np.abs(quick.numpy()[rows, columns] - exact)
    where = torch.from_numpy(rows).to(quick.device), torch.from_numpy(columns).to(quick.device)
    return rows, exact, np.abs(quick[where].cpu().numpy() - exact)


def _take_out(quick: torch.Tensor, rows: np.ndarray, columns: np.ndarray) -> None:
    """Make the scores of items of the query's own identity infinite: those are not counted."""
    if quick.device.type == "cpu":
        quick.numpy()[rows, columns] = np.inf  # a fifth of the time that PyTorch takes for it
        return
    where = torch.from_numpy(rows).to(quick.device), torch.from_numpy(columns).to(quick.device)
    quick[where] = torch.inf


def _require(error: np.ndarray, slack: np.ndarray) -> None:
    """Raise if the product is worse than any float32 product can be."""
    wrong = np.flatnonzero(~(error <= slack))
    if len(wrong):
        raise RuntimeError(
            f"the matrix product is off by {error[wrong[0]]:.1e}, where float32 allows "
            f"{slack[wrong[0]]:.1e}: is a lower precision forced on it, or are lengths extreme?"
        )


def count_on_host(
    scores: torch.Tensor, first: int, start: np.ndarray, key: np.ndarray, index: np.ndarray,
    low: np.ndarray, high: np.ndarray, metric: int, query: np.ndarray, block: np.ndarray,
    query_scale: np.ndarray, block_scale: np.ndarray, before: np.ndarray,
) -> None:  # fmt: skip
    """`counting.count_block` in threads, a stretch of the queries each."""
    host = scores.numpy()

    def count(a: int, b: int) -> None:
        counting.count_block(
            host[a:b], first, start[a : b + 1], key, index, low, high, metric, query[a:b], block,
            query_scale[a:b], block_scale, before,
        )  # fmt: skip

    in_threads(count, len(host))


def ranks_of(matches: Matches, before: np.ndarray) -> np.ndarray:
    """Ranks (P,) from 1 of `ordered_positives`: those before it, its fellows included, and 1."""
    start = matches.positives()
    fellows = np.arange(start[-1]) - np.repeat(start[:-1], np.diff(start))
    return before + fellows + 1


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
    """Gallery indices (Q, k) closest to each query, junk left out, in the order `rank` counts.

    Fewer columns where a query has fewer than k items left.
    """
    labels = Labels(query_pid, query_camid, gallery_pid, gallery_camid)
    code = metric_code(metric)
    side, base = checked_side("query", query), checked_side("gallery", gallery)
    check_agreement(labels, side, base)
    cpu = torch.device("cpu")
    right = right_operand(base, code, cpu)
    slack = tolerance(side, base, code, certain=True)
    chosen = []
    with full_precision():
        for q in range(len(side.norm)):
            valid = np.flatnonzero(
                (labels.gallery_pid != labels.query_pid[q])
                | (labels.gallery_camid != labels.query_camid[q])
            )
            left = left_operand(side.rows(q, q + 1), code, cpu)
            near = quick_scores(left, right, base, code)[0].numpy()[valid].astype(np.float64)
            if len(valid) > k:
                kth = np.partition(near, k - 1)[k - 1]
                valid = valid[near <= kth + 2 * slack[q]]
            exact = np.empty(len(valid))
            counting.score_pairs(
                code, side.embedding, base.embedding, side.scale, base.scale,
                np.full(len(valid), q), valid, exact,
            )  # fmt: skip
            chosen.append(valid[np.argsort(exact, kind="stable")[:k]])
    width = min(map(len, chosen))
    return np.stack([row[:width] for row in chosen])
