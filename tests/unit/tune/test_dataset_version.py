"""A sweep stays on the version of the dataset that it was begun with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import build_dataset

from data_shards.building.versions import add, remove
from data_shards.dataset import Dataset
from reid_train.config import TrainConfig
from reid_train.recipes import recipe
from tune import runner
from tune import sweep as sweeps
from tune.config import Sweep
from tune.plan import make_plan


@pytest.fixture
def grown(tiny_dataset: Dataset, tmp_path: Path) -> tuple[str, str, str]:
    """A dataset to which people were added: where it is, and its old and new digests."""
    data, more = str(tmp_path / "data"), tmp_path / "more"
    shutil.copytree(tiny_dataset.url, data)
    build_dataset(more, ("train",))
    add(data, "csv", more / "table.csv", ids="new", jobs=1)
    return data, tiny_dataset.digest, Dataset.open(data).manifest.digest


def opened_by_trial(monkeypatch, data: str, digest: str | None) -> tuple[list[str], dict[str, Any]]:
    """The versions that a trial's workers are given, and what the trial reports."""
    used: list[str] = []
    reported: list[dict[str, Any]] = []
    monkeypatch.setattr(
        runner, "run_workers", lambda config, dataset, *_, **__: used.append(dataset.digest)
    )
    monkeypatch.setattr(runner, "stored_evaluations", lambda run: [])
    monkeypatch.setattr(runner, "_EvaluationReport", lambda: None)
    monkeypatch.setattr(runner.tune, "report", reported.append)
    config = recipe("demo").replace(data=data, output="o", name="trial-000")
    task = {"config": config.to_json(), "run_id": None, "start": None, "until": None}
    board = SimpleNamespace(show=SimpleNamespace(remote=print))
    runner.run_trial(task | {"manifest_digest": digest}, board)
    return used, reported[0]


def test_trials_train_on_the_version_of_their_sweep(monkeypatch, grown):
    data, old, new = grown
    assert opened_by_trial(monkeypatch, data, old) == ([old], {"kept": []})
    assert opened_by_trial(monkeypatch, data, new) == ([new], {"kept": []})


def test_a_trial_whose_version_was_deleted_trains_on_no_other(monkeypatch, grown):
    data, old, _ = grown
    remove(data, [str(Dataset.open(data).index("train").pid[0])], delete_old=True)
    used, reported = opened_by_trial(monkeypatch, data, old)
    assert used == []
    assert "no longer has the version" in reported["storage"]


class Opened(Exception):
    """The sweep has opened its dataset."""


@pytest.mark.parametrize("begun", [True, False])
def test_a_continued_sweep_opens_the_version_it_was_begun_with(monkeypatch, tmp_path, grown, begun):
    data, old, new = grown
    config = recipe("demo").replace(
        data=data, output=str(tmp_path / "out"), name="s", model__weights="none"
    )
    if begun:
        saved = {"config": config.model_dump(mode="json"), "manifest_digest": old}
        (tmp_path / "out" / "s").mkdir(parents=True)
        (tmp_path / "out" / "s" / "sweep.json").write_text(json.dumps(saved))

    def check(config: TrainConfig, dataset: Dataset) -> None:
        raise Opened(dataset.digest)

    monkeypatch.setattr(sweeps.preflight, "check_settings", check)
    with pytest.raises(Opened, match=old if begun else new):
        sweeps.sweep(make_plan(Sweep(trials=8), config))
