"""What is searched: ranges as text, checked against the configuration before anything starts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from data_shards.errors import ConfigError
from reid_train.config import TrainConfig
from reid_train.recipes import RECIPES, recipe
from tune.space import (
    AMPLITUDE,
    LEARNING_RATE,
    MODE,
    Space,
    apply,
    at,
    build,
    coordinates,
    default,
    draw,
    first_points,
    grid,
    inside,
    overrides,
    parse,
    read_file,
)

BASE = recipe("demo").replace(data="d", output="o")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("uniform(0, 0.3)", FloatDistribution(0.0, 0.3)),
        (" loguniform( 5e-5 , 1e-3 ) ", FloatDistribution(5e-5, 1e-3, log=True)),
        ("integer(2,8)", IntDistribution(2, 8)),
        ("choice(adaptive, constant)", CategoricalDistribution(("adaptive", "constant"))),
        ("choice(8, 16)", CategoricalDistribution((8, 16))),
    ],
)
def test_ranges_are_read_from_text(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0.1",
        "uniform(1, 0)",
        "loguniform(0, 1)",
        "integer(1.5, 2)",
        "choice(1)",
        "normal(0, 1)",
    ],
)
def test_what_is_no_range_is_refused(text):
    with pytest.raises(ConfigError, match="cannot read the range"):
        parse(text)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"optimizer.lr": "uniform(0, 1)"}, "not a field"),
        ({"learning_rate": "uniform(0, 1)"}, "did you mean optimizer.learning_rate"),
        ({"seed": "integer(0, 9)"}, "not a field"),
        ({LEARNING_RATE: "loguniform(1e-9, 1e-3)"}, "minimum-learning-rate is above"),
        ({"batch.images": "uniform(2, 8)"}, r"valid integer.* write integer\(LOW, HIGH\)"),
        ({"batch.images": "loguniform(2, 1002)"}, "valid integer"),
        ({"batch.images": "integer(1, 4)"}, "greater than or equal to 2"),
        ({"model.backbone": "choice(resnet18, vgg)"}, "resnet152"),
        ({LEARNING_RATE: "fixed"}, "nothing is searched"),
    ],
)
def test_a_space_that_the_configuration_refuses_is_an_error(ranges, message):
    with pytest.raises(ConfigError, match=message):
        build(ranges, BASE)


def test_choices_are_checked_together():
    two_workers = BASE.replace(workers=2)
    alone = {"batch.identities": "choice(3, 4)"}
    build(alone | {"batch.images": "choice(2, 4)"}, two_workers)
    with pytest.raises(ConfigError, match="cannot be shared equally"):
        build(alone | {"batch.images": "choice(3, 4)"}, two_workers)


@pytest.mark.parametrize("name", RECIPES)
def test_the_default_space_holds_for_every_recipe_and_contains_its_learning_rate(name):
    base = recipe(name)
    space = build(default(base), base)
    rate = space[LEARNING_RATE]
    assert isinstance(rate, FloatDistribution)
    assert rate.low < base.optimizer.learning_rate < rate.high
    assert rate.low <= 5e-5
    assert rate.high >= 1e-3
    assert space[AMPLITUDE] == FloatDistribution(1e-4, 5e-2, log=True)


def test_command_line_items_add_to_a_file(tmp_path):
    path = tmp_path / "space.json"
    path.write_text(json.dumps({AMPLITUDE: "uniform(0, 1)"}))
    texts = read_file(path)
    texts |= overrides(["loss.label-smoothing=uniform(0, 0.3)", f"{AMPLITUDE}=fixed"])
    assert list(build(texts, BASE)) == ["loss.label_smoothing"]


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', None])
def test_a_damaged_or_missing_space_file_is_named(tmp_path, text):
    path = tmp_path / "space.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"space\.json"):
        read_file(path)


def test_the_first_points_are_the_papers_constants_and_none():
    base = BASE.replace(regularization__amplitude=0.02, regularization__theta_lr_multiplier=5)
    configs = [apply(values, base) for values in first_points(base, (1e-4, 1e-3)).values()]
    assert [c.regularization.mode for c in configs] == ["adaptive", "constant", "constant", "none"]
    assert configs[0].regularization == TrainConfig().regularization
    assert [c.regularization.factor for c in configs[1:3]] == [1e-4, 1e-3]
    assert all(c.optimizer == base.optimizer for c in configs)


quantiles = st.floats(0, 1)
dimensions = st.one_of(
    st.tuples(st.floats(1e-6, 1e3), st.floats(1.01, 1e4), st.booleans()).map(
        lambda t: FloatDistribution(t[0], t[0] * t[1], log=t[2])
    ),
    st.tuples(st.integers(-5, 5), st.integers(1, 9)).map(
        lambda t: IntDistribution(t[0], t[0] + t[1])
    ),
    st.lists(st.integers(), min_size=2, max_size=5, unique=True).map(
        lambda v: CategoricalDistribution(tuple(v))
    ),
)


@example(FloatDistribution(1.00006e-3, 1.00044e-3), 0.0)
@given(dimensions, quantiles)
def test_every_quantile_lies_in_the_range(dimension, quantile):
    assert inside(at(dimension, quantile), dimension)


@given(st.integers(4, 200))
def test_grid_is_regular_and_no_larger_than_requested(points):
    space: Space = {
        "a": FloatDistribution(1, 100, log=True),
        "b": CategoricalDistribution((1, 2)),
        "c": FloatDistribution(0, 1),
    }
    if points < 8:
        with pytest.raises(ConfigError, match="8 points or more"):
            grid(space, points)
        return
    made = grid(space, points)
    values = {name: {point[name] for point in made} for name in space}
    assert len(made) <= points
    assert len(made) == len(values["a"]) * 2 * len(values["c"])
    assert len(values["a"]) == len(values["c"])
    assert {1.0, 100.0} <= values["a"]


def test_the_same_draw_gives_the_same_point():
    space = build(default(BASE), BASE)
    first, again = (draw(space, np.random.default_rng(3)) for _ in range(2))
    assert first == again
    assert coordinates(space, apply(first, BASE).flat()) == first


def test_what_lies_outside_has_no_coordinates():
    space = build({AMPLITUDE: "loguniform(1e-4, 1e-2)"}, BASE)
    assert coordinates(space, BASE.flat()) == {AMPLITUDE: 0.005}
    assert coordinates(space, BASE.replace(regularization__amplitude=0.5).flat()) is None
    assert coordinates(space, apply({MODE: "none"}, BASE).flat()) is None
