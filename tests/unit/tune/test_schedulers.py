"""When mAP first says something of what is searched: before that nothing is stopped or copied."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from optuna.distributions import FloatDistribution
from ray.tune.experiment import Trial as RayTrial

from reid_train.recipes import recipe
from tune.config import Sweep
from tune.plan import make_plan
from tune.population import Population
from tune.schedulers import EarlyStopping, first_decision
from tune.space import AMPLITUDE

PAPER = recipe("msmt17_resnet50").replace(data="d", output="o")
SHORT = {"optimizer__schedule": "cosine", "optimizer__frozen_epochs": 0, "optimizer__epochs": 8}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 40),  # 20 frozen, 10 of the second phase's warm-up
        ({"evaluation__every": 7}, 35),
        ({"optimizer__schedule": "cosine"}, 30),  # has no warm-up
        ({"optimizer__epochs": 70}, 30),  # rungs at 30 and, before the last of 90, 90: too late
        ({"optimizer__epochs": 80}, 30),  # rungs at 30 and 90 of 100
        ({"optimizer__epochs": 12}, 30),  # nothing after the frozen phase but the end
        (SHORT | {"evaluation__every": 1}, 1),
        (SHORT | {"evaluation__every": 4}, 4),
    ],
)
def test_the_first_decision_lies_after_the_frozen_backbone_and_the_warm_up(changes, expected):
    assert first_decision(PAPER.replace(**changes), 3) == expected


def stopped_at(**changes) -> list[int]:
    """Epochs at which a trial is stopped that is far behind from the start."""
    config = PAPER.replace(**changes)
    found = []
    for epoch in range(10, config.total_epochs, 10):
        stopping = EarlyStopping(Sweep(), config, [])
        controller: Any = object()
        results = []
        for number in range(4):
            stopping.add(controller, number, RayTrial("trained", stub=True))
            evaluation = {"epoch": epoch, "mAP": 0.9 - number / 10}
            results.append(stopping.lags(controller, number, evaluation))
        if any(results):
            found.append(epoch)
    return found


def test_asha_stops_nothing_while_the_backbone_is_frozen_or_warms_up():
    assert stopped_at()[0] == 40


def test_asha_in_a_run_that_ends_with_the_frozen_phase_stops_nothing():
    assert stopped_at(optimizer__epochs=5) == []


@pytest.mark.parametrize(("interval", "rounds"), [(10, [40, 50]), (60, [60, 120])])
def test_a_population_exchanges_nothing_before_the_first_decision(interval, rounds):
    population = Population(4, interval, {AMPLITUDE: FloatDistribution(0.001, 0.01)}, PAPER, 0)
    member = population.propose([])
    assert member is not None
    assert member.until == rounds[0]
    assert population._until(rounds[0]) == rounds[1]


@pytest.mark.parametrize(("grace", "warns"), [(10, True), (15, True), (20, True), (21, False)])
def test_a_grace_within_the_frozen_phase_is_warned_of(grace, warns, caplog):
    with caplog.at_level(logging.WARNING):
        make_plan(Sweep(grace=grace), PAPER)
    assert ("--grace" in caplog.text) == warns
    assert not warns or "the backbone is frozen" in caplog.text
