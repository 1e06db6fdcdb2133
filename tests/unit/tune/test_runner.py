"""What ends Ray Tune's run before its time: a signal, or an error of the controller."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from data_shards.errors import StorageError
from reid_train.runs.process import Stop
from tune.runner import _Ending, _NextTrial, _Results

TRIAL: Any = SimpleNamespace(config={"number": 0}, error_file=None)
EVALUATION = {"epoch": 1, "step": 10, "mAP": 0.5, "trial_id": "a"}


class FullDisk:
    """A controller whose store cannot be written."""

    over = False

    def __getattr__(self, name: str) -> Any:
        def fail(*_: object) -> None:
            raise StorageError(f"no space left on device: {name}")

        return fail


@pytest.mark.parametrize("event", ["next", "result", "fail", "finish"])
def test_an_error_of_the_controller_ends_the_run_and_is_kept(event):
    ending = _Ending(Stop())
    controller: Any = FullDisk()
    results = _Results(controller, None, ending)
    if event == "next":
        assert _NextTrial(controller, ending).suggest("a") is None
    elif event == "finish":
        results.on_trial_complete(None, TRIAL, {})
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
