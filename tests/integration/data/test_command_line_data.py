"""Sources and shards that are wrong, as a user gives them: one line, and exit code 3 or 2."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from command_line import COLUMNS, error_line, train, write_csv

from data_shards.storage import open_storage


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("msmt17", "no folders train and test (V1), or mask_train_v2 and mask_test_v2 (V2)"),
        ("market1501", "no folders bounding_box_train, query, bounding_box_test"),
        ("dukemtmc", "no folders bounding_box_train, query, bounding_box_test"),
    ],
)
def test_missing_root_and_wrong_layout_have_different_errors(say, tmp_path, source, expected):
    out = tmp_path / "out"
    nowhere = tmp_path / "nowhere"
    code, said = say("data_shards", "build", "--source", source, "--root", nowhere, "--out", out)
    assert (code, f"{nowhere} is not a folder" in error_line(said)) == (3, True)
    (tmp_path / "empty").mkdir()
    root = tmp_path / "empty"
    code, said = say("data_shards", "build", "--source", source, "--root", root, "--out", out)
    assert (code, expected in error_line(said)) == (3, True)
    assert not out.exists()


def test_root_is_required(say, tmp_path):
    code, said = say("data_shards", "build", "--source", "csv", "--out", tmp_path / "out")
    assert code == 2
    assert "needs --root" in error_line(said)


@pytest.mark.parametrize(
    ("change", "columns", "expected"),
    [
        (lambda rows: rows, ("path", "pid", "camid"), "no column split: its first line must be"),
        (
            lambda rows: [*rows, ("x.png", 0, 0, "train")],
            COLUMNS,
            r"line 18: .*x\.png does not exist",
        ),
        (lambda rows: [*rows, ("../x.png", 0, 0, "train")], COLUMNS, "line 18: .*leads out of"),
        (
            lambda rows: [*rows, ("0-0.png", 0, 0, "train")],
            COLUMNS,
            "line 18: .*already listed on line 2",
        ),
        (
            lambda rows: [("0-0.png", 0, 0, "test")],
            COLUMNS,
            "line 2: split 'test' is none of train",
        ),
        (lambda rows: [("0-0.png", -4, 0, "train")], COLUMNS, "line 2: pid '-4' is not an integer"),
        (lambda rows: rows[:4], COLUMNS, "all train images are of one identity"),
        (lambda rows: [], COLUMNS, "no images"),
    ],
    ids=["column", "file", "outside", "twice", "split", "number", "one-identity", "empty"],
)
def test_wrong_csv_is_refused_with_its_line(
    say, pictures, tmp_path, request, change, columns, expected
):
    folder, rows = pictures
    root = write_csv(folder, request.node.callspec.id, change(rows), columns)
    out = tmp_path / "out"
    code, said = say("data_shards", "build", "--source", "csv", "--root", root, "--out", out)
    assert code == 3
    assert re.search(expected, error_line(said))
    assert not out.exists()


@pytest.fixture
def with_unreadable(pictures) -> Path:
    folder, rows = pictures
    (folder / "rubbish.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    (folder / "cut.png").write_bytes((folder / "0-0.png").read_bytes()[:400])
    extra = [("rubbish.png", 0, 0, "train"), ("cut.png", 1, 0, "train")]
    return write_csv(folder, "unreadable", [*rows, *extra])


def test_unreadable_images_are_listed_and_stop_the_build(say, with_unreadable, tmp_path):
    out = tmp_path / "out"
    arguments = ("build", "--source", "csv", "--root", with_unreadable, "--out", out)
    code, said = say("data_shards", *arguments)
    assert code == 3
    assert "2 images under" in error_line(said)
    assert "--skip-unreadable" in error_line(said)
    assert re.findall(r"^  (\S+): \S", said, re.MULTILINE) == ["rubbish.png", "cut.png"]
    assert not out.exists()


def test_builds_that_leave_images_out_are_the_same_twice(say, with_unreadable, tmp_path):
    manifests = []
    for out in (tmp_path / "a", tmp_path / "b"):
        arguments = ("build", "--source", "csv", "--root", with_unreadable, "--out", out)
        assert say("data_shards", *arguments, "--skip-unreadable")[0] == 0
        manifests.append((out / "manifest.json").read_bytes())
    assert manifests[0] == manifests[1]
    assert b'"rubbish.png"' in manifests[0]


def test_other_data_never_replaces_a_dataset(say, pictures, dataset):
    folder, rows = pictures
    before = {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()}
    root = write_csv(folder, "fewer", rows[:-1])
    code, said = say("data_shards", "build", "--source", "csv", "--root", root, "--out", dataset)
    assert code == 3
    assert "it was not changed: choose another --out" in error_line(said)
    assert {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()} == before


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [(truncate, "is truncated"), (flip, "is damaged"), (Path.unlink, "is missing")],
)
@pytest.mark.parametrize("where", ["folder", "s3"])
def test_damaged_shard_is_found_and_named(say, request, dataset, tmp_path, where, damage, expected):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    damage(copy / "shards" / "gallery-000000.tar")
    url = str(copy)
    if where == "s3":
        url = f"{request.getfixturevalue('s3').url}/copy"
        for path in copy.rglob("*.*"):
            open_storage(url).upload(path.relative_to(copy).as_posix(), path)
    code, said = say("data_shards", "verify", url, "--jobs", 1)
    assert code == 3
    assert f"{url}: 1 problems" in error_line(said)
    found = re.findall(r"^  .*$", said, re.MULTILINE)
    assert len(found) == 1
    assert "gallery-000000.tar" in found[0]
    assert expected in found[0]


@pytest.mark.parametrize("name", ["manifest.json", "index.parquet"])
def test_damaged_manifest_or_index_is_refused_before_training(say, dataset, tmp_path, name):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    truncate(copy / name)
    code, said = train(say, "--data", copy, "--output", tmp_path / "runs")
    assert code == 3
    assert error_line(said)
    assert not (tmp_path / "runs").exists()
