"""A validation split: who is in it, what each query finds there, and that it stays the same."""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import SMALL, people, tree, write_csv

from data_shards.building.build import build
from data_shards.dataset import Dataset
from data_shards.errors import ConfigError
from data_shards.manifest import Manifest
from data_shards.records import EVALUATED, NO_CAMERA, SPLITS, ImageRecord
from data_shards.sources.split import split_off
from data_shards.verify import verify

TEST, VALIDATION = EVALUATED["test"], EVALUATED["validation"]


def take(records: list[ImageRecord], fraction: float, seed: int = 0) -> list[ImageRecord]:
    return split_off(records, "--validation", fraction, seed, "validation")


def record(pid: int, camid: int, number: int, split: str = "train") -> ImageRecord:
    name = f"{split}/{pid}-{camid}-{number}.jpg"
    return ImageRecord(Path(name), name, pid, camid, split)


cameras = st.dictionaries(st.integers(0, 4), st.integers(1, 4), min_size=1, max_size=4)
"""How many images each camera has of one identity."""


@st.composite
def datasets(draw) -> list[ImageRecord]:
    """Training identities of which at least four were seen by two cameras, and some of the test."""
    seen = draw(st.lists(cameras, min_size=4, max_size=14))
    seen += [{0: 1, 1: 1}] * 4
    unknown = draw(st.booleans())
    records = []
    for pid, by_camera in enumerate(seen):
        for camera, images in by_camera.items():
            for n in range(images):
                camid = NO_CAMERA + len(records) if unknown else camera
                split = "val" if draw(st.integers(0, 9)) == 0 else "train"
                records.append(record(pid, camid, 10 * camera + n, split))
    return records + [record(pid, pid % 2, 0, TEST[pid % 2]) for pid in range(6)]


@settings(max_examples=60, deadline=None)
@given(datasets(), st.floats(0.15, 0.45), st.integers(0, 3), st.randoms())
def test_split_by_identity(records, fraction, seed, random):
    try:
        made = take(records, fraction, seed)
    except ConfigError as error:
        assert "seen by two cameras" in str(error) or "at least 2" in str(error)  # noqa: PT017
        return
    by_split = defaultdict[str, list[ImageRecord]](list)
    for old, new in zip(records, made, strict=True):
        assert new == replace(old, split=new.split)
        assert new.split == old.split or (old.split in ("train", "val"))
        by_split[new.split].append(new)
    query, gallery = (by_split[split] for split in VALIDATION)
    trained = {r.pid for split in ("train", "val") for r in by_split[split]}
    assert trained.isdisjoint({r.pid for r in query + gallery})
    assert {r.pid for r in query} == {r.pid for r in gallery}
    identities = len({r.pid for r in records if r.split in ("train", "val")})
    assert len({r.pid for r in query}) == round(fraction * identities)
    for asked in query:
        assert any(r.pid == asked.pid and r.camid != asked.camid for r in gallery)
    # The choice depends on neither the order of the records nor the process.
    mixed = random.sample(records, len(records))
    assert set(take(mixed, fraction, seed)) == set(made)


def test_another_seed_chooses_other_people():
    records = [record(pid, camid, n) for pid in range(40) for camid in range(3) for n in range(2)]

    def chosen(seed: int) -> set[int]:
        return {r.pid for r in take(records, 0.25, seed) if r.split != "train"}

    assert len(chosen(0)) == len(chosen(1)) == 10
    assert chosen(0) != chosen(1)
    assert chosen(0) == chosen(0)


def test_one_image_of_each_camera_is_a_query_if_another_stays():
    records = [record(pid, camid, n) for pid in range(4) for camid in (0, 1) for n in range(2)]
    records += [record(pid, 2, 0) for pid in range(4)]
    made = [r for r in take(records, 0.5) if r.split == VALIDATION[0]]
    assert sorted(r.camid for r in made) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("people", "cameras", "fraction", "message"),
    [
        (40, 2, 0.01, "of 40 training identities is 0, but a split needs at least 2: give 0.05"),
        (40, 2, 0.99, r"is 40, but training needs 2: give 0\.95 or less"),
        (40, 1, 0.1, "only 0 were seen by two cameras: each query needs an image"),
        (3, 2, 0.5, "training another 2"),
        (40, 2, 0.0, "--validation must lie between 0 and 1, not 0"),
        (40, 2, 1.5, "--validation must lie between 0 and 1"),
        (40, 2, float("nan"), "--validation must lie between 0 and 1"),
    ],
)
def test_what_cannot_be_split_is_refused_with_advice(people, cameras, fraction, message):
    records = [record(pid, camid, 0) for pid in range(people) for camid in range(cameras)]
    with pytest.raises(ConfigError, match=message):
        take(records, fraction)


# Building


