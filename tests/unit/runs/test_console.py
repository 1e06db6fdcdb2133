"""The thread between a run's board and a person."""

from __future__ import annotations

import io
import signal
import threading

import pytest
import ray
from ray.exceptions import GetTimeoutError
from rich.console import Console

from reid_train.runs import console as progress
from reid_train.runs.process import Stop


class Board:
    """A board in this process; its answers are what the test says."""

    def __init__(self, *answers: object) -> None:
        self.answers, self.told = list(answers), threading.Event()

    @property
    def read(self) -> Board:
        return self

    def remote(self, seen: int, stop: bool) -> object:
        if self.answers:
            return self.answers.pop(0)
        if stop:
            self.told.set()
        return {}, []


def get(answer: object, timeout: float) -> object:
    if isinstance(answer, Exception):
        raise answer
    return answer


@pytest.mark.timeout(60)
def test_a_stop_is_passed_on_although_ray_answered_late_before(monkeypatch):
    monkeypatch.setattr(ray, "get", get)
    board, asked = Board(GetTimeoutError(), GetTimeoutError()), Stop()
    with progress.watch(board, Console(file=io.StringIO()), asked):
        asked.ask(signal.SIGTERM, None)
        assert board.told.wait(30)
