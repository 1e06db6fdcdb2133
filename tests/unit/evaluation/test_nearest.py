"""The nearest gallery images of queries, while the gallery streams past in blocks."""

from __future__ import annotations

import numpy as np
import pytest
from naive import dense_scores

from data_shards.errors import DataError
from reid_train.evaluation.measures import METRICS
from reid_train.evaluation.neighbours import nearest_in_gallery


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size", [3, 64, 500])
def test_the_nearest_are_the_first_of_a_stable_sort_for_any_blocks(metric, size):
    rng = np.random.default_rng(0)
    query, gallery = (rng.standard_normal((n, 16)).astype(np.float32) for n in (5, 300))
    gallery[100:120] = gallery[7]  # ties are ordered by row
    rows = np.arange(300)
    blocks = [(rows[i : i + size], gallery[i : i + size]) for i in range(0, 300, size)]
    found = nearest_in_gallery(query, blocks, 40, METRICS[metric])
    scores = dense_scores(query, gallery, metric)
    order = np.argsort(scores, axis=1, kind="stable")[:, :40]
    np.testing.assert_allclose(found.score, np.take_along_axis(scores, order, 1), atol=1e-9)
    np.testing.assert_array_equal(found.index, order)


def test_rows_that_are_missing_keep_the_numbers_of_the_others():
    rng = np.random.default_rng(0)
    query, gallery = (rng.standard_normal((n, 4)).astype(np.float32) for n in (1, 6))
    rows = np.array([1, 4, 9, 10, 20, 21])
    found = nearest_in_gallery(query, [(rows, gallery)], 8, METRICS["cosine"])
    order = np.argsort(dense_scores(query, gallery, "cosine")[0])
    np.testing.assert_array_equal(found.index[0], [*rows[order], -1, -1])


def test_embeddings_that_are_not_finite_are_refused():
    query = np.full((1, 4), np.nan, np.float32)
    with pytest.raises(DataError, match="query"):
        nearest_in_gallery(query, [], 1, METRICS["cosine"])
