"""What a sweep tries next: a sampler of Optuna, or a grid.

A searcher also learns from the trials of an earlier driver, to continue where that was killed.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import optuna
from optuna import samplers
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from data_shards.errors import ConfigError
from reid_train.config import TrainConfig
from tune.config import Sweep
from tune.space import MODE, Space, Value, coordinates, grid, near
from tune.store import Trial


class Searcher:
    """Says what to try; `Controller` says when. This one tries nothing beyond what is queued."""

    def propose(self, trials: Sequence[Trial]) -> Trial | None:
        """The next trial to run; None if there is none now."""
        return None

    def exhausted(self, trials: Sequence[Trial]) -> bool:
        """Whether there will be no more."""
        return True

    def learn(self, trial: Trial) -> None:
        """Take an ended trial into account."""


class GridSearcher(Searcher):
    """Goes through the finest grid that the number of trials allows, after the first points.

    A sweep that is extended goes through the finer grid, except for the points that it has tried.
    With those of the coarser grid it may run more trials than it was given.
    """

    def __init__(self, settings: Sweep, space: Space, base: TrainConfig, first: int):
        self.base = base
        self._points = grid(space, settings.trials - first)

    def propose(self, trials: Sequence[Trial]) -> Trial | None:
        left = self._left(trials)
        return adaptive(len(trials), left[0], self.base) if left else None

    def exhausted(self, trials: Sequence[Trial]) -> bool:
        return not self._left(trials)

    def _left(self, trials: Sequence[Trial]) -> list[dict[str, Value]]:
        """Points that no trial has; first points are not of the grid, as they differ elsewhere."""
        tried = [t.values for t in trials if not t.label and t.repeats is None]
        return [p for p in self._points if not any(p.items() <= values.items() for values in tried)]


class OptunaSearcher(Searcher):
    """Asks a sampler of Optuna until the sweep has as many trials as it was given."""

    def __init__(self, settings: Sweep, space: Space, base: TrainConfig):
        lists = any(isinstance(d, CategoricalDistribution) for d in space.values())
        if settings.searcher == "cmaes" and (len(space) < 2 or lists):
            raise ConfigError(
                "CMA-ES searches two or more ranges of numbers, and no choice(...): take another "
                "--searcher, such as tpe or gp, or change --search"
            )
        self.settings, self.space, self.base = settings, space, base
        self._asked: dict[int, optuna.Trial] = {}
        self._earlier: list[FrozenTrial] = []
        self._study = new_study()

    def propose(self, trials: Sequence[Trial]) -> Trial | None:
        if self.exhausted(trials):
            return None
        number = len(trials)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some options of samplers are experimental
            self._study.sampler = self._sampler(number)
            asked = self._asked[number] = self._study.ask({**self.space})
        values = asked.params
        for name, dimension in self.space.items():
            if isinstance(dimension, FloatDistribution):
                values[name] = near(values[name], dimension)
        return adaptive(number, values, self.base)

    def exhausted(self, trials: Sequence[Trial]) -> bool:
        # Repeats with other seeds are not trials of the search.
        return sum(trial.repeats is None for trial in trials) >= self.settings.trials

    def learn(self, trial: Trial) -> None:
        """Tell Optuna; a trial that failed counts as the worst, so the search leaves its place."""
        asked = self._asked.pop(trial.number, None)
        if asked is None:
            if known := as_optuna(trial, self.space, self.base):
                self._study.add_trial(known)
                self._earlier.append(known)
            return
        for evaluation in trial.evaluations:
            asked.report(evaluation["mAP"], int(evaluation["epoch"]))
        if trial.state == "stopped":
            # Optuna takes the last value that was reported.
            self._study.tell(asked, state=TrialState.PRUNED)
        else:
            self._study.tell(asked, trial.score if trial.state == "finished" else 0.0)

    def _sampler(self, number: int) -> samplers.BaseSampler:
        """A sampler with its own random numbers for each trial, the same in any driver."""
        seed = int(np.random.SeedSequence((self.base.seed, number)).generate_state(1)[0])
        startup = max(4, self.settings.trials // 4)
        if self.settings.searcher == "random":
            return samplers.RandomSampler(seed)
        if self.settings.searcher == "gp":
            return samplers.GPSampler(seed=seed, n_startup_trials=startup)
        if self.settings.searcher == "cmaes":
            # The state of CMA-ES is lost with its driver: the next driver starts from the best
            # tenth of what is known.
            known = self._earlier if len(self._earlier) >= 10 else None
            return samplers.CmaEsSampler(
                seed=seed, consider_pruned_trials=True, source_trials=known
            )
        # Running trials count as bad ones (`constant_liar`), or parallel proposals would be alike.
        return samplers.TPESampler(
            seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True
        )


def adaptive(number: int, values: dict[str, Value], base: TrainConfig) -> Trial:
    """A trial with these values; adaptive even if the base is not, or they would do nothing."""
    # With an adaptive base it is not repeated in each row of the tables.
    mode: dict[str, Value] = {MODE: "adaptive"} if base.regularization.mode != "adaptive" else {}
    return Trial(number, mode | values, seed=base.seed)


def new_study() -> optuna.Study:
    """An empty study of Optuna, in memory."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="maximize")


def as_optuna(trial: Trial, space: Space, base: TrainConfig) -> FrozenTrial | None:
    """An ended trial as Optuna has it; None if it lies outside the space."""
    # Not `trial.config`: the values of a trial that failed may not be a valid configuration.
    place = coordinates(space, base.flat() | trial.values)
    if place is None:
        return None
    return create_trial(
        state=TrialState.PRUNED if trial.state == "stopped" else TrialState.COMPLETE,
        value=trial.score if trial.state in ("finished", "stopped") else 0.0,
        params=place,
        distributions={**space},
        intermediate_values={int(e["epoch"]): e["mAP"] for e in trial.evaluations},
    )
