"""Embeddings with float32 products that are worse than chance would make them."""

from __future__ import annotations

import numpy as np
import pytest

from reid_train.evaluation.ground_truth import Labels
from reid_train.evaluation.measures import METRICS, Measures
from reid_train.evaluation.neighbours import all_pairs, nearest_neighbours
from reid_train.evaluation.ranking import rank
from reid_train.evaluation.reranking import rerank
from reid_train.evaluation.similarity import Features


def pointing_much_the_same_way(rng: np.random.Generator) -> np.ndarray:
    """As pooled features do: all their roundings have one sign, so a product's error grows."""
    common = rng.uniform(0.2, 1.0, 1024)
    return (common + rng.uniform(0, 0.2, (300, 1024))).astype(np.float32)


def nearly_one_constant(rng: np.random.Generator) -> np.ndarray:
    """As features that saturate: equal terms add equal roundings, more than chance allows."""
    made = np.ones((300, 1024), np.float32)
    made -= 0.1 * rng.random(made.shape, np.float32) * (rng.random(made.shape) > 0.95)
    return made


@pytest.mark.parametrize("make", [pointing_much_the_same_way, nearly_one_constant])
def test_near_collinear_embeddings_are_ranked_as_float64_does(make):
    made = make(np.random.default_rng(0))
    pid, camid = np.arange(300) % 10, np.arange(300) // 10 % 3
    query, gallery = slice(0, 60), slice(60, 300)
    labels = Labels(pid[query], camid[query], pid[gallery], camid[gallery])
    result = rank(made[query], made[gallery], labels)
    unit = made.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    expected = []
    for q in range(60):
        kept = (pid[gallery] != pid[q]) | (camid[gallery] != camid[q])
        order = np.argsort(-(unit[gallery] @ unit[q])[kept], kind="stable")
        right = (pid[gallery] == pid[q])[kept][order]
        found = np.flatnonzero(right) + 1
        expected.append(np.mean(np.arange(1, len(found) + 1) / found))
    np.testing.assert_allclose(result.average_precision, expected, rtol=1e-12)


@pytest.mark.parametrize(("metric", "dimensions"), [("cosine", 995), ("euclidean", 1024)])
def test_a_collapsed_model_is_ranked_by_index_where_its_own_items_show_nothing(metric, dimensions):
    # All matches are in the first block; the roundings of all products have one sign.
    made = np.full((16 + 2560, dimensions), 0.37, np.float32)
    pid, gallery_pid = np.arange(16), np.arange(2560)
    labels = Labels(pid, np.zeros(16, int), gallery_pid, np.ones(2560, int))
    result = rank(made[:16], made[16:], labels, metric=metric)
    np.testing.assert_array_equal(result.first_match_rank, np.arange(1, 17))


def a_constant_and_noise(rng: np.random.Generator) -> np.ndarray:
    """As a network gives that maps everything to one place."""
    return (1 + 1e-4 * rng.standard_normal((300, 2048))).astype(np.float32)


@pytest.mark.parametrize("make", [a_constant_and_noise, nearly_one_constant])
def test_neighbours_of_nearly_constant_embeddings_are_those_of_float64(make):
    made = make(np.random.default_rng(0))
    found = nearest_neighbours(Features.of(made), 9, METRICS["cosine"], all_pairs(300))
    unit = made.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    expected = np.argsort(-(unit @ unit.T), axis=1, kind="stable")[:, :9]
    np.testing.assert_array_equal(found.index, expected)


@pytest.mark.parametrize("metric", sorted(METRICS))
@pytest.mark.parametrize("make", [a_constant_and_noise, nearly_one_constant])
def test_reranked_distances_of_nearly_constant_embeddings_stay_within_bounds(make, metric):
    made = make(np.random.default_rng(0))
    for _, distance in rerank(made[:60], made[60:], Measures(metric)):
        assert np.all((distance > -0.01) & (distance < 1.01))
