"""When a trial is stopped early: Ray Tune's ASHA, asynchronous Hyperband or median stopping rule.

Ray Tune's scheduler decides. It is wrapped for two reasons: after a kill it sees the evaluations of
earlier drivers again, in their order; and a trial whose process was lost stays the same trial.
`Tuner.restore` would do neither: its snapshots are periodic and pickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reid_train.config import TrainConfig
from tune.config import Sweep
from tune.store import Trial

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial as RayTrial
    from ray.tune.schedulers import TrialScheduler

BRACKETS = 3  # brackets of hyperband: a trial of the n-th is first judged at the n-th rung
STOPPING = ("asha", "hyperband", "median")  # schedulers that stop trials


class EarlyStopping:
    """Judge each evaluation with a scheduler of Ray Tune, one of `STOPPING`, after all so far."""

    def __init__(self, settings: Sweep, config: TrainConfig, trials: Sequence[Trial]):
        self._seed, self._last = config.seed, config.total_epochs
        self._scheduler = _scheduler(settings, config)
        self._trials: dict[int, RayTrial] = {}
        self._earlier = sorted(
            (e.get("time", t.began), e["epoch"], t.number, e) for t in trials for e in t.evaluations
        )

    def add(self, controller: TuneController, number: int, trial: RayTrial) -> None:
        """Take a trial that Ray Tune starts; one that it starts again stays the same trial."""
        from ray.tune.experiment import Trial as RayTrial

        earlier, self._earlier = self._earlier, []
        for *_, known, evaluation in earlier:  # show the scheduler what earlier drivers saw
            self.add(controller, known, RayTrial("earlier", trial_id=f"{known}", stub=True))
            self.lags(controller, known, evaluation)
        if number not in self._trials:
            # Ray draws the bracket from NumPy's global generator: another driver must draw the same
            np.random.seed([self._seed, number])  # noqa: NPY002
            self._trials[number] = trial
            self._scheduler.on_trial_add(controller, trial)

    def lags(self, controller: TuneController, number: int, evaluation: dict[str, Any]) -> bool:
        """Whether the scheduler stops a trial at this evaluation; at the last epoch it need not."""
        if evaluation["epoch"] >= self._last:
            return False
        trial = self._trials[number]
        decision = self._scheduler.on_trial_result(controller, trial, evaluation)
        return decision != self._scheduler.CONTINUE


def _scheduler(settings: Sweep, config: TrainConfig) -> TrialScheduler:
    from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule

    last = config.total_epochs
    grace = min(settings.grace or first_decision(config, settings.reduction), last)
    options: dict[str, Any] = {"time_attr": "epoch", "metric": "mAP", "mode": "max"}
    if settings.scheduler == "median":
        # Not a hard stop: a first point that lags is trained to its end all the same. No time
        # slice: with too few trials to compare with, the rule would pause one for another.
        options |= {"hard_stop": False, "min_time_slice": float("inf")}
        return MedianStoppingRule(grace_period=grace, **options)
    return AsyncHyperBandScheduler(
        max_t=last,
        grace_period=grace,
        reduction_factor=settings.reduction,
        brackets=BRACKETS if settings.scheduler == "hyperband" else 1,
        **options,
    )


def first_decision(config: TrainConfig, factor: float) -> int:
    """The first evaluation at which a trial may be stopped, or replaced in a population.

    It is after the frozen phase and the warm-up, in which mAP hardly depends on what is searched.
    In a shorter run it is earlier, so that there is another decision at `factor` times its epoch;
    but never while the backbone is frozen.
    """
    every, frozen = config.evaluation.every, config.optimizer.frozen_epochs
    warmup = config.optimizer.warmup_epochs if config.optimizer.schedule == "step" else 0
    # The last epoch's evaluation decides nothing: its trial has ended.
    last = (config.total_epochs - 1) // every * every
    early_enough = int(last / factor) // every * every
    wanted = min(_evaluation_after(frozen + warmup, every), early_enough)
    return max(_evaluation_after(frozen, every), wanted)


def decides_while_frozen(grace: int, config: TrainConfig) -> bool:
    """Whether the first evaluation after `grace` epochs is of a frozen backbone."""
    return _evaluation_after(grace - 1, config.evaluation.every) <= config.optimizer.frozen_epochs


def _evaluation_after(epoch: int, every: int) -> int:
    return (epoch // every + 1) * every
