"""The commands that build and verify, and a build to S3."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from pictures import SMALL, tree
from PIL import Image

from data_shards.building import build as building
from data_shards.building import reading
from data_shards.building.build import build
from data_shards.cli import main
from data_shards.errors import StorageError
from data_shards.storage import open_storage
from data_shards.verify import verify

# Verification and the command line


@pytest.fixture
def built(root, tmp_path) -> Path:
    build("csv", root, str(tmp_path / "out"), **SMALL)
    return tmp_path / "out"


def test_whole_dataset_passes(built):
    assert verify(str(built), decode_images=True, jobs=1)[1] == []


def test_images_that_are_wider_than_tall_are_counted(root, tmp_path, capsys):
    command = ["build", "--source", "csv", "--root", str(root), "--jobs", "1", "--out"]
    assert main([*command, str(tmp_path / "tall")]) == 0
    assert "wider than tall" not in capsys.readouterr().out
    Image.new("RGB", (40, 20)).save(root.parent / "p3/2.jpg")
    assert main([*command, str(tmp_path / "wide")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "images wider than tall: 1, such as p3/2.jpg (are they crops of people?)" in shown


def test_all_bad_shards_are_found_at_once(built, capsys):
    shards = built / "shards"
    os.truncate(shards / "train-000000.tar", 5000)
    flipped = bytearray((shards / "train-000001.tar").read_bytes())
    flipped[700] ^= 1
    (shards / "train-000001.tar").write_bytes(flipped)
    (shards / "query-000000.tar").unlink()
    assert main(["verify", str(built), "--jobs", "1"]) == 3
    complaint = capsys.readouterr().err
    for part in (
        "train-000000.tar is truncated",
        "train-000001.tar is damaged",
        "query-000000.tar is missing",
    ):
        assert part in complaint
    assert "3 problems" in complaint


def test_shard_that_disagrees_with_the_index_is_found(built):
    """Even where bytes and digest fit: the JSON member says another camera."""
    manifest = json.loads((built / "manifest.json").read_bytes())
    shard = built / manifest["shards"][0]["name"]
    shard.write_bytes(shard.read_bytes().replace(b'"camid": 0', b'"camid": 7', 1))
    manifest["shards"][0]["sha256"] = building.sha256(shard.read_bytes())
    (built / "manifest.json").write_text(json.dumps(manifest))
    problems = verify(str(built), jobs=1)[1]
    assert len(problems) == 1
    assert "train-00000000.json does not agree with the index" in problems[0]


def test_commands_from_images_to_a_table(root, tmp_path, capsys):
    out = str(tmp_path / "out")
    command = ["build", "--source", "csv", "--root", str(root), "--out", out, "--jobs", "1"]
    assert main(command) == 0
    assert main(command) == 0
    assert "already built" in capsys.readouterr().out
    assert main(["verify", out, "--decode", "--jobs", "1"]) == 0
    assert main(["info", out]) == 0
    assert "gallery" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["build", "--source", "csv", "--out", "{}/o"], 2),
        (["build", "--source", "csv", "--root", "{}/none.csv", "--out", "{}/o"], 3),
        (["build", "--source", "msmt17", "--root", "{}", "--out", "{}/o"], 3),
        (["build", "--source", "msmt17", "--root", "{}", "--out", "gs://x/o"], 2),
        (["info", "{}"], 3),
        (["verify", "{}/nowhere"], 3),
    ],
)
def test_exit_codes(arguments, code, tmp_path, capsys):
    assert main([argument.replace("{}", str(tmp_path)) for argument in arguments]) == code
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_unknown_flag_exits_2(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["build", "--source", "imagenet"])
    assert caught.value.code == 2


@pytest.fixture
def s3_out(bucket) -> str:
    return f"s3://{bucket}/people"


def test_s3_and_a_folder_hold_the_same(root, tmp_path, s3_out):
    build("csv", root, s3_out, **SMALL)
    build("csv", root, str(tmp_path / "out"), **SMALL)
    storage = open_storage(s3_out)
    assert {key: storage.read(key) for key, _ in storage.list()} == tree(tmp_path / "out")


def test_missing_bucket_is_found_before_images_are_decoded(root, s3_out, monkeypatch):
    monkeypatch.setattr(reading, "scan", None)
    with pytest.raises(StorageError, match="no bucket 'nowhere'"):
        build("csv", root, "s3://nowhere/people", **SMALL)
