"""Ranking: the golden numbers, and counting against sorting."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import dense_scores, sorted_metrics

from data_shards.errors import ConfigError, DataError
from reid_train.evaluation import ranking, similarity
from reid_train.evaluation.evaluate import evaluate
from reid_train.evaluation.ground_truth import Labels
from reid_train.evaluation.kernels import rank_counts
from reid_train.evaluation.measures import Measures
from reid_train.evaluation.metrics import MEAN, by_name, of_each_dataset
from reid_train.evaluation.ranking import rank, top_matches
from reid_train.evaluation.reranking import rank_distances
from reid_train.evaluation.similarity import full_precision

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "evaluation.npz", allow_pickle=False)
METRICS = ("cosine", "euclidean")


def golden_labels() -> Labels:
    return Labels(
        *(GOLDEN[f"{side}_{name}"] for side in ("query", "gallery") for name in ("pid", "camid"))
    )


def golden_rank(**options):
    both = GOLDEN["query_embedding"], GOLDEN["gallery_embedding"]
    return rank(*both, golden_labels(), **options)


def problem(seed: int, queries: int, gallery: int, pids: int, cameras: int, values: int):
    """Embeddings of few small integers: exact in any arithmetic, with ties and duplicates."""
    draw = np.random.default_rng(seed)
    # 16 values of ±1, ±3, … would have other lengths; ±1 alone gives cosines exact in float32.
    embeddings = [
        draw.choice([-1.0, 1.0], (n, 16)).astype(np.float32)
        if values == 2
        else draw.integers(-values, values + 1, (n, 16)).astype(np.float32)
        for n in (queries, gallery)
    ]
    labels = Labels(
        draw.integers(0, pids, queries), draw.integers(0, cameras, queries),
        draw.integers(0, pids, gallery), draw.integers(0, cameras, gallery),
    )  # fmt: skip
    # One query at least has a match.
    labels.gallery_pid[0], labels.gallery_camid[0] = labels.query_pid[0], labels.query_camid[0] + 1
    return *embeddings, labels


def assert_same(result, expected) -> None:
    np.testing.assert_array_equal(result.first_match_rank, expected["first"])
    np.testing.assert_allclose(result.average_precision, expected["precision"], rtol=1e-12)
    np.testing.assert_allclose(result.inverse_negative_penalty, expected["penalty"], rtol=1e-12)
    np.testing.assert_allclose(result.cmc, expected["cmc"], rtol=1e-12)
    assert result.mAP == pytest.approx(np.nanmean(expected["precision"]), rel=1e-12)
    assert result.mINP == pytest.approx(np.nanmean(expected["penalty"]), rel=1e-12)


def test_golden_metrics_are_matched():
    result = golden_rank(max_rank=20)
    assert result.mAP == pytest.approx(float(GOLDEN["mAP"]), abs=1e-6)
    np.testing.assert_allclose(result.cmc, GOLDEN["cmc"], atol=1e-6)


def test_golden_reranked_distances_give_the_golden_metrics():
    result = rank_distances([(0, GOLDEN["reranked_distance"].copy())], golden_labels(), max_rank=20)
    assert result.mAP == pytest.approx(float(GOLDEN["reranked_mAP"]), abs=1e-6)
    np.testing.assert_allclose(result.cmc, GOLDEN["reranked_cmc"], atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    queries=st.integers(1, 12),
    gallery=st.integers(1, 80),
    pids=st.integers(1, 8),
    metric=st.sampled_from(METRICS),
    chunk=st.sampled_from([1, 5, 512]),
    block=st.sampled_from([1, 7, 8192]),
)
def test_counting_ranks_as_a_stable_sort_does(seed, queries, gallery, pids, metric, chunk, block):
    values = 2 if metric == "cosine" else 1
    query, base, labels = problem(seed, queries, gallery, pids, 3, values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "BLOCK", block)
        patch.setattr(ranking, "HOST", ranking.HOST._replace(chunk=chunk, block=block))
        result = rank(query, base, labels, metric=metric, max_rank=9)
    assert_same(result, sorted_metrics(dense_scores(query, base, metric), labels, 9))


@pytest.mark.parametrize("metric", METRICS)
def test_many_positives_are_ranked_as_a_stable_sort_does(metric):
    query, base, labels = problem(3, 6, 900, 2, 3, 2 if metric == "cosine" else 3)
    result = rank(query, base, labels, metric=metric, max_rank=9)
    assert_same(result, sorted_metrics(dense_scores(query, base, metric), labels, 9))


@pytest.mark.parametrize("metric", METRICS)
def test_ranks_are_those_of_double_precision(metric):
    # Differences between gallery items are far below what float32 products can tell.
    draw = np.random.default_rng(0)
    center = draw.standard_normal(256)
    query = (center + 1e-3 * draw.standard_normal((20, 256))).astype(np.float32)
    base = (center + 1e-5 * draw.standard_normal((3000, 256))).astype(np.float32)
    labels = Labels(
        draw.integers(0, 40, 20), np.zeros(20, int), draw.integers(0, 40, 3000), np.ones(3000, int)
    )
    distance = ((query[:, None].astype(np.float64) - base[None]) ** 2).sum(-1)
    if metric == "cosine":
        distance = dense_scores(query, base, metric)
    result = rank(query, base, labels, metric=metric, max_rank=9)
    assert_same(result, sorted_metrics(distance, labels, 9))


def test_distances_that_leave_a_query_out_are_an_error():
    distances = GOLDEN["reranked_distance"][:50].copy()
    with pytest.raises(DataError, match="no distances of query 50"):
        rank_distances([(0, distances)], golden_labels())


@pytest.mark.parametrize("metric", METRICS)
def test_a_collapsed_model_is_ranked_by_gallery_index(metric):
    _, _, labels = problem(5, 10, 300, 5, 3, 2)
    result = rank(
        np.ones((10, 8), np.float32), np.ones((300, 8), np.float32), labels,
        metric=metric, max_rank=9,
    )  # fmt: skip
    assert_same(result, sorted_metrics(np.zeros((10, 300)), labels, 9))


def test_queries_of_a_dataset_have_the_figures_that_they_have_by_themselves():
    query, gallery, labels = problem(5, 30, 200, 12, 3, 8)
    whole, origin = rank(query, gallery, labels), np.arange(30) % 3
    found = of_each_dataset(whole, ["a", "b", "c", "none"], origin)
    assert list(found) == ["a", "b", "c", MEAN]
    for number, name in enumerate("abc"):
        own = origin == number
        part = Labels(
            labels.query_pid[own], labels.query_camid[own], labels.gallery_pid, labels.gallery_camid
        )
        assert found[name] == pytest.approx(rank(query[own], gallery, part).summary())
    for measure, mean in found[MEAN].items():
        assert mean == pytest.approx(np.mean([found[name][measure] for name in "abc"]))
    assert by_name({"a": found["a"]}) == {
        "mAP/a": found["a"]["mAP"],
        "rank-1/a": found["a"]["rank-1"],
    }
    assert of_each_dataset(whole, ["a"], np.zeros(30, int)) == {}


def test_gallery_of_zeros_is_ranked_by_index():
    query = np.random.default_rng(0).standard_normal((6, 9)).astype(np.float32)
    labels = Labels([1] * 6, [0] * 6, [0, 1], [1, 1])
    result = rank(query, np.zeros((2, 9), np.float32), labels, metric="euclidean")
    assert result.mAP == 0.5


def test_zero_embeddings_are_as_far_as_orthogonal_ones():
    labels = Labels([0], [0], [0, 1, 0], [1, 1, 1])
    base = np.float32([[0, 0], [0, 1], [-1, 0]])
    result = rank(np.float32([[1, 0]]), base, labels)
    assert result.average_precision[0] == pytest.approx((1 / 1 + 2 / 3) / 2)


@pytest.fixture
def accelerator(monkeypatch) -> list[int]:
    """Count as on an accelerator, which works on any device that torch has.

    Returns how many pairs the host scored again, chunk by chunk.
    """
    way, score, again = ranking.DEVICE._replace(block=64, chunk=8), rank_counts.score_pairs, []
    monkeypatch.setattr(ranking, "choose_way", lambda device: way)

    def counted(*arguments) -> None:
        if sys._getframe(1).f_code is rank_counts.count_on_device.__code__:
            again.append(len(arguments[3]))
        score(*arguments)

    monkeypatch.setattr(rank_counts, "score_pairs", counted)
    return again


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("values", [2, 3])
def test_counts_on_an_accelerator_are_those_of_the_cpu(accelerator, metric, values):
    query, base, labels = problem(7, 40, 500, 6, 3, values)
    result = rank(query, base, labels, metric=metric)
    assert sum(accelerator) > 0  # ties
    expected = evaluate(query, base, labels, Measures(metric=metric)).result
    np.testing.assert_array_equal(result.average_precision, expected.average_precision)


@pytest.mark.parametrize("metric", METRICS)
def test_an_accelerator_leaves_few_pairs_to_the_host_beside_ties(accelerator, metric):
    # As of an untrained network: differences are far below what float32 products can tell.
    draw = np.random.default_rng(0)
    center = 10 * draw.standard_normal(256)
    query, base = (
        (center + scale * draw.standard_normal((n, 256))).astype(np.float32)
        for n, scale in ((20, 1e-3), (3000, 1e-2))
    )
    labels = Labels(
        draw.integers(0, 40, 20), np.zeros(20, int), draw.integers(0, 40, 3000), np.ones(3000, int)
    )
    result = rank(query, base, labels, metric=metric)
    assert sum(accelerator) < 20 * 3000 / 1000
    distance = ((query[:, None].astype(np.float64) - base[None]) ** 2).sum(-1)
    if metric == "cosine":
        distance = dense_scores(query, base, metric)
    assert_same(result, sorted_metrics(distance, labels, 50))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("metric", METRICS)
def test_cuda_gives_the_metrics_of_the_cpu(metric):
    host, device = golden_rank(metric=metric), golden_rank(metric=metric, device="cuda")
    np.testing.assert_array_equal(host.average_precision, device.average_precision)


@pytest.mark.parametrize("backend", [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul])
def test_products_are_float32_where_a_backend_was_set_to_less(backend):
    before = backend.fp32_precision
    backend.fp32_precision = "tf32"
    try:
        with full_precision():
            assert backend.fp32_precision == "ieee"
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before


def test_products_are_float32_where_training_is_allowed_less():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("way", "less"), [("HOST", torch.bfloat16), ("DEVICE", torch.float32)])
def test_a_product_less_precise_than_it_should_be_is_noticed(monkeypatch, way, less):
    product, chosen = similarity.quick_scores, getattr(ranking, way)

    def rounded(*operands) -> torch.Tensor:
        return product(*operands).to(less).to(chosen.dtype)

    monkeypatch.setattr(ranking, "choose_way", lambda device: chosen)
    monkeypatch.setattr(similarity, "quick_scores", rounded)
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="is a lower one forced on it"):
        golden_rank()
    assert torch.get_num_threads() == threads


def test_chunks_do_not_change_a_bit(monkeypatch):
    whole = golden_rank()
    monkeypatch.setattr(ranking, "HOST", ranking.HOST._replace(chunk=7))
    parts = golden_rank()
    np.testing.assert_array_equal(whole.average_precision, parts.average_precision)


def test_threads_do_not_change_a_bit_and_are_given_back(monkeypatch):
    monkeypatch.setattr(ranking, "HOST", ranking.HOST._replace(chunk=7))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(golden_rank().average_precision)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(*results)


def test_queries_without_a_match_are_left_out_of_the_means():
    labels = Labels([0, 1], [0, 0], [0, 5, 1], [1, 1, 0])
    query = np.float32([[1, 0], [0, 1]])
    result = rank(query, np.float32([[0, 1], [1, 0], [1, 1]]), labels)
    assert result.valid == 1
    assert np.isnan(result.average_precision[1])
    assert result.first_match_rank[1] == 0
    assert result.summary()["mAP"] == result.average_precision[0]


def test_junk_neither_helps_nor_hurts():
    query, base, labels = problem(1, 8, 60, 4, 3, 2)
    before = rank(query, base, labels)
    junk = Labels(
        labels.query_pid, labels.query_camid,
        np.concatenate([labels.gallery_pid, labels.query_pid[:1]]),
        np.concatenate([labels.gallery_camid, labels.query_camid[:1]]),
    )  # fmt: skip
    after = rank(query, np.concatenate([base, query[:1]]), junk)
    assert after.average_precision[0] == before.average_precision[0]


def test_camera_pairs_are_ranked_independently():
    query, base, labels = problem(2, 30, 200, 6, 3, 2)
    pairs = evaluate(query, base, labels, Measures(max_rank=9, camera_pairs=True)).pairs
    assert all(a != b for a, b in pairs)
    for (asked, seen), result in pairs.items():
        q, g = labels.query_camid == asked, labels.gallery_camid == seen
        part = Labels(
            labels.query_pid[q], labels.query_camid[q], labels.gallery_pid[g],
            labels.gallery_camid[g],
        )  # fmt: skip
        assert_same(result, sorted_metrics(dense_scores(query[q], base[g], "cosine"), part, 9))


@pytest.mark.parametrize("metric", METRICS)
def test_true_accept_rate_matches_the_sorted_impostors(metric):
    labels = golden_labels()
    measures = Measures(metric=metric, false_accept_rates=(1e-3, 1e-2, 0.1))
    both = GOLDEN["query_embedding"], GOLDEN["gallery_embedding"]
    rates = evaluate(*both, labels, measures).result.tar_at_far
    assert rates is not None
    distance = dense_scores(GOLDEN["query_embedding"], GOLDEN["gallery_embedding"], metric)
    same = labels.query_pid[:, None] == labels.gallery_pid
    genuine = distance[same & (labels.query_camid[:, None] != labels.gallery_camid)]
    impostor = np.sort(distance[~same])
    for rate, tar in rates.items():
        limit = impostor[int(rate * len(impostor))]
        assert tar == pytest.approx(np.mean(genuine < limit), abs=2e-3)


@pytest.mark.parametrize("metric", METRICS)
def test_top_matches_are_the_first_of_a_stable_sort(metric):
    query, base, labels = problem(4, 12, 300, 5, 3, 2 if metric == "cosine" else 1)
    found = top_matches(query, base, labels, k=10, metric=metric)
    distance = dense_scores(query, base, metric)
    for i in range(len(query)):
        junk = (labels.gallery_pid == labels.query_pid[i]) & (
            labels.gallery_camid == labels.query_camid[i]
        )
        order = np.argsort(distance[i], kind="stable")
        np.testing.assert_array_equal(found[i], order[~junk[order]][:10])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gallery": np.full((3, 2), np.nan, np.float32)}, "gallery embedding 0 has NaN"),
        ({"query": np.float32([[1, 2], [np.inf, 0]])}, "query embedding 1 has NaN or infinite"),
        ({"gallery": np.ones((3, 5), np.float32)}, "2 dimensions, those of the gallery 5"),
        ({"gallery": np.ones((4, 2), np.float32)}, "4 embeddings but 3 labels"),
        ({"gallery_pid": np.array([7, 8, 9])}, "no valid query"),
        (
            {"gallery_pid": np.array([0.0, 1, 2])},
            "gallery_pid must be integers of .*not float64",
        ),
        (
            {"gallery_camid": np.array([1, 1])},
            "3 identities but gallery_camid 2 cameras",
        ),
        ({"query": np.ones(2, np.float32)}, "must be a matrix"),
    ],
)
def test_bad_input_says_what_is_wrong(change, message):
    arguments = {
        "query": np.ones((2, 2), np.float32), "gallery": np.ones((3, 2), np.float32),
        "query_pid": np.array([0, 1]), "query_camid": np.array([0, 0]),
        "gallery_pid": np.array([0, 1, 2]), "gallery_camid": np.array([1, 1, 1]),
    }  # fmt: skip
    query, gallery, *labels = (arguments | change).values()
    with pytest.raises(DataError, match=message):
        rank(query, gallery, Labels(*labels))


def test_an_empty_gallery_is_an_error():
    nothing = np.array([], int)
    with pytest.raises(DataError, match="gallery is empty"):
        rank(np.ones((1, 2)), np.ones((0, 2)), Labels([0], [0], nothing, nothing))


def test_an_unknown_metric_is_an_error():
    with pytest.raises(ConfigError, match="no metric 'manhattan'"):
        golden_rank(metric="manhattan")
