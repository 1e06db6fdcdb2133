"""Query expansion and database augmentation against their plain formulas."""

from __future__ import annotations

import numpy as np
import pytest

from data_shards.errors import ConfigError
from reid_train.evaluation.expansion import augment_gallery, expand_queries


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
    found = expand_queries(*sides, k=k, alpha=alpha)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("k", [1, 6])
def test_augmented_gallery_follows_the_formula(sides, k):
    gallery = normalized(sides[1].astype(np.float64))
    expected = expected_mean(0, gallery, gallery, k, 3.0)
    np.testing.assert_allclose(augment_gallery(sides[1], k=k), expected, atol=1e-5)


def test_a_gallery_augmented_with_itself_alone_stays(sides):
    np.testing.assert_allclose(augment_gallery(sides[1], k=1), normalized(sides[1]), atol=1e-6)


@pytest.mark.parametrize(("k", "alpha"), [(0, 3.0), (91, 3.0), (5, -1.0)])
def test_senseless_settings_are_an_error(sides, k, alpha):
    with pytest.raises(ConfigError, match="expansion takes"):
        expand_queries(*sides, k=k, alpha=alpha)
