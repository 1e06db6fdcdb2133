"""What a build is given: people, names, splits and options that can be, and that cannot."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pictures import SMALL, people, picture, write_csv

from data_shards.building import reading
from data_shards.building.build import build
from data_shards.dataset import Dataset, why_not_measurable
from data_shards.errors import ConfigError, DataError
from data_shards.records import ImageRecord
from data_shards.sources.layout import Source
from data_shards.verify import verify


def test_single_identity_is_refused(tmp_path):
    with pytest.raises(DataError, match="one identity"):
        build("csv", people(tmp_path, train=1), str(tmp_path / "out"), **SMALL)


@pytest.mark.parametrize(("train", "test"), [(3, 0), (0, 3)])
def test_train_or_test_is_enough(tmp_path, train, test):
    manifest = build("csv", people(tmp_path, train, test), str(tmp_path / "out"), **SMALL).manifest
    assert ("train" in manifest.splits, "query" in manifest.splits) == (train > 0, test > 0)


def test_nothing_at_all_will_not_do(tmp_path):
    with pytest.raises(DataError, match="no images"):
        build("csv", write_csv(tmp_path, []), str(tmp_path / "out"), **SMALL)


def test_number_too_large_for_the_index_is_refused(tmp_path):
    picture(tmp_path / "a.jpg", 1)
    root = write_csv(tmp_path, [("a.jpg", 1 << 63, 1, "query")])
    with pytest.raises(DataError, match="is not from 0 to"):
        build("csv", root, str(tmp_path / "out"), **SMALL)


@pytest.mark.parametrize("name", ["a\x07b.jpg", "a\nb.jpg", "a\u2028b.jpg", "a\udcffb.jpg"])
def test_name_that_no_tool_can_take_is_refused_before_the_scan(tmp_path, name, monkeypatch):
    monkeypatch.setattr(reading, "scan", None)
    records = [ImageRecord(tmp_path / name, name, 1, 1, "query")]
    monkeypatch.setitem(reading.SOURCES, "csv", Source("CSV", lambda root, *, images=None: records))
    with pytest.raises(DataError, match=r"a.*b\.jpg' under .*: rename this file"):
        build("csv", tmp_path / "x.csv", str(tmp_path / "out"), **SMALL)


@pytest.mark.parametrize(
    "name",
    [
        "a\u00a0b",
        "at 9.41\u202fPM",
        "人\u3000a",
        "👩\u200d🔬",
        "e\u0301",
        "a,b;c",
        "x'y%",
        "\u202eb",
    ],
)
def test_every_other_name_is_built_and_given_back(tmp_path, name):
    rows = [(f"{name}/{n}.jpg", n // 2, n % 2, "query" if n < 2 else "gallery") for n in range(4)]
    for n, (relative, *_) in enumerate(rows):
        picture(tmp_path / relative, n)
    quoted = [(f'"{relative}"', *rest) for relative, *rest in rows]
    build("csv", write_csv(tmp_path, quoted), str(tmp_path / "out"), **SMALL)
    dataset = Dataset.open(str(tmp_path / "out"))
    found = [*dataset.index("query").path, *dataset.index("gallery").path]
    assert found == [relative for relative, *_ in rows]
    assert verify(str(tmp_path / "out"), decode_images=True, jobs=1)[1] == []


def test_same_image_listed_twice_is_named(tmp_path):
    root = tmp_path / "msmt17"
    for place in ("train/0/0_0_01_a.jpg", "test/0/0_0_01_a.jpg"):
        picture(root / place, 1)
    for split in ("train", "query", "gallery"):
        (root / f"list_{split}.txt").write_text("0/0_0_01_a.jpg 0\n")
    (root / "list_val.txt").write_text("./0/0_0_01_a.jpg 0\n")
    with pytest.raises(DataError, match=r"train/0/0_0_01_a\.jpg is listed twice"):
        build("msmt17", root, str(tmp_path / "out"), allow_incomplete=True, **SMALL)


# Names of datasets


def test_dataset_is_named_after_its_csv_file(tmp_path):
    root = people(tmp_path / "images").rename(tmp_path / "images/my people_v1.0.csv")
    manifest = build("csv", root, str(tmp_path / "out"), **SMALL).manifest
    assert manifest.name == "my-people_v1-0"
    named = build("csv", root, str(tmp_path / "named"), name="läuft_2", **SMALL).manifest
    assert named.name == "läuft_2"


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("my/data", "my-data"), ("people_v1.0", "people_v1-0"), ("a:b", "a-b"), ("50%", "50"),
        ("it's", "it-s"), ('"x"', "x"), ("a b", "a-b"), ("", "people"), ("../..", "people"),
        ("a\nb", "a-b"),
    ],
)  # fmt: skip
def test_name_that_mlflow_cannot_take_is_refused_at_once(root, tmp_path, name, suggested):
    with pytest.raises(ConfigError, match=f"--name {suggested}$"):
        build("csv", root, "s3://never/asked", name=name, **SMALL)


def test_names_that_are_accepted_are_accepted_by_mlflow():
    validation = pytest.importorskip("mlflow.utils.validation")
    from mlflow.exceptions import MlflowException

    refused = []
    for name in ("people", "läuft_2", "人", "A-b_c", "-x", "people(1)"):
        reading.check_name(name)
        try:
            validation._validate_model_name(f"reid-{name}")
            validation._validate_logged_model_name(f"reid-{name}")
        except MlflowException:
            refused.append(name)
    assert refused == []


# Datasets that cannot be measured


@pytest.mark.parametrize(
    ("query", "gallery", "reason"),
    [
        ([(1, 0)], [(1, 1)], None),
        ([(1, 0), (2, 0)], [(2, 0), (2, 5)], None),
        ([], [(1, 1)], "there are no query images"),
        ([(1, 1)], [], "there are no gallery images"),
        ([(1, 0), (2, 1)], [(3, 1), (4, 0)], "query and gallery share no identity"),
        (
            [(1, 7), (2, 7)],
            [(1, 7), (2, 7)],
            r"all query and gallery images are from one camera; each",
        ),
        ([(1, 0), (2, 1)], [(1, 0), (2, 1), (3, 0)], "no query has a gallery image of the same"),
    ],
)
def test_reason_why_images_cannot_be_measured(query, gallery, reason):
    found = why_not_measurable(query, gallery)
    assert found is None if reason is None else re.match(reason, found)


def test_build_warns_of_a_dataset_that_cannot_be_measured(tmp_path, caplog):
    root = people(tmp_path)
    root.write_text(re.sub(r",\d,(\w+)$", r",0,\1", root.read_text(), flags=re.MULTILINE))
    build("csv", root, str(tmp_path / "out"), **SMALL)
    assert "models cannot be measured on this dataset: all query and gallery" in caplog.text
    assert "one camera" in str(Dataset.open(str(tmp_path / "out")).why_not_measurable())


def test_a_dataset_that_can_be_measured_gives_no_warning(root, tmp_path, caplog):
    build("csv", root, str(tmp_path / "out"), **SMALL)
    assert caplog.text == ""
    assert Dataset.open(str(tmp_path / "out")).why_not_measurable() is None


def market(root: Path) -> Path:
    for n, folder in enumerate(("bounding_box_train", "query", "bounding_box_test")):
        picture(root / folder / f"000{n}_c1s1_000001_00.jpg", n)
        picture(root / folder / f"000{n + 3}_c1s1_000001_00.jpg", n)
    return root


def test_incomplete_copy_is_refused_unless_allowed(tmp_path):
    root, out = market(tmp_path / "market"), str(tmp_path / "out")
    with pytest.raises(DataError, match=r"expected 12,936 train images.*--allow-incomplete"):
        build("market1501", root, out, **SMALL)
    assert not build("market1501", root, out, allow_incomplete=True, **SMALL).manifest.complete


def test_wrong_source_and_options_are_named(root, tmp_path):
    with pytest.raises(ConfigError, match="no source 'imagenet'"):
        build("imagenet", root, str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="no option 'val': its options are images"):
        build("csv", root, str(tmp_path / "out"), options={"val": "merge"})
    with pytest.raises(ConfigError, match="shard-bytes must be positive, not 0"):
        build("csv", root, str(tmp_path / "out"), shard_bytes=0)
