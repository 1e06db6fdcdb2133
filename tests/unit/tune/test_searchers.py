"""What is proposed: the points of a grid that grew, and settings that are in force and in range."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from data_shards.errors import ConfigError
from reid_train.recipes import recipe
from tune.config import Sweep
from tune.population import Population
from tune.searchers import GridSearcher, OptunaSearcher, Searcher, as_optuna
from tune.space import AMPLITUDE, LEARNING_RATE, MODE, Space, Value, coordinates
from tune.store import Trial

BASE = recipe("demo").replace(data="d", output="o", name="s")
SPACE: Space = {
    AMPLITUDE: FloatDistribution(1e-4, 1e-2, log=True),
    "batch.images": CategoricalDistribution((2, 4)),
}
FIRST = [Trial(0, {MODE: "adaptive", AMPLITUDE: 0.01, "batch.images": 4}, "paper")]


def proposed(proposer: Searcher, trials: list[Trial]) -> list[Trial]:
    """The trials and all that follow, each ended as it is proposed."""
    trials = list(trials)
    while trial := proposer.propose(trials):
        trials.append(replace(trial, state="finished", evaluations=[{"epoch": 8, "mAP": 0.5}]))
        proposer.learn(trials[-1])
    assert proposer.exhausted(trials)
    return trials


def points(trials: list[Trial]) -> list[tuple]:
    return [tuple(t.values[name] for name in SPACE) for t in trials if not t.label]


def test_a_grid_that_is_extended_misses_no_point_and_runs_none_twice():
    small = proposed(GridSearcher(Sweep(trials=5), SPACE, BASE, 1), FIRST)
    assert len(points(small)) == 4
    repeat = replace(small[-1], number=len(small), repeats=1, seed=1)
    large = proposed(GridSearcher(Sweep(trials=7), SPACE, BASE, 1), [*small, repeat])
    found = points([t for t in large if t.repeats is None])
    assert sorted(found) == [(a, k) for a in (1e-4, 1e-3, 1e-2) for k in (2, 4)]
    assert [t.number for t in large] == list(range(len(large)))


def test_a_grid_is_gone_through_by_a_new_driver_where_the_last_one_was():
    whole = proposed(GridSearcher(Sweep(trials=7), SPACE, BASE, 1), FIRST)
    assert proposed(GridSearcher(Sweep(trials=7), SPACE, BASE, 1), whole[:4]) == whole


SEARCHERS = ["tpe", "gp", "random", "grid"]


def of(name: str, space: Space, base=BASE) -> Searcher:
    if name == "grid":
        return GridSearcher(Sweep(trials=9), space, base, 1)
    return OptunaSearcher(Sweep(trials=9, searcher=name), space, base)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["adaptive", "constant", "none"])
@pytest.mark.parametrize("name", SEARCHERS)
def test_searched_points_are_adaptive_whatever_the_base_is(name, mode):
    base = BASE.replace(regularization__mode=mode)
    trials = proposed(of(name, SPACE, base), FIRST)[1:]
    assert len(trials) >= 6
    assert {trial.config(base).regularization.mode for trial in trials} == {"adaptive"}


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_mode_that_is_searched_is_left_as_it_is_drawn(name):
    trials = proposed(of(name, {MODE: CategoricalDistribution(("constant", "none"))}), FIRST)[1:]
    assert {trial.values[MODE] for trial in trials} == {"constant", "none"}


@pytest.mark.parametrize("name", SEARCHERS)
def test_no_point_leaves_its_range_when_it_is_rounded(name):
    space: Space = {
        LEARNING_RATE: FloatDistribution(1.00006e-3, 1.00044e-3),
        "batch.images": CategoricalDistribution((2, 4)),
    }
    trials = proposed(of(name, space), FIRST)[1:]
    assert all(coordinates(space, trial.config(BASE).flat()) is not None for trial in trials)


def test_tpe_leaves_the_values_of_a_list_as_they_are():
    space: Space = {AMPLITUDE: CategoricalDistribution((0.0012345678, 0.0098765432))}
    trials = proposed(of("tpe", space), FIRST)[1:]
    assert {trial.values[AMPLITUDE] for trial in trials} <= {0.0012345678, 0.0098765432}


@pytest.mark.parametrize(
    ("name", "dimension"),
    [
        ("model.stripes", CategoricalDistribution((0, 2))),
        ("model.backbone", CategoricalDistribution(("resnet18", "resnet34"))),
        ("optimizer.epochs", CategoricalDistribution((4, 8))),
        ("optimizer.frozen_epochs", CategoricalDistribution((0, 2))),
        (MODE, CategoricalDistribution(("adaptive", "none"))),
    ],
)
def test_a_population_searches_nothing_that_a_copied_checkpoint_does_not_fit(name, dimension):
    with pytest.raises(ConfigError, match=f"population cannot search {name}"):
        Population(4, 2, SPACE | {name: dimension}, BASE, 0)


def test_cma_es_searches_numbers_only():
    numbers: Space = {
        AMPLITUDE: FloatDistribution(1e-4, 1e-2, log=True),
        LEARNING_RATE: FloatDistribution(1e-4, 1e-3),
    }
    trials = proposed(of("cmaes", numbers), FIRST)[1:]
    assert len({trial.values[AMPLITUDE] for trial in trials}) == 8
    for space in (SPACE, {AMPLITUDE: FloatDistribution(1e-4, 1e-2)}):
        with pytest.raises(ConfigError, match="two or more ranges of numbers"):
            of("cmaes", space)


@pytest.mark.parametrize(("name", "count"), [("tpe", 50), ("gp", 20), ("cmaes", 50)])
def test_a_searcher_looks_where_it_was_good(name, count):
    space: Space = {
        AMPLITUDE: FloatDistribution(1e-4, 1, log=True),
        LEARNING_RATE: FloatDistribution(1e-5, 1e-1, log=True),
    }
    settings = Sweep(trials=count, searcher=name)
    searcher, trials = OptunaSearcher(settings, space, BASE), []
    while trial := searcher.propose(trials):
        place = [np.log10(float(trial.values[n])) for n in (AMPLITUDE, LEARNING_RATE)]
        score = 0.8 - 0.05 * ((place[0] + 3) ** 2 + (place[1] + 4) ** 2)
        evaluations = [{"epoch": 8, "mAP": score}]
        trials.append(replace(trial, state="finished", evaluations=evaluations))
        searcher.learn(trials[-1])
    scores = [trial.score for trial in trials]
    quarter = count // 4
    assert np.mean(scores[-quarter:]) > np.mean(scores[:quarter]) + 0.03


@pytest.mark.parametrize("name", ["tpe", "gp", "random"])
def test_a_new_driver_learns_from_a_trial_whose_values_are_no_valid_configuration(name):
    minimum = "optimizer.minimum_learning_rate"
    space: Space = {
        minimum: FloatDistribution(1e-6, 2e-4, log=True),
        LEARNING_RATE: FloatDistribution(5e-5, 1e-3, log=True),
    }
    values: dict[str, Value] = {minimum: 1e-4, LEARNING_RATE: 6e-5}
    invalid = Trial(0, values, state="failed", reason="above the learning rate")
    with pytest.raises(ConfigError):
        invalid.config(BASE)
    known = as_optuna(invalid, space, BASE)
    assert known is not None
    assert (known.params, known.value) == (values, 0.0)
    searcher = of(name, space)
    searcher.learn(invalid)
    assert searcher.propose([invalid]) is not None
