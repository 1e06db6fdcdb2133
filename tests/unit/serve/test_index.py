"""The gallery in memory: exact ranks, filters, growth, removal, and the approximate index."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from cluster.serve.index import BLOCK, Index
from data_shards.errors import DataError


def vectors(count: int, size: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32)


def naive(query: np.ndarray, gallery: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """The k nearest of the listed rows for one query, by float64; equal ones in their order."""
    query, wide = query.astype(np.float64), gallery[rows].astype(np.float64)
    cosine = wide @ query / np.linalg.norm(query) / np.linalg.norm(wide, axis=1)
    return rows[np.argsort(-cosine, kind="stable")[:k]]


def filled(gallery: np.ndarray) -> Index:
    index = Index(gallery.shape[1])
    index.add(gallery)
    return index


def test_the_nearest_are_those_of_a_full_sort():
    gallery, query = vectors(BLOCK + 700), vectors(5, seed=1)
    found = filled(gallery).nearest(query, 20)
    assert found.exact
    rows = np.arange(len(gallery))
    for i in range(len(query)):
        np.testing.assert_array_equal(found.row[i], naive(query[i], gallery, rows, 20))
    first = gallery[found.row[:, 0]]
    cosine = (query * first).sum(1) / np.linalg.norm(query, axis=1) / np.linalg.norm(first, axis=1)
    np.testing.assert_allclose(found.similarity[:, 0], cosine, atol=1e-6)


@pytest.mark.parametrize("share", [0.5, 0.01, 0.0])
def test_only_wanted_rows_are_found(share):
    gallery, query = vectors(3000), vectors(1, seed=1)
    wanted = np.random.default_rng(2).random(3000) < share
    found = filled(gallery).nearest(query, 40, wanted)
    expected = naive(query[0], gallery, np.flatnonzero(wanted), 40)
    np.testing.assert_array_equal(found.row[0], expected)


def test_removed_rows_are_never_found_and_added_ones_are():
    gallery, index = vectors(50), Index(24)
    for start in range(0, 50, 7):
        index.add(gallery[start : start + 7])
    index.remove(3)
    index.remove(49)
    rows = np.delete(np.arange(50), [3, 49])
    found = index.nearest(gallery[3:4], 60)
    np.testing.assert_array_equal(found.row[0], naive(gallery[3], gallery, rows, 60))
    assert len(index) == 48


def test_rows_of_equal_similarity_keep_their_order():
    gallery = np.repeat(vectors(3), 30, axis=0)
    found = filled(gallery).nearest(gallery[:1], 20)
    np.testing.assert_array_equal(found.row[0], np.arange(20))


def test_searches_during_growth_find_what_was_there():
    gallery = vectors(4000)
    index = filled(gallery[:1000])
    stop, wrong = threading.Event(), []

    def search() -> None:
        while not stop.is_set():
            row = index.nearest(gallery[10:11], 1).row
            wrong.extend(row[row != 10])

    thread = threading.Thread(target=search)
    thread.start()
    for start in range(1000, 4000, 100):
        index.add(gallery[start : start + 100])
    stop.set()
    thread.join()
    assert not wrong
    assert index.nearest(gallery[3999:], 1).row[0, 0] == 3999


def test_the_approximate_index_finds_most_and_says_how_many():
    pytest.importorskip("faiss")
    gallery, query = vectors(3000), vectors(20, seed=1)
    index = filled(gallery)
    built = index.build_graph()
    assert 0.9 < built.recall <= 1
    found = index.nearest(query, 10)
    assert not found.exact
    rows = np.arange(len(gallery))
    expected = [naive(row, gallery, rows, 10) for row in query]
    hits = sum(len(np.intersect1d(*pair)) for pair in zip(found.row, expected, strict=True))
    assert hits >= 0.9 * 200
    assert (np.diff(found.similarity, axis=1) <= 0).all()


def test_the_approximate_index_follows_what_is_added_and_removed_and_filters_are_exact():
    pytest.importorskip("faiss")
    gallery = vectors(500)
    index = filled(gallery[:499])
    index.build_graph()
    index.add(gallery[499:])
    assert index.nearest(gallery[499:], 1).row[0, 0] == 499
    index.remove(499)
    assert 499 not in index.nearest(gallery[499:], 10).row
    wanted = np.arange(500) < 30
    found = index.nearest(gallery[:1], 5, wanted)
    assert found.exact
    np.testing.assert_array_equal(found.row[0], naive(gallery[0], gallery, np.arange(30), 5))


def test_embeddings_of_another_length_or_with_nan_are_refused():
    index = Index(24)
    with pytest.raises(DataError, match="24 dimensions, and these have 12"):
        index.add(vectors(3, 12))
    with pytest.raises(DataError, match="NaN or infinite"):
        index.add(np.full((2, 24), np.nan, np.float32))
    assert index.nearest(vectors(1), 5).row.shape == (1, 0)


def test_a_search_of_one_query_starts_no_thread(monkeypatch):
    gallery = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    index = Index(8, 50)
    index.add(gallery)
    index.nearest(gallery[:1], 5)  # compiles
    monkeypatch.setattr(threading.Thread, "start", lambda thread: pytest.fail("a thread"))
    assert index.nearest(gallery[7:8], 5).row[0, 0] == 7