def test_validation_is_part_of_the_dataset(tmp_path):
    root = people(tmp_path / "images", train=10)
    manifest = build("csv", root, str(tmp_path / "out"), validation=0.3, **SMALL).manifest
    dataset, problems = verify(str(tmp_path / "out"), decode_images=True, jobs=1)
    assert problems == []
    assert {s: (i.images, i.identities) for s, i in manifest.splits.items()} == {
        "train": (28, 7),
        "query": (3, 3),
        "gallery": (9, 3),
        "validation_query": (6, 3),
        "validation_gallery": (6, 3),
    }
    assert manifest.options["validation"] == 0.3
    assert manifest.options["validation_seed"] == 0
    trained = dataset.index("train")
    assert sorted(set(trained.label.tolist())) == list(range(7))
    assert dataset.why_not_measurable("validation") is None
    assert [len(index) for index in dataset.evaluated("validation")] == [6, 6]


def test_same_build_with_a_validation_split_gives_the_same_bytes_and_resumes(tmp_path):
    root = people(tmp_path / "images", train=10)
    for name, jobs in (("one", 1), ("two", 2)):
        build("csv", root, str(tmp_path / name), validation=0.3, shard_bytes=12_000, jobs=jobs)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert build("csv", root, str(tmp_path / "one"), validation=0.3, **SMALL).already_built
    with pytest.raises(Exception, match="another dataset"):
        build("csv", root, str(tmp_path / "one"), validation=0.3, validation_seed=1, **SMALL)


def test_left_out_images_do_not_leave_a_query_without_a_match(tmp_path):
    root = people(tmp_path / "images", train=10)
    for pid in range(7):
        for n in (1, 3):  # all of camera 1
            (root.parent / f"p{pid}/{n}.jpg").write_bytes(b"no image")
    options = {"skip_unreadable": True, **SMALL}
    build("csv", root, str(tmp_path / "out"), validation=0.3, **options)
    query, gallery = Dataset.open(str(tmp_path / "out")).evaluated("validation")
    assert set(query.pid.tolist()) == {7, 8, 9}
    assert set(gallery.pid.tolist()) == {7, 8, 9}


def test_fraction_that_cannot_work_is_refused_before_the_scan(tmp_path, monkeypatch):
    root = people(tmp_path / "images")
    monkeypatch.setattr("data_shards.building.reading.scan", lambda *_: pytest.fail("scanned"))
    with pytest.raises(ConfigError, match=r"give 0\.334 or more"):
        build("csv", root, str(tmp_path / "out"), validation=0.1, **SMALL)
    assert not (tmp_path / "out").exists()


def test_csv_may_bring_its_own_validation_split(tmp_path):
    root = people(tmp_path / "images", train=6, test=4)
    text = root.read_text()
    for pid in (6, 7):
        for split, name in zip(TEST, VALIDATION, strict=True):
            text = text.replace(f",{pid},0,{split}", f",{pid},0,{name}")
            text = text.replace(f",{pid},1,{split}", f",{pid},1,{name}")
    root.write_text(text)
    build("csv", root, str(tmp_path / "out"), **SMALL)
    dataset = Dataset.open(str(tmp_path / "out"))
    assert set(dataset.evaluated("validation")[0].pid.tolist()) == {6, 7}
    assert dataset.choose_split("auto") == "validation"
    with pytest.raises(ConfigError, match="a validation split of its own"):
        build("csv", root, str(tmp_path / "other"), validation=0.3, **SMALL)


PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def test_dataset_without_a_validation_split_is_what_older_versions_wrote(tmp_path):
    rows = [("a.png", 0, 0, "train"), ("b.png", 1, 0, "train")]
    rows += [("q.png", 2, 0, "query"), ("g.png", 2, 1, "gallery")]
    for row in rows:
        (tmp_path / row[0]).write_bytes(PIXEL + row[0].encode())
    manifest = build("csv", write_csv(tmp_path, rows), str(tmp_path / "out"), **SMALL).manifest
    assert manifest.content.startswith("29e7c51ff7a46cb6")
    assert [shard.sha256[:16] for shard in manifest.shards] == [
        "3c7c6f81cc95e1a6",
        "cafeadf1fea56b9b",
        "9cd2547205bfb03a",
    ]
    assert Dataset.open(str(tmp_path / "out")).choose_split("auto") == "test"


def test_split_that_is_not_there_is_named_with_the_option_that_makes_it(tmp_path):
    build("csv", people(tmp_path / "images"), str(tmp_path / "out"), **SMALL)
    dataset = Dataset.open(str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"no validation split: build it with .*--validation"):
        dataset.choose_split("validation")


def test_validation_digest_follows_the_validation_images_only(tmp_path):
    root = people(tmp_path / "images", train=10)
    one = build("csv", root, str(tmp_path / "1"), validation=0.3, **SMALL).manifest
    two = build("csv", root, str(tmp_path / "2"), validation=0.2, **SMALL).manifest
    assert one.evaluation_digest == two.evaluation_digest
    assert one.validation_digest != two.validation_digest
    again = Manifest.from_json(json.dumps(json.loads(one.to_json())).encode())
    assert again.validation_digest == one.validation_digest


def test_splits_keep_their_order():
    assert SPLITS[:4] == ("train", "val", "query", "gallery")
