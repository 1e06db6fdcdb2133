"""Counting by histogram against comparing one by one, and what bounds a product's error."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from reid_train.evaluation.kernels.rank_counts import GIVEN, Positives, count_block
from reid_train.evaluation.measures import COSINE
from reid_train.evaluation.reranking import NOTHING
from reid_train.evaluation.similarity import Features, tolerance, tolerance_at

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
FEW = st.sampled_from([-1.0, 0.0, 1.0, 1.0 + 2**-20])


def counted(scores: np.ndarray, keys: list[np.ndarray], indices: list[np.ndarray]) -> np.ndarray:
    start = np.concatenate([[0], np.cumsum([len(key) for key in keys])])
    key, before = np.concatenate(keys), np.zeros(start[-1], np.int64)
    positives = Positives(start, key.astype(np.float64), np.concatenate(indices), key, key)
    count_block(scores, 100, positives, GIVEN, NOTHING, NOTHING, before)
    return before


def compared(scores: np.ndarray, keys: list[np.ndarray], indices: list[np.ndarray]) -> list[int]:
    item = 100 + np.arange(scores.shape[1])
    return [
        int(np.count_nonzero((row < k) | ((row == k) & (item < i))))
        for row, key, index in zip(scores, keys, indices, strict=True)
        for k, i in zip(key, index, strict=True)
    ]


@settings(deadline=None, max_examples=150)
@given(data=st.data(), value=st.sampled_from([FINITE, FEW]))
def test_a_histogram_counts_as_comparing_does_whatever_the_scores(data, value):
    rows, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 600))
    few = data.draw(st.lists(value | st.just(np.inf), min_size=1, max_size=40))
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    scores = draw.choice(np.float32(few), (rows, width))
    keys = [
        np.sort(np.float32(data.draw(st.lists(value | st.sampled_from(few), max_size=30))))
        for _ in range(rows)
    ]
    keys = [key[np.isfinite(key)] for key in keys]
    indices = [draw.integers(0, 1000, len(key)) for key in keys]
    assert counted(scores, keys, indices).tolist() == compared(scores, keys, indices)


def test_more_positives_than_bins_are_counted_as_comparing_does():
    draw = np.random.default_rng(0)
    scores = draw.standard_normal((2, 5000)).astype(np.float32)
    keys = [np.sort(draw.choice(row, 3000)) for row in scores]
    indices = [draw.integers(0, 5100, 3000) for _ in keys]
    assert counted(scores, keys, indices).tolist() == compared(scores, keys, indices)


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**32),
    dimensions=st.integers(1, 200),
    common=st.sampled_from([-3.0, 0.0, 0.5, 10.0]),
    half=st.booleans(),
)
def test_no_partial_sum_is_greater_than_the_tolerance_allows_for(seed, dimensions, common, half):
    draw = np.random.default_rng(seed)
    pair = draw.standard_normal((2, dimensions)) + np.array([[1.0], [common]])
    if half:  # cancels what was summed before
        pair[1, dimensions // 2 :] *= -1
    features = Features.of(pair.astype(np.float32))
    terms = features.embedding[0].astype(np.float64) * features.embedding[1]
    terms *= features.scale.prod()
    score, whole = terms.sum(), tolerance(features, features, COSINE)[:1]
    share = tolerance_at(score[None], whole, COSINE) / whole
    for order in (np.arange(dimensions), draw.permutation(dimensions)):
        assert np.abs(np.cumsum(terms[order])).max() <= share[0] + 1e-12


def test_positives_that_float32_cannot_separate_are_separated():
    scores = np.linspace(-3e38, 3e38, 41, dtype=np.float32)[None]
    keys, indices = [np.float32([-3e38, 1e38, 3e38])], [np.array([100, 120, 130])]
    assert counted(scores, keys, indices).tolist() == compared(scores, keys, indices)
