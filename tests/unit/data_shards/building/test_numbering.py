"""The numbers that added people and cameras get, and which images are added at all."""

from __future__ import annotations

import numpy as np
import pytest
from version_files import PEOPLE, SMALL, is_whole, write_csv

from data_shards.building import versions
from data_shards.building.build import build
from data_shards.building.versions import add, remove
from data_shards.dataset import Dataset


@pytest.fixture
def url(tmp_path) -> str:
    build("csv", write_csv(tmp_path / "images", PEOPLE), str(tmp_path / "out"), **SMALL)
    return str(tmp_path / "out")


def test_images_that_the_dataset_has_are_not_added_again(url, tmp_path):
    more = write_csv(tmp_path / "more", {11: "train"})
    add(url, "csv", more, **SMALL)
    more = write_csv(tmp_path / "more", {11: "train", 13: "train"})
    change = add(url, "csv", more, **SMALL)
    assert (change.images, change.known) == (3, 3)
    assert np.isin(Dataset.open(url).whole.pid, [11, 13]).sum() == 6
    assert is_whole(url)


@pytest.mark.parametrize("ids", ["same", "new"])
def test_removed_people_can_be_added_again(url, tmp_path, ids):
    more = write_csv(tmp_path / "more", {11: "train"})
    add(url, "csv", more, ids=ids, **SMALL)
    remove(url, [Dataset.open(url).identities.max()], jobs=1)
    change = add(url, "csv", more, ids=ids, **SMALL)
    assert not change.already_made
    assert change.images == 3
    assert len(Dataset.open(url).identities) == 4


@pytest.mark.parametrize("recorded", [True, False])
def test_number_of_a_removed_person_or_camera_is_given_to_nobody_else(
    url, tmp_path, monkeypatch, recorded
):
    more, others = (write_csv(tmp_path / name, {0: "train"}, seed=n) for n, name in enumerate("ab"))
    with monkeypatch.context() as patch:
        if not recorded:  # as in an earlier release
            patch.setattr(versions, "_options", lambda old, free: dict(old.options))
        added = add(url, "csv", more, ids="new", **SMALL).manifest
        remove(url, [10], jobs=1)
    add(url, "csv", others, ids="new", **SMALL)
    train = Dataset.open(url).index("train")
    assert np.unique(train.pid).tolist() == [1, 3, 5, 11]
    assert np.unique(train.camid).tolist() == [0, 1, 4, 5]
    remove(url, [10], delete_old=True, jobs=1)
    assert 11 in Dataset.open(url).identities
    assert Dataset.open(url, added.digest).digest != added.digest, "the version was not deleted"
    assert is_whole(url)


def test_number_of_a_person_who_was_deleted_is_given_to_nobody_else(url, tmp_path):
    add(url, "csv", write_csv(tmp_path / "a", {0: "train"}), ids="new", **SMALL)
    remove(url, [10], delete_old=True, jobs=1)
    add(url, "csv", write_csv(tmp_path / "b", {0: "train"}, seed=1), ids="new", **SMALL)
    assert Dataset.open(url).identities.tolist() == [1, 3, 5, 11]


def test_new_people_and_cameras_get_the_next_numbers(url, tmp_path):
    more = write_csv(tmp_path / "more", {0: "train", 1: "test"})
    add(url, "csv", more, ids="new", **SMALL)
    dataset = Dataset.open(url)
    assert dataset.identities.tolist() == [1, 3, 5, 10]
    assert set(dataset.index("query").pid.tolist()) == {7, 9, 11}
    assert sorted(set(dataset.index("train").camid.tolist())) == [0, 1, 2, 3]
    assert is_whole(url)


def test_image_without_a_camera_that_is_there_already_is_the_same_image(tmp_path):
    url, images = str(tmp_path / "people"), tmp_path / "images"
    build("csv", write_csv(images, PEOPLE, cameras=False), url, **SMALL)
    known = Dataset.open(url).whole
    table = write_csv(tmp_path / "more", {1: "train"}, first=2, cameras=False)
    (tmp_path / "more/1-2.jpg").rename(tmp_path / "more/copy.jpg")
    table.write_text(table.read_text().replace("1-2.jpg", "copy.jpg"))
    add(url, "csv", table, **SMALL)
    train = Dataset.open(url).index("train")
    (first,), (copy,) = (train.camid[train.path == name] for name in ("1-2.jpg", "copy.jpg"))
    assert first == copy
    assert train.camid[train.path == "1-3.jpg"] > known.camid.max()
