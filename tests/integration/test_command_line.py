"""Bad input, as a user gives it: one line that says what, where and what to do, and an exit code.

2 a command or a setting, 3 data, 4 storage. Whatever was there before stays as it was.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
from command_line import error_line, train, write_csv

from reid_train.model import pretrained as weights

# --- commands and settings --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trane"], "no command 'trane'. Did you mean train? There are: train, "),
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
    assert f"there is no run none: {tmp_path}/none/run.json is missing" in error_line(said)


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
        (["--batch.identities", 3], 2, "3 people a batch, .* has 2: give --batch.identities 2"),
        (["--image.height", 16], 2, "use higher images or fewer stripes"),
        (["--regularization.exclude", "x*"], 2, "exclude pattern 'x.' matches no parameter"),
        (["--batch.steps-per-epoch", "None", "--batch.accumulate", 9], 2, "--batch.accumulate"),
        (["--model.weights", "nowhere.pt"], 4, "nowhere.pt is not there; --model.weights is"),
        (["--model.weights", "weights.bin"], 2, "ends in .safetensors, .pt or .pth"),
        (["--model.weights", "rubbish.safetensors"], 3, "rubbish.safetensors is neither safe"),
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
    assert "Correct --tracking.uri" in error_line(said)


def test_name_that_is_taken_is_refused(say, dataset, tmp_path):
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "run.json").write_text("{}")
    arguments = ("--data", dataset, "--output", tmp_path / "runs", "--name", "one")
    code, said = train(say, *arguments)
    assert code == 2
    assert "if it has finished), or give" in error_line(said)
    assert (tmp_path / "runs" / "one" / "run.json").read_text() == "{}"
