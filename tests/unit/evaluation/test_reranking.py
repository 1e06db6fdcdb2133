"""Re-ranking: the golden distances, and sparse against dense."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import dense_reranking, dense_scores

from data_shards.errors import ConfigError, DataError
from reid_train.evaluation import neighbours, reranking
from reid_train.evaluation.ground_truth import Labels
from reid_train.evaluation.measures import METRICS, Measures
from reid_train.evaluation.neighbours import all_pairs, merge, nearest_neighbours
from reid_train.evaluation.reranking import rank_distances, rerank
from reid_train.evaluation.similarity import Features

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "evaluation.npz", allow_pickle=False)


def reranked(query, gallery, **settings) -> np.ndarray:
    blocks = rerank(query, gallery, Measures(**settings))
    return np.concatenate([block for _, block in blocks])


def drawn(seed: int, count: int, metric: str) -> np.ndarray:
    """Small integers, so that every arithmetic agrees on ties; every third row a duplicate."""
    draw = np.random.default_rng(seed)
    choices = [-1.0, 1.0] if metric == "cosine" else [-2.0, -1.0, 0.0, 1.0, 2.0]
    rows = draw.choice(choices, (count, 16)).astype(np.float32)
    rows[::3] = rows[draw.integers(0, count, len(rows[::3]))]
    return rows


def test_golden_distances_are_matched():
    found = reranked(GOLDEN["query_embedding"], GOLDEN["gallery_embedding"])
    np.testing.assert_allclose(found, GOLDEN["reranked_distance"], atol=1e-5)


def test_golden_metrics_are_matched():
    labels = Labels(
        *(GOLDEN[f"{side}_{name}"] for side in ("query", "gallery") for name in ("pid", "camid"))
    )
    blocks = rerank(GOLDEN["query_embedding"], GOLDEN["gallery_embedding"])
    result = rank_distances(blocks, labels, max_rank=20)
    assert result.mAP == pytest.approx(float(GOLDEN["reranked_mAP"]), abs=1e-6)
    np.testing.assert_allclose(result.cmc, GOLDEN["reranked_cmc"], atol=1e-6)


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**32),
    queries=st.integers(1, 15),
    gallery=st.integers(10, 60),
    k1=st.integers(1, 10),
    k2=st.integers(1, 6),
    weight=st.sampled_from([0.0, 0.3, 1.0]),
    metric=st.sampled_from(sorted(METRICS)),
    block=st.sampled_from([5, 16, 2048]),
    chunk=st.sampled_from([4, 512]),
    kept=st.sampled_from([0, 1 << 28]),
)
def test_sparse_reranking_equals_dense(
    seed, queries, gallery, k1, k2, weight, metric, block, chunk, kept
):
    both = drawn(seed, queries + gallery, metric)
    query, base = both[:queries], both[queries:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "BLOCK", block)
        patch.setattr(reranking, "CHUNK", chunk)
        patch.setattr(reranking, "KEPT", kept)
        found = reranked(query, base, metric=metric, k1=k1, k2=k2, weight=weight)
    expected = dense_reranking(query, base, metric, k1, k2, weight)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_random_embeddings_agree_with_dense(metric):
    draw = np.random.default_rng(0)
    center = draw.standard_normal((30, 64))
    both = center[draw.integers(0, 30, 400)] + 0.7 * draw.standard_normal((400, 64))
    query, base = both[:50].astype(np.float32), both[50:].astype(np.float32)
    expected = dense_reranking(query, base, metric, 20, 6, 0.3)
    np.testing.assert_allclose(reranked(query, base, metric=metric), expected, atol=1e-5)


def test_images_all_alike_are_all_equally_far():
    found = reranked(np.ones((5, 8), np.float32), np.ones((200, 8), np.float32))
    expected = dense_reranking(
        np.ones((5, 8), np.float32), np.ones((200, 8), np.float32), "euclidean", 20, 6, 0.3
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("block", [64, 512])  # too few strips to know limits early, and enough
@pytest.mark.parametrize("metric", sorted(METRICS))
def test_nearest_neighbours_are_the_first_of_a_stable_sort(monkeypatch, metric, block):
    monkeypatch.setattr(neighbours, "BLOCK", block)
    rows = drawn(1, 700, metric)
    found = nearest_neighbours(Features.of(rows), 12, METRICS[metric], all_pairs(700))
    order = np.argsort(dense_scores(rows, rows, metric), axis=1, kind="stable")
    np.testing.assert_array_equal(found.index, order[:, :12])


def test_neighbours_are_the_same_bits_on_any_number_of_threads(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 32)
    features = Features.of(np.random.default_rng(0).integers(-1, 2, (400, 16)).astype(np.float32))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(nearest_neighbours(features, 9, METRICS["cosine"], all_pairs(400)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for name in ("index", "score", "furthest"):
            np.testing.assert_array_equal(getattr(other, name), getattr(found[0], name))


def test_neighbours_from_parts_of_the_blocks_merge_to_the_same_bits(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 64)
    rows = np.random.default_rng(0).standard_normal((500, 32)).astype(np.float32)
    features, blocks = Features.of(rows), all_pairs(500)
    whole = nearest_neighbours(features, 9, METRICS["cosine"], blocks)
    parts = [nearest_neighbours(features, 9, METRICS["cosine"], blocks[i::3]) for i in range(3)]
    merged = functools.reduce(merge, parts)
    np.testing.assert_array_equal(merged.index, whole.index)
    np.testing.assert_array_equal(merged.score, whole.score)
    np.testing.assert_array_equal(merged.furthest, whole.furthest)


@pytest.mark.parametrize("metric", sorted(METRICS))
@pytest.mark.parametrize("queries", [1, 63, 64, 65, 200])
def test_scores_kept_and_computed_again_give_the_same_bits(monkeypatch, metric, queries):
    monkeypatch.setattr(neighbours, "BLOCK", 64)
    monkeypatch.setattr(reranking, "CHUNK", 10)
    rows = np.random.default_rng(0).standard_normal((300, 32)).astype(np.float32)
    kept = reranked(rows[:queries], rows[queries:], metric=metric)
    monkeypatch.setattr(reranking, "KEPT", 0)
    again = reranked(rows[:queries], rows[queries:], metric=metric)
    np.testing.assert_array_equal(kept, again)


def test_progress_reaches_its_end():
    seen = []
    list(
        rerank(
            GOLDEN["query_embedding"], GOLDEN["gallery_embedding"],
            progress=lambda stage, done, total: seen.append((stage, done, total)),
        )
    )  # fmt: skip
    assert seen[-1] == ("distances", 120, 120)
    assert ("neighbours", 1020**2, 1020**2) in seen


@pytest.mark.parametrize("settings", [{"k1": 50}, {"k1": 0}, {"weight": 1.5}, {"k2": 60}])
def test_senseless_settings_are_an_error(settings):
    with pytest.raises(ConfigError, match="re-ranking"):
        reranked(np.ones((5, 8), np.float32), np.ones((40, 8), np.float32), **settings)


def test_nan_embeddings_are_an_error():
    with pytest.raises(DataError, match="gallery embedding 1 has NaN"):
        reranked(np.ones((5, 8), np.float32), np.float32([[1] * 8, [np.nan] * 8]))
