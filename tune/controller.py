"""Decide which trial runs next and what to do with its results. Knows neither Ray nor MLflow."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from data_shards.errors import ConfigError
from reid_train.config import TrainConfig
from tune.searchers import Searcher
from tune.store import ENDED, State, Store, Trial

logger = logging.getLogger(__name__)

RETRIES = 3  # how often in a row, without an evaluation in between, a lost trial is run again


class Controller:
    """Trials from their proposal to their end; every change is written to the store.

    Of the `trials` so far, queued ones and those that ran when a driver ended run first. `on_begin`
    and `on_end` get a trial before it is written; `on_end` again if the driver is killed meanwhile.
    """

    def __init__(
        self,
        store: Store,
        base: TrainConfig,
        trials: Iterable[Trial],
        searcher: Searcher,
        on_begin: Callable[[Trial], None] = lambda trial: None,
        on_end: Callable[[Trial], None] = lambda trial: None,
    ):
        self.store, self.base, self.searcher = store, base, searcher
        self.trials, self.on_begin, self.on_end = list(trials), on_begin, on_end
        self._queue = deque(t for t in self.trials if t.state in ("queued", "running"))
        for trial in self.trials:
            if trial.state in ENDED:
                searcher.learn(trial)

    def next(self) -> Trial | None:
        """The next trial to run; None if one may come when others have ended."""
        while True:
            trial = self._queue.popleft() if self._queue else self.searcher.propose(self.trials)
            if trial is None:
                return None
            if trial not in self.trials:
                self.trials.append(trial)
            try:
                trial.config(self.base)
            except ConfigError as error:
                self._end(trial, "failed", str(error))
                continue
            trial.state, trial.reason = "running", ""
            trial.began = trial.began or time.time()
            self.on_begin(trial)
            self.store.save(trial)
            return trial

    @property
    def over(self) -> bool:
        """Whether everything has begun and ended."""
        begun = not self._queue and self.searcher.exhausted(self.trials)
        return begun and all(trial.state in ENDED for trial in self.trials)

    def result(
        self,
        number: int,
        evaluations: Sequence[dict[str, Any]],
        lags: Callable[[dict[str, Any]], bool] = lambda evaluation: False,
    ) -> bool:
        """Take one evaluation of a trial, or at its end all that are kept; whether to stop it.

        `lags` says whether the scheduler stops a trial at an evaluation.
        """
        trial = self.trials[number]
        if trial.state != "running":
            return False
        new = [e for e in sorted(evaluations, key=lambda e: e["epoch"]) if trial.add(e)]
        behind = [lags(evaluation) for evaluation in new] if trial.repeats is None else []
        trial.losses = 0
        # First points are judged but never stopped: others are compared with them.
        stops = any(behind[-1:]) and new[-1]["epoch"] == trial.epoch and not trial.label
        if stops:
            of = self.base.total_epochs
            self._end(trial, "stopped", f"behind others after {trial.epoch} of {of} epochs")
        else:
            self.store.save(trial)
        return stops

    def fail(self, number: int, reason: str) -> None:
        """A trial cannot be trained: its own configuration is the cause."""
        self._end(self.trials[number], "failed", reason)

    def finish(self, number: int) -> None:
        """A trial's training came to its end, or to the end of its part."""
        trial = self.trials[number]
        if trial.state != "running":
            return
        if not trial.evaluations:
            self._end(trial, "failed", "nothing was evaluated; has the dataset query and gallery?")
        elif trial.until is not None:
            trial.state = "waiting"
            self.store.save(trial)
        else:
            self._end(trial, "finished")

    def lost(self, number: int, reason: str) -> None:
        """A trial's process was lost: run it again, unless that happens over and over."""
        trial = self.trials[number]
        if trial.state != "running":
            return
        trial.losses += 1
        if trial.losses > RETRIES:
            self._end(trial, "failed", f"given up after {trial.losses} tries: {reason}")
            return
        logger.warning("%s was lost and is run again: %s", trial.name, reason)
        self.store.save(trial)
        self._queue.append(trial)

    def _end(self, trial: Trial, state: State, reason: str = "") -> None:
        trial.state, trial.reason, trial.ended = state, reason, time.time()
        # Before it is written: after a kill in between, the trial is running and ends again.
        self.on_end(trial)
        self.store.save(trial)
        self.searcher.learn(trial)
