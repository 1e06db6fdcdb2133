"""The plan of an epoch: its guarantees hold for any dataset, seed and world size."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_shards.errors import ConfigError
from data_shards.index import Index
from data_shards.sampler import plan, plan_apart, slice_for_rank

many = settings(deadline=None, max_examples=60)


def make_index(amounts, cameras, shards: int) -> Index:
    """Identities of these many images, contiguous, laid into `shards` shards in order."""
    label = np.repeat(np.arange(len(amounts)), amounts)
    shard = label * shards // len(amounts)
    _, shard = np.unique(shard, return_inverse=True)
    nothing = np.zeros(len(label), np.int64)
    return Index.from_columns(
        {
            "shard": shard,
            "offset": nothing,
            "size": nothing,
            "pid": label * 3 + 5,
            "label": label,
            "camid": cameras,
            "width": nothing,
            "height": nothing,
            "path": [""] * len(label),
        }
    )


@st.composite
def cases(draw):
    amounts = draw(st.lists(st.integers(1, 30), min_size=1, max_size=40))
    cameras = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 7, sum(amounts))
    index = make_index(amounts, cameras, draw(st.integers(1, 9)))
    identities = draw(st.integers(1, 8))
    images = draw(st.integers(1, 6))
    small = draw(st.sampled_from(["replace", "drop"]))
    amount = np.bincount(index.label)
    assume(np.count_nonzero(amount >= (images if small == "drop" else 1)) >= identities)
    return index, {
        "seed": draw(st.integers(0, 2**40)),
        "epoch": draw(st.integers(0, 300)),
        "identities": identities,
        "images": images,
        "window": draw(st.integers(1, 10)),
        "small": small,
    }


def groups_of(index: Index, rows: np.ndarray, images: int) -> np.ndarray:
    return index.label[rows].reshape(len(rows), -1, images)


def msmt17_like(images: int, identities: int, shards: int) -> Index:
    """Skewed image counts, and two to ten of 15 cameras an identity, unevenly used."""
    rng = np.random.default_rng(0)
    share = rng.gamma(2.2, 1.0, identities) + 0.1
    amounts = np.maximum(2, share / share.sum() * images).astype(int)
    amounts[: images - amounts.sum()] += 1
    cameras = np.concatenate(
        [
            rng.choice(rng.choice(15, rng.integers(2, 11), replace=False), amount)
            for amount in amounts
        ]
    )
    return make_index(amounts, cameras, shards)


@many
@given(cases())
def test_no_identity_is_twice_in_a_step(case):
    index, options = case
    owners = groups_of(index, plan(index, **options), options["images"])[..., 0]
    assert all(len(set(step)) == options["identities"] for step in owners.tolist())


@many
@given(cases())
def test_a_group_is_of_one_identity(case):
    index, options = case
    groups = groups_of(index, plan(index, **options), options["images"])
    assert (groups == groups[..., :1]).all()


@many
@given(cases())
def test_an_image_is_used_once_unless_its_identity_is_small(case):
    index, options = case
    rows = plan(index, **options)
    amount = np.bincount(index.label)[index.label]
    for row, uses in Counter(rows.ravel().tolist()).items():
        assert uses == 1 or amount[row] < options["images"]


@many
@given(cases())
def test_a_small_identity_shows_all_its_images_or_none(case):
    index, options = case
    images = options["images"]
    amount = np.bincount(index.label)
    rows = plan(index, **options).reshape(-1, images)
    for group in rows.tolist():
        label = index.label[group[0]]
        if amount[label] < images:
            assert options["small"] == "replace"
            assert set(group) == set(np.flatnonzero(index.label == label).tolist())


@many
@given(cases())
def test_a_pass_has_as_many_steps_as_can_be_dealt(case):
    index, options = case
    options["window"] = 1000
    amount = np.bincount(index.label)
    groups = amount // options["images"]
    if options["small"] == "replace":
        groups = np.maximum(groups, 1)
    most = max(
        steps
        for steps in range(groups.sum() + 1)
        if np.minimum(groups, steps).sum() >= steps * options["identities"]
    )
    assert plan(index, **options).shape == (most, options["identities"] * options["images"])


@many
@given(cases())
def test_cameras_are_spread_as_far_as_the_images_dealt_allow(case):
    index, options = case
    options |= {"identities": 1, "window": 1000, "steps": None}
    images = options["images"]
    groups = plan(index, **options).reshape(-1, images)
    owner = index.label[groups[:, 0]]
    for label in np.unique(owner):
        own = index.camid[groups[owner == label]]
        distinct = sum(len(set(group)) for group in own.tolist())
        available = Counter(own.ravel().tolist()).values()
        assert distinct == sum(min(uses, len(own)) for uses in available)


@many
@given(cases())
def test_the_plan_is_a_pure_function(case):
    index, options = case
    first = plan(index, **options)
    np.random.seed(1)  # noqa: NPY002
    assert np.array_equal(first, plan(index, **options))


@many
@given(cases())
def test_no_more_shards_than_a_window_are_in_use_at_a_time(case):
    index, options = case
    options |= {"small": "replace"}
    identities = [len(set(index.label[index.shard == s])) for s in range(index.shard.max() + 1)]
    assume(min(identities) >= options["identities"])  # no window has to be joined with another
    shards = index.shard[plan(index, **options)]
    used = [np.flatnonzero((shards == s).any(axis=1)) for s in range(len(identities))]
    in_use = np.zeros(len(shards), int)
    for steps in (steps for steps in used if len(steps)):
        in_use[steps[0] : steps[-1] + 1] += 1
    assert in_use.max() <= options["window"]


@many
@given(cases(), st.integers(1, 60))
def test_plan_has_exactly_the_requested_steps(case, steps):
    index, options = case
    rows = plan(index, **options, steps=steps)
    assert len(rows) == steps
    one_pass = plan(index, **options)
    shared = min(steps, len(one_pass))
    assert np.array_equal(rows[:shared], one_pass[:shared])


@many
@given(cases())
def test_rank_slices_side_by_side_are_the_batch(case):
    index, options = case
    rows = plan(index, **options)
    for world in (w for w in range(1, rows.shape[1] + 1) if rows.shape[1] % w == 0):
        slices = [slice_for_rank(rows, rank, world) for rank in range(world)]
        assert np.array_equal(np.concatenate(slices, axis=1), rows)


def test_epochs_and_seeds_differ():
    index = msmt17_like(3000, 100, 3)
    options = {"identities": 8, "images": 4, "window": 3}
    plans = [plan(index, seed=s, epoch=e, **options) for s in (0, 1) for e in (0, 1)]
    assert len({rows.tobytes() for rows in plans}) == 4


def test_further_passes_are_in_another_order():
    index = msmt17_like(3000, 100, 3)
    options = {"seed": 0, "epoch": 0, "identities": 8, "images": 4, "window": 3}
    steps = len(plan(index, **options))
    rows = plan(index, **options, steps=2 * steps)
    assert not np.array_equal(rows[:steps], rows[steps:])


def test_the_plan_is_the_same_on_every_machine():
    """A new digest here means that a run cannot be resumed across the change: say so loudly."""
    amounts = np.arange(100) % 23 + 1
    index = make_index(amounts, np.arange(amounts.sum()) ** 2 % 7, 5)
    rows = plan(index, seed=7, epoch=3, identities=8, images=4, window=2, steps=100)
    digest = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "456bf5e734291cb7"


def test_every_image_is_as_likely_to_be_left_out():
    """Five images of two cameras, K = 4: over many epochs each is left out a fifth of the time."""
    index = make_index([5, 5], [0, 0, 0, 0, 1] * 2, 1)
    options = {"seed": 0, "identities": 2, "images": 4, "window": 1}
    used = np.zeros(len(index))
    for epoch in range(1000):
        used[plan(index, epoch=epoch, **options)] += 1
    assert np.abs(used / 1000 - 0.8).max() < 0.05


def test_identities_meet_as_if_at_random():
    """How often two identities share a step has the spread that chance would give."""
    index = make_index([40] * 60, np.zeros(2400, int), 1)
    meetings = np.zeros((60, 60))
    for epoch in range(20):
        rows = plan(index, seed=0, epoch=epoch, identities=6, images=4, window=1)
        for step in index.label[rows][:, ::4]:
            meetings[np.ix_(step, step)] += 1
    pairs = meetings[np.triu_indices(60, 1)]
    # 20 epochs × 100 steps × 15 pairs, over 1,770 pairs
    assert pairs.mean() == pytest.approx(20 * 100 * 15 / 1770)
    assert 0.8 < pairs.var() / pairs.mean() < 1.2


def test_hardly_an_image_of_msmt17_waits_for_the_next_epoch():
    index = msmt17_like(32_621, 1_041, 2)
    options = {"seed": 0, "identities": 16, "images": 4, "window": 2}
    rows = plan(index, epoch=1, **options)
    amount = np.bincount(index.label)
    in_full_groups = np.where(amount < 4, amount, amount // 4 * 4).sum()
    assert len(np.unique(rows)) > 0.99 * in_full_groups


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identities": 4}, "the training split has 3"),
        ({"small": "drop", "images": 7}, "with 7 or more images"),
        ({"small": "often"}, "choose 'replace' or 'drop'"),
        ({"window": 0}, "window must be at least 1, not 0"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"images": 0}, "images must be at least 1, not 0"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    index = make_index([5, 6, 7], np.zeros(18, int), 2)
    options = {"seed": 0, "epoch": 0, "identities": 2, "images": 4, "window": 1} | change
    with pytest.raises(ConfigError, match=message):
        plan(index, **options)


def test_an_identity_that_continues_in_another_shard_is_one_identity():
    index = make_index([2, 2, 2, 2], np.zeros(8, int), 4)
    label = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    index = replace(index, label=label, pid=label)
    rows = plan(index, seed=0, epoch=0, identities=2, images=4, window=1, small="drop")
    assert sorted(rows.ravel().tolist()) == list(range(8))


def test_one_identity_cannot_make_a_batch():
    index = make_index([50], np.zeros(50, int), 1)
    with pytest.raises(ConfigError, match="the training split has 1"):
        plan(index, seed=0, epoch=0, identities=2, images=4, window=1)


@pytest.mark.parametrize(("rank", "world"), [(0, 3), (2, 2), (-1, 2)])
def test_a_share_that_does_not_come_out_even_is_refused(rank, world):
    with pytest.raises(ConfigError):
        slice_for_rank(np.zeros((5, 8), np.int64), rank, world)


@st.composite
def unions(draw):
    """An index of several datasets, and the dataset of each row."""
    sizes = draw(st.lists(st.integers(4, 20), min_size=1, max_size=4))
    amounts = [draw(st.integers(1, 9)) for _ in range(sum(sizes))]
    index = make_index(amounts, np.arange(sum(amounts)) % 3, draw(st.integers(1, 5)))
    return index, np.repeat(np.arange(len(sizes)), sizes)[index.label]


@many
@given(unions(), st.integers(0, 99), st.integers(0, 9), st.none() | st.integers(1, 60))
def test_batches_apart_are_each_from_one_dataset_in_proportion(union, seed, epoch, steps):
    index, dataset = union
    settings = {"seed": seed, "epoch": epoch, "identities": 4, "images": 2, "window": 3}
    rows = plan_apart(index, dataset, steps=steps, **settings)
    turn = dataset[rows]
    assert (turn == turn[:, :1]).all()
    passes = [
        len(plan(index.select(np.flatnonzero(dataset == n)), **settings))
        for n in range(dataset.max() + 1)
    ]
    assert len(rows) == (sum(passes) if steps is None else steps)
    fair = np.array(passes) * len(rows) / sum(passes)
    assert (abs(np.bincount(turn[:, 0], minlength=len(passes)) - fair) < 1).all()
    people = groups_of(index, rows, 2)
    assert (people == people[:, :, :1]).all()
    assert all(len(set(step)) == 4 for step in people[:, :, 0].tolist())
    assert (rows == plan_apart(index, dataset, steps=steps, **settings)).all()


def test_one_dataset_apart_has_the_batches_of_its_plan():
    index = make_index([5] * 12, np.arange(60) % 3, 4)
    settings = {"seed": 3, "epoch": 1, "identities": 4, "images": 2, "window": 2}
    apart = plan_apart(index, np.zeros(60, int), steps=9, **settings)
    assert (apart == plan(index, steps=9, **settings)).all()
