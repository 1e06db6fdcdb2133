"""Fixtures of the tests that give command lines."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import Say, write_csv
from PIL import Image

import data_shards.cli
import reid_train.cli


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
