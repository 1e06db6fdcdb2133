"""The driver's mind: which trial comes next, what a result means. Knows neither Ray nor MLflow."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from data_shards.errors import ConfigError
from reid_train.config import TrainConfig
from tune.asha import Halving
from tune.searchers import Proposer
from tune.store import ENDED, Book, Trial, begin, end

logger = logging.getLogger(__name__)

RETRIES = 3
"""How often in a row, without an evaluation between, a trial that was lost is run again."""


class Study:
    """Trials from their proposal to their end; every change is written to the book.

    Args:
        book: where trials are kept.
        base: the sweep's configuration, its output the sweep's folder.
        trials: all trials so far; what is queued or was running when a driver ended is run first.
        proposer: says what else to try.
        halving: says what to stop; None stops nothing.
        on_begin: called with each trial that begins, before it is written.
        on_end: called with each trial that ended, before it is written; again if killed meanwhile.
    """

    def __init__(
        self,
        book: Book,
        base: TrainConfig,
        trials: Iterable[Trial],
        proposer: Proposer,
        halving: Halving | None = None,
        on_begin: Callable[[Trial], None] = lambda trial: None,
        on_end: Callable[[Trial], None] = lambda trial: None,
    ):
        self.book, self.base, self.proposer, self.halving = book, base, proposer, halving
        self.trials = list(trials)
        self.on_begin, self.on_end = on_begin, on_end
        self.lock = threading.Lock()
        self._queue = deque(t for t in self.trials if t.state in ("queued", "running"))
        for trial in self.trials:
            if trial.state in ENDED:
                proposer.learn(trial)

    def next(self) -> Trial | None:
        """The next trial to run; None if one may come when others have ended."""
        while True:
            trial = self._queue.popleft() if self._queue else self.proposer.propose(self.trials)
            if trial is None:
                return None
            with self.lock:
                if trial not in self.trials:
                    self.trials.append(trial)
            try:
                trial.config(self.base)
            except ConfigError as error:
                self._end(trial, "failed", str(error))
                continue
            begin(trial)
            self.on_begin(trial)
            self.book.save(trial)
            return trial

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left to begin."""
        return not self._queue and self.proposer.exhausted(self.trials)

    @property
    def over(self) -> bool:
        """Whether everything has begun and ended."""
        return self.exhausted and all(trial.state in ENDED for trial in self.trials)

    def result(self, number: int, metrics: dict[str, Any]) -> bool:
        """Take a trial's report; whether it shall be stopped."""
        trial = self.trials[number]
        if "failure" in metrics:
            self._end(trial, "failed", metrics["failure"])
            return False
        if trial.state != "running":
            return False
        for evaluation in metrics.get("kept", [metrics]):
            trial.add(evaluation | {"run": trial.run_name})
        trial.losses = 0
        latest = trial.evaluations[-1] if trial.evaluations else None
        if latest and self._lags(trial, latest):
            reason = f"behind others after {latest['epoch']} of {self.base.total_epochs} epochs"
            self._end(trial, "stopped", reason)
            return True
        self.book.save(trial)
        return False

    def finish(self, number: int) -> None:
        """A trial's training came to its end, or to the end of its part."""
        trial = self.trials[number]
        if trial.state != "running":
            return
        if not trial.evaluations:
            self._end(trial, "failed", "nothing was measured: has the dataset query and gallery?")
        elif trial.until is not None:
            trial.state = "waiting"
            self.book.save(trial)
        else:
            self._end(trial, "finished")

    def lost(self, number: int, reason: str) -> None:
        """A trial's process was lost: it goes on in another, unless that happens over and over."""
        trial = self.trials[number]
        if trial.state != "running":
            return
        trial.losses += 1
        if trial.losses > RETRIES:
            self._end(trial, "failed", f"given up after {trial.losses} tries: {reason}")
            return
        logger.warning("%s was lost and is run again: %s", trial.name, reason)
        self.book.save(trial)
        self._queue.append(trial)

    def _lags(self, trial: Trial, evaluation: dict[str, Any]) -> bool:
        """Whether a trial is stopped. First points never are: others are compared with them."""
        if self.halving is None or trial.repeats is not None:
            return False
        return self.halving.stops(trial, evaluation) and not trial.label

    def _end(self, trial: Trial, state: Any, reason: str = "") -> None:
        end(trial, state, reason)
        # Before it is written: after a kill in between, the trial is running and ends again.
        self.on_end(trial)
        self.book.save(trial)
        self.proposer.learn(trial)
