"""Which queries a rank list shows, and which people a map of embeddings."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from reid_train.evaluation.examples import IMAGES, PEOPLE, choose_map, choose_rank_list
from reid_train.evaluation.ground_truth import Labels
from reid_train.evaluation.ranking import rank


def problem(people: int, images: int, cameras: int, seed: int) -> tuple:
    draw = np.random.default_rng(seed)
    pid = np.concatenate([np.arange(people), draw.integers(0, people, images)])
    camid = draw.integers(0, cameras, len(pid))
    embedding = (np.eye(people)[pid] + 0.3 * draw.standard_normal((len(pid), people))).astype("f4")
    first = np.arange(len(pid)) < people
    labels = Labels(pid[first], camid[first], pid[~first], camid[~first])
    return embedding[first], embedding[~first], labels


@given(st.integers(2, 40), st.integers(30, 300), st.integers(1, 6), st.integers(0, 99))
def test_a_map_has_the_people_whom_the_most_cameras_saw(people, images, cameras, seed):
    _, gallery, labels = problem(people, images, cameras, seed)
    chosen = choose_map(gallery, labels)
    rows = chosen["map_row"]
    shown = set(labels.gallery_pid[rows].tolist())
    there = set(labels.gallery_pid.tolist())
    assert len(shown) == min(PEOPLE, len(there))
    seen = {p: len(set(labels.gallery_camid[labels.gallery_pid == p].tolist())) for p in there}
    if there > shown:
        assert min(seen[p] for p in shown) >= max(seen[p] for p in there - shown)
    for p in shown:
        assert (labels.gallery_pid[rows] == p).sum() == min(IMAGES, (labels.gallery_pid == p).sum())
    assert len(set(rows.tolist())) == len(rows)
    np.testing.assert_allclose(np.linalg.norm(chosen["map_embedding"], axis=1), 1, atol=2e-3)


def test_a_map_leaves_out_people_without_a_query():
    labels = Labels(np.array([1]), np.array([0]), np.array([1, 2, 2, 2]), np.array([1, 1, 2, 3]))
    assert choose_map(np.ones((4, 3), np.float32), labels)["map_row"].tolist() == [0]


def test_a_rank_list_goes_from_the_best_query_to_the_worst():
    query, gallery, labels = problem(30, 200, 4, 0)
    result = rank(query, gallery, labels)
    chosen = choose_rank_list(query, gallery, labels, result)
    precision = result.average_precision[chosen["query"]]
    assert (np.diff(precision) <= 0).all()
    assert precision[0] == np.nanmax(result.average_precision)
    assert precision[-1] == np.nanmin(result.average_precision)
    assert (np.diff(chosen["similarity"], axis=1) <= 1e-6).all()
