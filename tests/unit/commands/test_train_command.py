"""Which run the command `train` starts or continues."""

from __future__ import annotations

from pathlib import Path

import pytest

import reid_train.runs.job
from data_shards.errors import ConfigError
from reid_train.cli import train
from reid_train.config import TrainConfig
from reid_train.recipes import recipe
from reid_train.runs.run_dir import Run, write


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TrainConfig, bool]]:
    """What would have been run."""
    calls: list[tuple[TrainConfig, bool]] = []
    monkeypatch.setattr(
        reid_train.runs.job,
        "run",
        lambda config, *, resume, console: calls.append((config, resume)),
    )
    return calls


def command(output: Path, *more: str) -> list[str]:
    return ["--recipe", "demo", "--data", "d", "--output", str(output), "--name", "r", *more]


def test_one_command_starts_a_run_and_continues_it(given, tmp_path):
    train(command(tmp_path, "--seed", "3", "--resume-or-start"))
    started, resumed = given.pop()
    assert (started.seed, resumed) == (3, False)
    write(Run(started, "0" * 64, None))
    train(command(tmp_path, "--seed", "3", "--resume-or-start", "--workers", "2"))
    continued, resumed = given.pop()
    assert resumed
    assert continued == started.replace(workers=2)


@pytest.mark.parametrize(
    ("more", "cpus"),
    [
        ([], 4),
        (["--workers", "1"], 4),
        (["--workers", "2"], None),
        (["--workers", "2", "--cpus-per-worker", "4"], 4),
        (["--cpus-per-worker", "2"], 2),
    ],
)
def test_resumed_run_keeps_its_cores_unless_told_otherwise(given, tmp_path, more, cpus):
    config = recipe("demo").replace(name="r", output=str(tmp_path), cpus_per_worker=4)
    write(Run(config, "0" * 64, None))
    train(["--resume", "--name", "r", "--output", str(tmp_path), *more])
    assert given[0][0].cpus_per_worker == cpus


def test_resuming_takes_the_runs_own_settings(given, tmp_path):
    write(Run(recipe("demo").replace(name="r", output=str(tmp_path), seed=5), "0" * 64, None))
    train(["--resume", "--name", "r", "--output", str(tmp_path)])
    assert given[0][0].seed == 5
    assert given[0][1]


@pytest.mark.parametrize("flag", ["--resume", "--resume-or-start"])
def test_resuming_needs_a_name(given, flag):
    with pytest.raises(ConfigError, match="--name and --output"):
        train([flag, "--output", "runs"])
    assert not given


def test_resuming_what_is_not_there_is_refused(given, tmp_path):
    with pytest.raises(ConfigError, match="there is no run"):
        train(command(tmp_path, "--resume"))
    assert not given
