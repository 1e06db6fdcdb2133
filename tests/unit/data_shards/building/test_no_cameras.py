"""Data without cameras: only the same image is junk, and every other image of a person matches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pictures import SMALL, picture, tree

from data_shards.building.build import build
from data_shards.cli import main
from data_shards.dataset import Dataset, why_not_measurable
from data_shards.errors import ConfigError, DataError
from data_shards.records import NO_CAMERA
from data_shards.sampler import plan
from data_shards.verify import verify
from reid_train.evaluation.evaluate import evaluate
from reid_train.evaluation.ground_truth import Labels, find_ground_truth
from reid_train.evaluation.measures import Measures
from reid_train.evaluation.ranking import rank


def people(root: Path) -> Path:
    """Folders of six people to train on and three of the test; a query of each is also in the
    gallery, under another name."""
    for pid in range(9):
        for n in range(5):
            split = "train" if pid < 6 else "query" if n == 0 else "gallery"
            picture(root / split / str(pid) / f"{n}.png", 10 * pid + n, "PNG")
        if pid >= 6:
            copy = root / "query" / str(pid) / "0.png"
            (root / "gallery" / str(pid) / "again.png").write_bytes(copy.read_bytes())
    return root


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    build("folders", people(tmp_path / "people"), str(tmp_path / "out"), validation=0.4, **SMALL)
    return Dataset.open(str(tmp_path / "out"))


def labels(dataset: Dataset, split: str = "test") -> Labels:
    query, gallery = dataset.evaluated(split)
    return Labels(query.pid, query.camid, gallery.pid, gallery.camid)


def test_images_of_equal_bytes_are_one_and_all_others_differ(dataset):
    query, gallery = dataset.evaluated("test")
    assert min(query.camid.min(), gallery.camid.min()) >= NO_CAMERA
    assert len(np.unique(gallery.camid)) == len(gallery)
    copies = gallery.camid[[path.endswith("again.png") for path in gallery.path]]
    assert copies.tolist() == query.camid.tolist()
    assert {
        split: info.cameras for split, info in dataset.manifest.splits.items()
    } == dict.fromkeys(dataset.manifest.splits, 0)


def test_only_the_same_image_is_junk(dataset):
    truth = find_ground_truth(labels(dataset))
    gallery = dataset.evaluated("test")[1]
    junk = gallery.path[truth.index[~truth.positive]]
    assert sorted(junk) == [f"gallery/{pid}/again.png" for pid in (6, 7, 8)]
    assert np.diff(truth.positives()).tolist() == [4, 4, 4]
    draw = np.random.default_rng(0)
    query = draw.standard_normal((3, 8)).astype(np.float32)
    base = draw.standard_normal((len(gallery), 8)).astype(np.float32)
    # The same image is nearest of all, and is not counted.
    base[truth.index[~truth.positive]] = query[truth.row[~truth.positive]]
    found = rank(query, base, labels(dataset))
    assert found.valid == 3
    assert found.summary()["rank-1"] < 1


def test_validation_split_without_cameras_has_a_match_for_each_query(dataset):
    truth = find_ground_truth(labels(dataset, "validation"))
    assert (np.diff(truth.positives()) == 4).all()
    assert dataset.why_not_measurable("validation") is None
    query, gallery = dataset.evaluated("validation")
    assert (len(query), len(gallery)) == (2, 8)


def test_dataset_without_cameras_is_verified_and_the_same_again(tmp_path, capsys):
    root = people(tmp_path / "people")
    for name, jobs in (("one", 1), ("two", 2)):
        build("folders", root, str(tmp_path / name), shard_bytes=12_000, jobs=jobs)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert verify(str(tmp_path / "one"), decode_images=True, jobs=1)[1] == []
    assert main(["info", str(tmp_path / "one")]) == 0
    assert "people at" in capsys.readouterr().out


def test_camera_pairs_are_refused(dataset):
    query, gallery = (np.ones((len(part), 4), np.float32) for part in dataset.evaluated("test"))
    with pytest.raises(ConfigError, match="--camera-pairs needs the camera of every image"):
        evaluate(query, gallery, labels(dataset), Measures(camera_pairs=True))


def test_batches_are_planned_as_if_all_images_were_of_one_camera(dataset):
    index = dataset.index("train")
    options = {"seed": 1, "epoch": 0, "identities": 2, "images": 2, "window": 4}
    one = replace(index, camid=np.zeros_like(index.camid))
    np.testing.assert_array_equal(plan(index, **options), plan(one, **options))


def test_query_with_only_itself_in_the_gallery_has_no_match():
    assert "no query has another image" in str(
        why_not_measurable([(1, NO_CAMERA)], [(1, NO_CAMERA)])
    )
    assert why_not_measurable([(1, NO_CAMERA)], [(1, NO_CAMERA), (1, NO_CAMERA + 1)]) is None


def test_camera_number_that_means_no_camera_is_refused_from_a_csv(tmp_path):
    picture(tmp_path / "a.jpg", 1)
    (tmp_path / "list.csv").write_text(f"path,pid,camid,split\na.jpg,1,{NO_CAMERA + 1},query")
    with pytest.raises(DataError, match=r"is not from 0 to 2\^30 - 1"):
        build("csv", tmp_path / "list.csv", str(tmp_path / "out"), **SMALL)
