"""What ends Ray Tune's run before its time: a signal, an error of the controller or of storage."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import WorkerGroupError
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from data_shards.errors import DataError, StorageError
from data_shards.storage import open_storage
from reid_train.recipes import recipe
from reid_train.runs.process import Stop
from tune import runner, searchers
from tune.controller import Controller
from tune.runner import _Ending, _NextTrial, _Results
from tune.store import Store, Trial

TRIAL: Any = SimpleNamespace(config={"number": 0}, error_file=None)
EVALUATION = {"epoch": 1, "step": 10, "mAP": 0.5, "trial_id": "a"}


class FullDisk:
    """A controller whose store cannot be written."""

    over = False

    def __getattr__(self, name: str) -> Any:
        def fail(*_: object) -> None:
            raise StorageError(f"no space left on device: {name}")

        return fail


@pytest.mark.parametrize("event", ["next", "result", "fail", "finish", "lost"])
def test_an_error_of_the_controller_ends_the_run_and_is_kept(event):
    ending = _Ending(Stop())
    controller: Any = FullDisk()
    results = _Results(controller, None, ending)
    if event == "next":
        assert _NextTrial(controller, ending).suggest("a") is None
    elif event == "finish":
        results.on_trial_complete(None, TRIAL, {})
    elif event == "lost":
        results.on_trial_error(None, TRIAL)
    else:
        result = {"failure": "x"} if event == "fail" else EVALUATION
        assert results.on_trial_result(None, TRIAL, result) == TrialScheduler.CONTINUE
    assert ending.stop_all()
    assert str(ending.error) == f"no space left on device: {event}"


def test_a_signal_ends_the_run_and_no_trial_with_it():
    stop, ended = Stop(), []
    ending = _Ending(stop)
    controller: Any = SimpleNamespace(over=False, next=lambda: None, finish=ended.append)
    assert not ending.stop_all()
    stop.ask(signal.SIGTERM, None)
    assert ending.stop_all()
    _Results(controller, None, ending).on_trial_complete(None, TRIAL, {})
    assert ended == []
    assert _NextTrial(controller, ending).suggest("a") != Searcher.FINISHED


NO_SPACE = StorageError("no space left on device: /cache")


def run_trial(monkeypatch, error: Exception, at: str = "run_workers") -> dict[str, Any]:
    """What a trial reports last if one of its steps fails."""

    def fail(*_: object, **__: object) -> None:
        raise error

    steps = ("run_workers", "stored_evaluations", "_EvaluationReport")
    for step in steps:
        monkeypatch.setattr(runner, step, fail if step == at else lambda *_, **__: None)
    reported: list[dict[str, Any]] = []
    dataset = SimpleNamespace(digest="d")
    monkeypatch.setattr(runner.Dataset, "open", fail if at == "open" else lambda *_: dataset)
    monkeypatch.setattr(runner.tune, "report", reported.append)
    config = recipe("demo").replace(data="d", output="o", name="trial-000")
    task = {"config": config.to_json(), "run_id": None, "start": None, "until": None}
    task["manifest_digest"] = None
    runner.run_trial(task, SimpleNamespace(show=SimpleNamespace(remote=print)))
    (result,) = reported
    return result


@pytest.mark.parametrize("at", ["open", "run_workers", "stored_evaluations"])
def test_a_fault_of_storage_is_not_reported_as_a_failure_of_the_trial(monkeypatch, at):
    wrapped = WorkerGroupError("x", {1: NO_SPACE}) if at == "run_workers" else NO_SPACE
    assert run_trial(monkeypatch, wrapped, at) == {"storage": str(NO_SPACE)}
    diverged = DataError("the loss is not finite at step 3")
    found = run_trial(monkeypatch, WorkerGroupError("x", {0: diverged}))
    assert found == {"failure": str(diverged)}


def test_a_fault_of_a_trials_storage_ends_the_sweep_which_then_continues_the_trial(tmp_path):
    base = recipe("demo").replace(data="d", output="o", name="s")
    store, ending = Store(open_storage(str(tmp_path))), _Ending(Stop())
    controller = Controller(store, base, [Trial(0, {})], searchers.Searcher())
    assert controller.next() is not None
    results = _Results(controller, None, ending)
    results.on_trial_result(None, TRIAL, {"storage": "no space left on device: /cache"})
    results.on_trial_complete(None, TRIAL, {})
    assert ending.stop_all()
    assert isinstance(ending.error, StorageError)
    assert str(ending.error) == (
        "trial-000: no space left on device: /cache. The same command continues the sweep"
    )
    again = Controller(store, base, store.trials(), searchers.Searcher())
    continued = again.next()
    assert continued is not None
    assert (continued.number, continued.losses) == (0, 0)
