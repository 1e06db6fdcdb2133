"""Query expansion and database augmentation against their plain formulas."""

from __future__ import annotations

import numpy as np
import pytest

from reid_train.evaluation import neighbours
from reid_train.evaluation.measures import COSINE
from reid_train.evaluation.similarity import Features
from reid_train.evaluation.tasks import Joined


def expanded(sides, k: int, alpha: float = 3.0) -> np.ndarray:
    both = Features.of(np.concatenate(sides))
    blocks = neighbours.query_gallery_pairs(len(sides[0]), len(both))
    near = neighbours.nearest_neighbours(both, k, COSINE, blocks)
    return neighbours.averaged(Joined(both, len(sides[0])), near, None, alpha).query.embedding


def augmented(sides, k: int) -> np.ndarray:
    both = Features.of(np.concatenate(sides))
    blocks = neighbours.all_pairs(len(both), len(sides[0]))
    near = neighbours.nearest_neighbours(both, k, COSINE, blocks)
    return neighbours.averaged(Joined(both, len(sides[0])), None, near, 3.0).gallery.embedding


def normalized(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def sides() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    return (
        draw.standard_normal((20, 32)).astype(np.float32),
        draw.standard_normal((90, 32)).astype(np.float32),
    )


def expected_mean(own: np.ndarray | float, rows: np.ndarray, base: np.ndarray, k: int, alpha):
    similarity = rows @ base.T
    out = np.empty_like(rows)
    for i, row in enumerate(similarity):
        near = np.argsort(-row, kind="stable")[:k]
        near = near[row[near] > 0]
        out[i] = (row[near] ** alpha) @ base[near]
    return normalized(out + own)


@pytest.mark.parametrize(("k", "alpha"), [(1, 3.0), (10, 3.0), (5, 0.0), (90, 1.0)])
def test_expanded_queries_follow_the_formula(sides, k, alpha):
    query, gallery = (normalized(side.astype(np.float64)) for side in sides)
    expected = expected_mean(query, query, gallery, k, alpha)
    found = expanded(sides, k, alpha)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("k", [1, 6])
def test_augmented_gallery_follows_the_formula(sides, k):
    gallery = normalized(sides[1].astype(np.float64))
    expected = expected_mean(0, gallery, gallery, k, 3.0)
    np.testing.assert_allclose(augmented(sides, k), expected, atol=1e-5)


def test_gallery_augmented_only_with_itself_is_unchanged(sides):
    np.testing.assert_allclose(augmented(sides, 1), normalized(sides[1]), atol=1e-6)
