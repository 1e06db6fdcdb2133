"""Bad input, as a user gives it: one line that says what, where and what to do, and an exit code.

2 a command or a setting, 3 data, 4 storage. Whatever was there before stays as it was.
"""

from __future__ import annotations

import csv
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data_shards.cli
import reid_train.cli
from data_shards import patience
from data_shards.storage import open_storage
from reid_train import weights

COLUMNS = ("path", "pid", "camid", "split")
Say = Callable[..., tuple[int, str]]


def write_csv(folder: Path, name: str, rows: list[tuple], columns: tuple = COLUMNS) -> Path:
    path = folder / f"{name}.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *(row[: len(columns)] for row in rows)])
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple]]:
    """A folder of pictures, and their rows: 2 identities to train on and 2 others to find."""
    folder, rng, rows = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    for pid in range(4):
        for number in range(4):
            name = f"{pid}-{number}.png"
            Image.fromarray(rng.integers(0, 256, (32, 16, 3), np.uint8)).save(folder / name)
            split = "train" if pid < 2 else "query" if number == 0 else "gallery"
            rows.append((name, pid, number % 2, split))
    return folder, rows


@pytest.fixture(scope="module")
def dataset(pictures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rows = pictures
    out = tmp_path_factory.mktemp("dataset")
    arguments = ["--source", "csv", "--root", str(write_csv(folder, "whole", rows))]
    assert data_shards.cli.main(["build", *arguments, "--out", str(out), "--jobs", "1"]) == 0
    return out


@pytest.fixture
def say(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Gives a command line to the program that its first word names; returns code and error."""

    def run(program: str, *arguments: object) -> tuple[int, str]:
        words = [str(argument) for argument in arguments]
        capfd.readouterr()
        try:
            if program == "data_shards":
                code = data_shards.cli.main(words)
            else:
                monkeypatch.setattr(sys, "argv", ["reid_train", *words])
                code = reid_train.cli.main()
        except SystemExit as exit:  # the parser's
            code = exit.code if isinstance(exit.code, int) else 1
        said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capfd.readouterr().err)
        assert "Traceback" not in said
        return code, said

    return run


def error_line(said: str) -> str:
    """The one line that begins with error."""
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    return lines[0]


def train(say: Say, *arguments: object) -> tuple[int, str]:
    return say(
        "reid_train", "train", "--recipe", "demo", "--batch.identities", 2, "--tracking.uri", "off",
        *arguments,
    )  # fmt: skip


# --- commands and settings --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trane"], "no command 'trane'; there are train, "),
        (["train"], "--data is missing: give a folder or an s3://bucket/prefix"),
        (["train", "--data", "x"], "--output is missing: give a folder or an s3://bucket/prefix"),
        (["train", "--recipe", "demmo"], "unknown recipe 'demmo'. Did you mean demo?"),
        (["train", "--resume"], "--resume needs the run's --name and --output"),
        (["train", "--workers", "5"], "64 images cannot be shared equally by 5 workers"),
        (["train", "--batch.identities", "1"], "at least 2, or no anchor has a negative"),
        (["train", "--name", "a/b"], "--name 'a/b' must be usable as a folder's name"),
        (["train", "--data", "ftp://x", "--output", "o"], "write s3://bucket/prefix"),
        (["train", "--data", "s3://", "--output", "o"], "names no bucket"),
    ],
)
def test_wrong_command_or_setting_is_one_line(say, monkeypatch, tmp_path, words, expected):
    monkeypatch.chdir(tmp_path)
    code, said = say("reid_train", *words)
    assert code == 2
    assert expected in error_line(said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--optimizer.learning-rat", "1"], "--optimizer.learning-rate"),
        (["--optimizer.learning-rate", "fast"], "--optimizer.learning-rate"),
        (["--optimizer.learning-rate", "-1"], "greater than 0"),
        (["--model.backbone", "vgg"], "resnet18"),
        (["--regularization.mode", "adaptiv"], "adaptive"),
    ],
)
def test_wrong_override_names_the_flag_or_what_it_takes(say, words, expected):
    code, said = say("reid_train", "train", *words)
    assert code == 2
    assert expected in said


def test_unknown_command_of_data_shards_lists_those_there_are(say):
    code, said = say("data_shards", "bild")
    assert code == 2
    assert "build" in said


def test_models_without_a_registry_says_how_to_name_one(say, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code, said = say("reid_train", "models")
    assert code == 2
    assert "--tracking-uri" in error_line(said)


def test_run_that_is_not_there_cannot_be_resumed(say, tmp_path):
    code, said = train(say, "--resume", "--name", "none", "--output", tmp_path)
    assert code == 2
    assert f"no run to resume: {tmp_path}/none/run.json is not there" in error_line(said)


# --- sources ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("msmt17", "no folders train and test (V1), or mask_train_v2 and mask_test_v2 (V2)"),
        ("market1501", "no folders bounding_box_train, query, bounding_box_test"),
        ("dukemtmc", "no folders bounding_box_train, query, bounding_box_test"),
    ],
)
def test_missing_root_and_wrong_layout_are_told_apart(say, tmp_path, source, expected):
    out = tmp_path / "out"
    nowhere = tmp_path / "nowhere"
    code, said = say("data_shards", "build", "--source", source, "--root", nowhere, "--out", out)
    assert (code, f"{nowhere} is not a folder" in error_line(said)) == (3, True)
    (tmp_path / "empty").mkdir()
    root = tmp_path / "empty"
    code, said = say("data_shards", "build", "--source", source, "--root", root, "--out", out)
    assert (code, expected in error_line(said)) == (3, True)
    assert not out.exists()


def test_root_is_asked_for(say, tmp_path):
    code, said = say("data_shards", "build", "--source", "csv", "--out", tmp_path / "out")
    assert code == 2
    assert "needs --root" in error_line(said)


@pytest.mark.parametrize(
    ("change", "columns", "expected"),
    [
        (lambda rows: rows, ("path", "pid", "camid"), "no column split: its first line must name"),
        (
            lambda rows: [*rows, ("x.png", 0, 0, "train")],
            COLUMNS,
            r"line 18: .*x\.png is not there",
        ),
        (lambda rows: [*rows, ("../x.png", 0, 0, "train")], COLUMNS, "line 18: .*leads out of"),
        (lambda rows: [*rows, ("0-0.png", 0, 0, "train")], COLUMNS, "line 18: .*on line 2 already"),
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
    assert "stays as it is: choose another --out" in error_line(said)
    assert {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()} == before


# --- shards -----------------------------------------------------------------------------------


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


# --- what a training needs --------------------------------------------------------------------


def test_dataset_that_is_not_there_says_how_to_make_one(say, tmp_path):
    code, said = train(say, "--data", tmp_path / "nowhere", "--output", tmp_path / "runs")
    assert code == 3
    assert "python -m data_shards build" in error_line(said)


def test_dataset_without_train_split_is_refused(say, pictures, tmp_path):
    folder, rows = pictures
    root = write_csv(folder, "test-only", rows[8:])
    out = tmp_path / "out"
    assert say("data_shards", "build", "--source", "csv", "--root", root, "--out", out)[0] == 0
    code, said = train(say, "--data", out, "--output", tmp_path / "runs")
    assert code == 3
    assert "has no train split" in error_line(said)


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["--batch.identities", 3], 2, "a batch of 3 identities cannot be made: .* has 2"),
        (["--image.height", 16], 2, "use higher images or fewer stripes"),
        (["--regularization.exclude", "x*"], 2, "exclude pattern 'x.' matches no parameter"),
        (["--batch.steps-per-epoch", "None", "--batch.accumulate", 9], 2, "--batch.accumulate"),
        (["--model.weights", "nowhere.pt"], 4, "nowhere.pt is not there; --model.weights is"),
        (["--model.weights", "weights.bin"], 2, "ends in .safetensors, .pt or .pth"),
        (["--model.weights", "rubbish.safetensors"], 3, "rubbish.safetensors is not a safetensors"),
        (["--model.weights", "pickle.pt"], 3, "pickle from outside is refused"),
    ],
)
def test_what_would_fail_later_fails_before_the_name_is_taken(
    say, dataset, tmp_path, monkeypatch, words, code, expected
):
    monkeypatch.chdir(tmp_path)
    Path("rubbish.safetensors").write_bytes(bytes(range(256)))
    Path("pickle.pt").write_bytes(pickle.dumps(Touch(tmp_path / "run-by-pickle")))
    found, said = train(say, "--data", dataset, "--output", "runs", "--name", "one", *words)
    assert found == code
    assert re.search(expected, error_line(said))
    assert not Path("runs").exists()
    assert not Path("run-by-pickle").exists()


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_imagenet_weights_that_cannot_be_had_ask_for_a_path(say, dataset, tmp_path, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(weights, "RETRY_WAIT", 0.0)
    arguments = ("--data", dataset, "--output", tmp_path / "runs", "--model.weights", "imagenet")
    code, said = train(say, *arguments)
    assert code == 2
    assert "give its path or s3:// URL instead of 'imagenet'" in error_line(said)


def test_tracking_server_that_is_not_there_is_named(say, dataset, tmp_path):
    arguments = ("--data", dataset, "--output", tmp_path / "runs")
    code, said = train(say, *arguments, "--tracking.uri", "http://127.0.0.1:9")
    assert code == 4
    assert "MLflow at http://127.0.0.1:9" in error_line(said)
    assert "check --tracking.uri" in error_line(said)


def test_name_that_is_taken_is_refused(say, dataset, tmp_path):
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "run.json").write_text("{}")
    arguments = ("--data", dataset, "--output", tmp_path / "runs", "--name", "one")
    code, said = train(say, *arguments)
    assert code == 2
    assert "continue it with --resume, or give another --name" in error_line(said)
    assert (tmp_path / "runs" / "one" / "run.json").read_text() == "{}"


# --- object storage ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "denies access .* check AWS_ACCESS_KEY_ID"),
        ({"AWS_ACCESS_KEY_ID": "wrong"}, "denies access .* check AWS_ACCESS_KEY_ID"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no credentials for s3://"),
    ],
    ids=["secret", "key", "none"],
)
def test_wrong_credentials_are_told_and_not_repeated(
    say, s3, dataset, tmp_path, monkeypatch, change, expected
):
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in change.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    secrets = [s3.server.secret_key, "=wrong"]
    for code, said in (
        say("data_shards", "info", f"{s3.url}/data"),
        train(say, "--data", dataset, "--output", f"{s3.url}/runs"),
    ):
        assert code == 4
        assert re.search(expected, error_line(said))
        assert not any(secret in said for secret in secrets)


def test_bucket_that_is_not_there_is_named(say, s3, pictures, dataset):
    folder, rows = pictures
    root = write_csv(folder, "again", rows)
    for code, said in (
        say("data_shards", "info", "s3://no-such-bucket/data"),
        say(
            "data_shards",
            "build",
            "--source",
            "csv",
            "--root",
            root,
            "--out",
            "s3://no-such-bucket",
        ),
        train(say, "--data", "s3://no-such-bucket/data", "--output", f"{s3.url}/runs"),
        train(say, "--data", dataset, "--output", "s3://no-such-bucket"),
    ):
        assert code == 4
        assert "no bucket 'no-such-bucket'" in error_line(said)


def test_server_that_does_not_answer_is_named_at_once_and_given_up_later(say, monkeypatch, caplog):
    monkeypatch.setattr(patience, "PATIENCE", 3.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    began = time.monotonic()
    code, said = say("data_shards", "info", "s3://bucket/data")
    assert time.monotonic() - began < 40
    assert code == 4
    assert "s3://bucket/data/manifest.json on http://127.0.0.1:9" in caplog.text
    assert "trying again in" in caplog.text
    assert "cannot reach http://127.0.0.1:9" in error_line(said)
    assert "is AWS_ENDPOINT_URL right" in error_line(said)


@pytest.mark.parametrize(
    ("name", "value"), [("AWS_ENDPOINT_URL", "nonsense"), ("AWS_PROFILE", "no-such-profile")]
)
def test_environment_that_makes_no_sense_is_one_line(say, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    code, said = say("data_shards", "info", "s3://bucket/data")
    assert code == 2
    assert value in error_line(said)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk_ends_a_build_and_leaves_nothing_half_done(say, pictures, tiny_disk, tmp_path):
    folder, rows = pictures
    root, out = write_csv(folder, "big", rows), tmp_path / "out"
    arguments = ("build", "--source", "csv", "--root", root, "--out", out, "--jobs", 1)
    code, said = say("data_shards", *arguments, "--work", tiny_disk)
    assert code == 4
    assert "disk full" in error_line(said)
    assert "free some space" in error_line(said)
    assert not (out / "manifest.json").exists()
    assert list(tiny_disk.iterdir()) == []
    assert say("data_shards", *arguments)[0] == 0


def test_full_temporary_disk_is_told_by_verify(say, s3, dataset, tiny_disk, monkeypatch):
    url = f"{s3.url}/data"
    for path in dataset.rglob("*.*"):
        open_storage(url).upload(path.relative_to(dataset).as_posix(), path)
    monkeypatch.setattr(tempfile, "tempdir", str(tiny_disk))
    code, said = say("data_shards", "verify", url, "--jobs", 1)
    assert code == 4
    assert "disk full" in error_line(said)
