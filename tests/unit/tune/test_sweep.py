"""What a sweep leaves on storage, and what it registers, also if its driver was killed before."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_shards.storage import open_storage
from reid_train.recipes import recipe
from reid_train.runs.run_dir import Summary
from reid_train.tracking.tracker import Tracker
from tune import sweep
from tune.searchers import Searcher
from tune.store import State, Store, Trial
from tune.sweep import _Stages

EPOCHS = (2, 4, 6)


def stages(folder: Path, **changes: Any) -> _Stages:
    """Those of a sweep in `folder`, in which nothing is left to train."""
    base = recipe("demo").replace(data="d", output=str(folder), name="s", **changes)
    parts: dict[str, Any] = {name: None for name in _Stages.__annotations__}
    parts |= {"config": base, "base": base, "store": Store(open_storage(str(folder)))}
    parts["dataset"] = SimpleNamespace(choose_split=lambda split: "test")
    parts["parent"] = Tracker(None, None)
    return _Stages(**parts)


def member(state: State) -> Trial:
    """One that was trained in three parts of an evaluation each. The second was the best."""
    trial = Trial(0, {}, state=state, reason="why")
    for part, epoch in enumerate(EPOCHS):
        trial.part = part
        trial.changes.append({"epoch": epoch - 2, "values": {}, "from": None})
        score, name = 0.6 if part == 1 else 0.5, f"checkpoint_{epoch}"
        trial.add({"epoch": epoch, "step": epoch, "mAP": score, "checkpoint": name})
    return trial


def with_checkpoints(folder: Path, trial: Trial) -> Trial:
    for run in trial.runs:
        for epoch in EPOCHS:
            name = f"checkpoint_{epoch}/model.safetensors"
            open_storage(f"{folder}/{run}").write(name, b"x")
    return trial


def left(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.glob("trial-*/checkpoint_*")}


@pytest.mark.parametrize(
    ("state", "kept"),
    [
        ("finished", {"trial-000-1/checkpoint_4", "trial-000-2/checkpoint_6"}),
        ("failed", set()),
        ("stopped", set()),
    ],
)
def test_a_search_that_has_ended_keeps_only_the_checkpoints_it_needs(tmp_path, state, kept):
    trial = with_checkpoints(tmp_path, member(state))
    # No trial is left to run: the driver was killed after the last one ended.
    assert stages(tmp_path)._run([trial], Searcher(), 1, 0) == [trial]
    assert left(tmp_path) == kept


def test_a_member_that_ends_keeps_the_checkpoints_that_others_may_start_from(tmp_path):
    trial = with_checkpoints(tmp_path, member("finished"))
    stages(tmp_path)._end(trial)
    assert len(left(tmp_path)) == 9


def published(monkeypatch: pytest.MonkeyPatch, models: list[str | None]) -> None:
    """In place of training's end: it registers these models, one a call."""

    def publish(*_: object) -> tuple[Summary, list]:
        return Summary("trial-000", {}, {}, 1.0, "r", "c", models.pop(0), False), []

    monkeypatch.setattr(sweep, "publish", publish)


def test_a_model_that_was_not_registered_is_registered_by_the_next_command(tmp_path, monkeypatch):
    swept, best = stages(tmp_path), member("finished")
    best.mlflow_run_id, swept.parent.run_id = "1", "0"
    models = [None, "models:/m/1"]
    published(monkeypatch, models)
    assert [swept._publish(best)["model"] for _ in range(3)] == [None, "models:/m/1", "models:/m/1"]
    assert models == []


@pytest.mark.parametrize("name", ["off", None])
def test_a_sweep_that_registers_nothing_publishes_once(tmp_path, monkeypatch, name):
    swept, best = stages(tmp_path, tracking__model_name=name), member("finished")
    swept.parent.run_id = "0" if name else None  # or MLflow is off
    published(monkeypatch, [None])
    assert [swept._publish(best)["model"] for _ in range(2)] == [None, None]


def test_the_best_trial_is_tracked_before_it_is_registered(tmp_path, monkeypatch):
    """MLflow was away when it began."""
    swept, best = stages(tmp_path), member("finished")
    swept.parent.run_id = "0"
    ended = []
    monkeypatch.setattr(_Stages, "_begin", lambda _, trial: setattr(trial, "mlflow_run_id", "1"))
    monkeypatch.setattr(_Stages, "_end", lambda _, trial: ended.append(trial))
    published(monkeypatch, ["models:/m/1"])
    assert swept._publish(best)["model"] == "models:/m/1"
    assert ended == [best]
    assert swept.store.trials() == [best]
