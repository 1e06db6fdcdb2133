"""What a sweep tries next: Optuna's TPE, chance, or a grid.

A proposer learns from trials as they end, and also from those of an earlier driver, so a sweep that
was killed goes on as if it had not been.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState

from reid_train.config import TrainConfig
from tune.config import Sweep
from tune.space import (
    MODE,
    Choice,
    Dimension,
    Real,
    Space,
    Value,
    coordinates,
    draw,
    grid,
)
from tune.store import Trial

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Proposer(Protocol):
    """Says what to try; `Study` says when."""

    def propose(self, trials: Sequence[Trial]) -> Trial | None:
        """The next trial to run; None if there is none now."""
        ...

    def exhausted(self, trials: Sequence[Trial]) -> bool:
        """Whether there will be none any more."""
        ...

    def learn(self, trial: Trial) -> None:
        """Take an ended trial into account."""
        ...


class Listed:
    """Proposes nothing of its own: what is queued is all there is."""

    def propose(self, trials: Sequence[Trial]) -> Trial | None:
        return None

    def exhausted(self, trials: Sequence[Trial]) -> bool:
        return True

    def learn(self, trial: Trial) -> None:
        pass


class _Counted:
    """Proposes until the sweep has as many trials as it shall have."""

    def __init__(self, settings: Sweep, space: Space, base: TrainConfig):
        self.settings, self.space, self.base = settings, space, base

    def propose(self, trials: Sequence[Trial]) -> Trial | None:
        if self.exhausted(trials):
            return None
        number = len(trials)
        return adaptive(number, self._values(number, searched(trials)), self.base)

    def exhausted(self, trials: Sequence[Trial]) -> bool:
        return searched(trials) >= self.settings.trials

    def learn(self, trial: Trial) -> None:
        pass

    def _values(self, number: int, place: int) -> dict[str, Value]:
        """Values of a trial with this number, `place` search trials after the first."""
        raise NotImplementedError


class Chance(_Counted):
    """Draws every trial by itself; the same number gives the same values."""

    def _values(self, number: int, place: int) -> dict[str, Value]:
        return draw(self.space, np.random.default_rng((self.base.seed, place)))


class Grid:
    """Goes through the finest grid that the number of trials allows, after the first points.

    A sweep that is extended goes through the finer grid, but for the points that it has tried. With
    those of the coarser grid it may come to more trials than it was told.
    """

    def __init__(self, settings: Sweep, space: Space, base: TrainConfig, first: int):
        self.base = base
        self._points = grid(space, settings.trials - first)

    def propose(self, trials: Sequence[Trial]) -> Trial | None:
        left = self._left(trials)
        return adaptive(len(trials), left[0], self.base) if left else None

    def exhausted(self, trials: Sequence[Trial]) -> bool:
        return not self._left(trials)

    def learn(self, trial: Trial) -> None:
        pass

    def _left(self, trials: Sequence[Trial]) -> list[dict[str, Value]]:
        """Points that no trial has; a first point differs from the base in other fields, too."""
        tried = [t.values for t in trials if not t.label and t.repeats is None]
        return [p for p in self._points if not any(p.items() <= values.items() for values in tried)]


class Tpe(_Counted):
    """Optuna's tree-structured Parzen estimator over all dimensions at once."""

    def __init__(self, settings: Sweep, space: Space, base: TrainConfig):
        super().__init__(settings, space, base)
        self._distributions = {name: _distribution(d) for name, d in space.items()}
        self._asked: dict[int, optuna.Trial] = {}
        self._study = optuna.create_study(direction="maximize")

    def learn(self, trial: Trial) -> None:
        """Tell Optuna; a trial that failed for good counts as the worst, so its place is left."""
        asked = self._asked.pop(trial.number, None)
        state, value = _outcome(trial)
        if asked is not None:
            for evaluation in trial.evaluations:
                asked.report(evaluation["mAP"], int(evaluation["epoch"]))
            # Of a stopped trial Optuna takes the last value that was reported.
            self._study.tell(asked, None if state == TrialState.PRUNED else value, state)
            return
        place = coordinates(self.space, trial.config(self.base))
        if place is not None:
            values = {int(e["epoch"]): e["mAP"] for e in trial.evaluations}
            self._study.add_trial(
                optuna.trial.create_trial(
                    state=state,
                    value=value,
                    params=dict(place),
                    distributions=self._distributions,
                    intermediate_values=values,
                )
            )

    def _values(self, number: int, place: int) -> dict[str, Value]:
        self._study.sampler = self._sampler(number)
        asked = self._study.ask(self._distributions)
        self._asked[number] = asked
        ranges = {name: d for name, d in self.space.items() if isinstance(d, Real)}
        return {
            name: ranges[name].near(value) if name in ranges else value
            for name, value in asked.params.items()
        }

    def _sampler(self, number: int) -> optuna.samplers.TPESampler:
        """With random numbers of its own for each trial: none is drawn again by another driver."""
        seed = np.random.SeedSequence((self.base.seed, number)).generate_state(1)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(
                seed=int(seed),
                n_startup_trials=max(4, self.settings.trials // 4),
                multivariate=True,
                # Trials that are running count as bad ones, or parallel proposals would be alike.
                constant_liar=True,
            )


def adaptive(number: int, values: dict[str, Value], base: TrainConfig) -> Trial:
    """A trial with these values; adaptive even if the base is not, or they would do nothing."""
    # An adaptive base needs no word of it in each row of the tables.
    mode: dict[str, Value] = {MODE: "adaptive"} if base.regularization.mode != "adaptive" else {}
    return Trial(number, mode | values, seed=base.seed)


def searched(trials: Sequence[Trial]) -> int:
    """Trials of the search, the first points among them; repeats with other seeds are not."""
    return sum(trial.repeats is None for trial in trials)


def importance(space: Space, base: TrainConfig, trials: Sequence[Trial]) -> Mapping[str, float]:
    """Share of each dimension in the variance of mAP (fANOVA), largest first; {} if too few."""
    study = optuna.create_study(direction="maximize")
    distributions = {name: _distribution(d) for name, d in space.items()}
    scores = set()
    for trial in trials:
        place = coordinates(space, trial.config(base))
        if trial.state == "finished" and place is not None:
            scores.add(trial.score)
            made = optuna.trial.create_trial(
                value=trial.score, params=dict(place), distributions=distributions
            )
            study.add_trial(made)
    if len(scores) < 4:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def _outcome(trial: Trial) -> tuple[TrialState, float | None]:
    if trial.state == "finished":
        return TrialState.COMPLETE, trial.score
    if trial.state == "stopped":
        return TrialState.PRUNED, trial.score
    return TrialState.COMPLETE, 0.0


def _distribution(dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.values)
    if isinstance(dimension, Real):
        return FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    return IntDistribution(dimension.low, dimension.high)
