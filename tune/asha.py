"""Ray Tune's asynchronous successive halving, told of trials by their number.

Its memory is filled again from the book when a sweep is continued.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from reid_train.config import TrainConfig
from tune.config import Sweep
from tune.patience import first_decision
from tune.store import Trial


class Halving:
    """Says whether a trial lags so far behind others at the same epoch that it is stopped."""

    def __init__(self, settings: Sweep, config: TrainConfig, trials: Sequence[Trial]):
        self._last = config.total_epochs
        grace = settings.grace or first_decision(config, settings.reduction)
        self._asha = ASHAScheduler(
            time_attr="epoch",
            metric="mAP",
            mode="max",
            max_t=self._last,
            grace_period=min(grace, self._last),
            reduction_factor=settings.reduction,
        )
        self._known: set[int] = set()
        for trial in sorted(trials, key=lambda t: t.began):
            for evaluation in trial.evaluations:
                self.stops(trial, evaluation)

    def stops(self, trial: Trial, evaluation: dict[str, Any]) -> bool:
        """Take an evaluation into account; whether the trial should end with it.

        The last epoch's is the end anyway.
        """
        if evaluation["epoch"] >= self._last:
            return False
        named: Any = SimpleNamespace(trial_id=str(trial.number))
        nobody: Any = None
        if trial.number not in self._known:
            self._known.add(trial.number)
            self._asha.on_trial_add(nobody, named)
        return self._asha.on_trial_result(nobody, named, evaluation) == TrialScheduler.STOP
