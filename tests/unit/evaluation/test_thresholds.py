"""Thresholds at rates of false accepts: exact, with intervals over identities."""

from __future__ import annotations

import numpy as np
import pytest
from naive import dense_scores

from data_shards.errors import DataError
from data_shards.records import NO_CAMERA
from reid_train.evaluation.ground_truth import Labels
from reid_train.evaluation.thresholds import Thresholds, measure_thresholds, needed

BIN = 2 / 262_144


def people(identities: int, images: int, cameras: int = 3, spread: float = 0.8, seed: int = 0):
    """Embeddings around a centre of each identity, and labels."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((identities, 16))
    pid = np.repeat(np.arange(identities), images)
    made = [
        (centres[pid] + spread * rng.standard_normal((len(pid), 16))).astype(np.float32)
        for _ in range(2)
    ]
    camid = [rng.integers(0, cameras, len(pid)) for _ in range(2)]
    return *made, Labels(pid, camid[0], pid, camid[1])


def pairs(query, gallery, labels: Labels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Similarities (Q, G), and which pairs are impostors and which genuine."""
    same = labels.query_pid[:, None] == labels.gallery_pid
    return (
        -dense_scores(query, gallery, "cosine"),
        ~same,
        same & (labels.query_camid[:, None] != labels.gallery_camid),
    )


def test_no_more_impostors_than_the_rate_are_accepted_and_no_fewer():
    data = people(40, 5)
    similar, impostor, genuine = pairs(*data)
    found = measure_thresholds(*data)
    assert (found.impostors, found.genuine) == (impostor.sum(), genuine.sum())
    assert [at.false_accept_rate for at in found.at] == [1e-2, 1e-3]
    for at in found.at:
        assert (similar[impostor] > at.similarity).mean() <= at.false_accept_rate
        lower = at.similarity - 1.5 * BIN
        above = np.sort(similar[impostor])[::-1][int(at.false_accept_rate * impostor.sum())]
        assert lower <= above <= at.similarity + BIN
        tar = (similar[genuine] > at.similarity).mean()
        assert at.true_accept_rate == pytest.approx(tar, abs=2 / genuine.sum())
        assert at.low <= at.similarity <= at.high
        assert at.true_accept_low <= at.true_accept_rate <= at.true_accept_high


def test_intervals_are_those_of_drawing_identities_again():
    data = people(60, 4, spread=1.0)
    similar, impostor, genuine = pairs(*data)
    pid = data[2].query_pid
    order = np.argsort(-similar[impostor])
    who = np.stack(np.nonzero(impostor))[:, order]
    rng, limits, accepts = np.random.default_rng(1), [], []
    found = measure_thresholds(*data).find(1e-2)
    for _ in range(400):
        drawn = rng.multinomial(60, np.full(60, 1 / 60))
        weight = (drawn[pid[who[0]]] * drawn[data[2].gallery_pid[who[1]]]).cumsum()
        limits.append(similar[tuple(who[:, np.searchsorted(weight, 0.01 * weight[-1])])])
        accepted = drawn[pid[:, None]] * genuine
        accepts.append((accepted * (similar > found.similarity)).sum() / accepted.sum())
    width = np.ptp(np.percentile(limits, [2.5, 97.5]))
    for end, percentile in ((found.low, 2.5), (found.high, 97.5)):
        assert end == pytest.approx(np.percentile(limits, percentile), abs=0.2 * width)
    interval = np.percentile(accepts, [2.5, 97.5])
    np.testing.assert_allclose(found[-2:], interval, atol=0.2 * np.ptp(interval))


def test_too_few_pairs_for_a_rate_are_said():
    found = measure_thresholds(*people(12, 3))
    assert needed(1e-2) == 3000
    assert (found.impostors, found.at) == (36 * 33, ())
    assert found.too_few == (1e-2, 1e-3, 1e-4, 1e-5)
    with pytest.raises(DataError, match=r"needs 30,000 pairs .* was measured on 1,188"):
        found.find(1e-3)
    with pytest.raises(
        DataError, match=r"no threshold at a false accept rate of 0.5, but at: none"
    ):
        found.find(0.5)


def test_one_person_has_no_threshold():
    found = measure_thresholds(*people(1, 6))
    assert (found.impostors, found.at, found.roc) == (0, (), ())


def test_a_pair_of_cameras_is_measured_as_if_there_were_no_others():
    query, gallery, labels = people(60, 6)
    found = measure_thresholds(query, gallery, labels)
    assert sorted(found.cameras) == ["0-1", "0-2", "1-0", "1-2", "2-0", "2-1"]
    rows, columns = labels.query_camid == 2, labels.gallery_camid == 0
    part = Labels(
        labels.query_pid[rows],
        labels.query_camid[rows],
        labels.gallery_pid[columns],
        labels.gallery_camid[columns],
    )
    alone = measure_thresholds(query[rows], gallery[columns], part)
    assert found.cameras["2-0"].at == alone.at
    assert found.find(1e-2, (2, 0)) == alone.find(1e-2)
    assert found.find(1e-2, (7, 0)) == found.find(1e-2)


def test_without_cameras_there_are_no_pairs_of_cameras():
    query, gallery, labels = people(20, 4)
    unknown = np.arange(NO_CAMERA, NO_CAMERA + 80), np.arange(NO_CAMERA + 80, NO_CAMERA + 160)
    found = measure_thresholds(
        query, gallery, Labels(labels.query_pid, unknown[0], labels.gallery_pid, unknown[1])
    )
    assert found.cameras == {}
    assert found.at


def test_they_are_the_same_again_and_read_as_written():
    data = people(30, 4)
    found = measure_thresholds(*data)
    assert measure_thresholds(*data) == found
    read = Thresholds.from_json(found.to_json())
    assert (read.at, read.cameras["0-1"].at, read.too_few) == (
        found.at,
        found.cameras["0-1"].at,
        found.too_few,
    )


def test_curve_and_histograms_add_up():
    data = people(30, 4)
    similar, impostor, genuine = pairs(*data)
    found = measure_thresholds(*data)
    assert sum(found.genuine_bins) == pytest.approx(1)
    assert sum(found.impostor_bins) == pytest.approx(1)
    assert len(found.bins) == len(found.genuine_bins) + 1
    assert list(found.bins) == sorted(found.bins)
    expected = np.histogram(similar[genuine], found.bins)[0] / genuine.sum()
    np.testing.assert_allclose(found.genuine_bins, expected, atol=2 / genuine.sum())
    for rate, tar in found.roc[10::40]:
        limit = np.sort(similar[impostor])[::-1][round(rate * impostor.sum())]
        assert tar == pytest.approx((similar[genuine] > limit).mean(), abs=0.02)
