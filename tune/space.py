"""What is searched: ranges of configuration fields, and the first points of a sweep.

A space maps names of `TrainConfig` fields to distributions of Optuna:

    {"regularization.amplitude": FloatDistribution(1e-4, 5e-2, log=True)}
"""

import contextlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import TypeAdapter, ValidationError

from data_shards.errors import ConfigError
from reid_train.config import TrainConfig, explain
from reid_train.recipes import PAPER

Value = float | int | str | bool | None
Dimension = FloatDistribution | IntDistribution | CategoricalDistribution
Space = dict[str, Dimension]

AMPLITUDE = "regularization.amplitude"
LEARNING_RATE = "optimizer.learning_rate"
THETA_MULTIPLIER = "regularization.theta_lr_multiplier"
MODE = "regularization.mode"
# Sections with fields that can be searched; the others do not change what is learnt.
SECTIONS = ("batch", "image", "augment", "model", "regularization", "loss", "optimizer")
FIXED = "fixed"  # in place of a dimension: the field keeps its configured value
GOLDEN = (math.sqrt(5) - 1) / 2  # an irrational share of a range: a field of integers refuses it
_CALL = re.compile(r"\s*(\w+)\s*\((.*)\)\s*")


def at(dimension: Dimension, quantile: float) -> Value:
    """The value below which a share `quantile` of the range, or of the choices, lies."""
    if isinstance(dimension, CategoricalDistribution):
        count = len(dimension.choices)
        return dimension.choices[min(int(quantile * count), count - 1)]
    low, high = dimension.low, dimension.high
    if isinstance(dimension, IntDistribution):
        return min(low + int(quantile * (high - low + 1)), high)
    if dimension.log:
        return near(low * (high / low) ** quantile, dimension)
    return near(low + quantile * (high - low), dimension)


def near(value: float, dimension: FloatDistribution) -> float:
    """The value with four digits, clipped to the range."""
    return min(max(float(f"{value:.4g}"), dimension.low), dimension.high)


def inside(value: object, dimension: Dimension) -> bool:
    """Whether the range, or the choices, include a value."""
    if isinstance(dimension, CategoricalDistribution):
        return value in dimension.choices
    return isinstance(value, int | float) and dimension.low <= value <= dimension.high


def default(config: TrainConfig) -> dict[str, str]:
    """The ranges searched by default: amplitude, learning rate and θ's learning-rate multiplier.

    λ falls from A/2 at a pace set by both rates. The range of the learning rate is widened if the
    configuration's own is near its ends, or outside.
    """
    own = config.optimizer.learning_rate
    low = max(min(5e-5, own / 2), config.optimizer.minimum_learning_rate)
    return {
        AMPLITUDE: "loguniform(1e-4, 5e-2)",
        LEARNING_RATE: f"loguniform({low:g}, {max(1e-3, 2 * own):g})",
        THETA_MULTIPLIER: "loguniform(0.1, 30)",
    }


def apply(values: Mapping[str, Value], config: TrainConfig) -> TrainConfig:
    """A configuration with these values; a `ConfigError` if it does not accept them."""
    return config.replace(**{name.replace(".", "__"): value for name, value in values.items()})


def parse(text: str) -> Dimension:
    """Read `uniform(0, 0.3)`, `loguniform(5e-5, 1e-3)`, `integer(2, 8)` or `choice(a, b)`."""
    match = _CALL.fullmatch(text)
    kind, parts = (match[1], match[2].split(",")) if match else ("", [])
    with contextlib.suppress(ValueError):  # not two, or not numbers
        if kind == "choice":
            values = tuple(map(_value, parts))
            if len(set(values)) == len(values) > 1:
                return CategoricalDistribution(values)
        elif kind == "integer":
            first, last = map(int, parts)
            if first < last:
                return IntDistribution(first, last)
        elif kind in ("uniform", "loguniform"):
            low, high = map(float, parts)
            if low < high and (low > 0 or kind == "uniform"):
                return FloatDistribution(low, high, log=kind == "loguniform")
    raise ConfigError(
        f"cannot read the range {text!r}: write uniform(LOW, HIGH), loguniform(LOW, HIGH), "
        "integer(LOW, HIGH) or choice(A, B, ...), with LOW below HIGH"
    )


def _value(text: str) -> Value:
    try:
        return json.loads(text)
    except ValueError:
        return text.strip()


def build(texts: Mapping[str, str], config: TrainConfig) -> Space:
    """Read ranges by field name, or `fixed`, and check them against a configuration.

    Raises:
        ConfigError: an unknown field, a range that cannot be read, or values that the
            configuration refuses.
    """
    fields = [name for name in config.flat() if name.split(".")[0] in SECTIONS]
    for name in texts:
        if name not in fields:
            alike = [known for known in sorted(fields) if known.endswith(name.split(".")[-1])]
            hint = f"; did you mean {alike[0]}?" if alike else ""
            raise ConfigError(f"{name!r} is not a field that can be searched{hint}")
    space = {name: parse(text) for name, text in texts.items() if text.strip() != FIXED}
    if not space:
        raise ConfigError("nothing is searched: give at least one range with --search or --space")
    choices = {n: d.choices for n, d in space.items() if isinstance(d, CategoricalDistribution)}
    points = [dict(zip(choices, c, strict=True)) for c in itertools.product(*choices.values())]
    for name, dimension in space.items():
        if not isinstance(dimension, CategoricalDistribution):
            points += [{name: dimension.low}, {name: dimension.high}]
        if isinstance(dimension, FloatDistribution):
            points.append({name: dimension.low + GOLDEN * (dimension.high - dimension.low)})
    for point in points:
        try:
            apply(point, config)
        except ConfigError as error:
            tried = ", ".join(f"{name} = {value}" for name, value in point.items())
            hint = "; write integer(LOW, HIGH)" if "valid integer" in str(error) else ""
            raise ConfigError(
                f"the space has a value that cannot run, {tried}: {error}{hint}"
            ) from error
    return space


def overrides(items: Iterable[str]) -> dict[str, str]:
    """Read `name=range` items of a command line."""
    found = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"--search {item!r}: write name=range")
        found[name.strip().replace("-", "_")] = text
    return found


def read_file(path: Path) -> dict[str, str]:
    """Read a space file: JSON, field name to range."""
    try:
        return TypeAdapter(dict[str, str]).validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"--space: cannot read {path}: {error}") from error
    except ValidationError as error:
        look = '{"optimizer.learning_rate": "uniform(…)"}'
        raise ConfigError(f"{path} must be JSON like {look}: {explain(error)}") from error


def first_points(config: TrainConfig, factors: Iterable[float]) -> dict[str, dict[str, Value]]:
    """The published regularizer, constant L2 with some factors, and none, by label.

    They differ from the base in the regularization only, so the base's learning rate holds.
    """
    base: dict[str, Any] = config.flat()
    paper: dict[str, Any] = PAPER.flat()
    ours = [name for name in paper if name.startswith("regularization.")]
    points = {"paper": {k: paper[k] for k in ours if base[k] != paper[k] or k == MODE}}
    for factor in factors:
        points[f"constant {factor:g}"] = {MODE: "constant", "regularization.factor": factor}
    points["no L2"] = {MODE: "none"}
    return points


def draw(space: Space, rng: np.random.Generator) -> dict[str, Value]:
    """A random point of the space, each field drawn independently."""
    return {name: at(dimension, float(rng.random())) for name, dimension in space.items()}


def grid(space: Space, points: int) -> list[dict[str, Value]]:
    """The finest grid of at most `points` points, with as many values on each numeric axis."""
    choices = [d.choices for d in space.values() if isinstance(d, CategoricalDistribution)]
    fixed, ranges, steps = math.prod(map(len, choices)), len(space) - len(choices), 2
    if (least := fixed * steps**ranges) > points:
        raise ConfigError(
            f"a grid over this space has {least} points or more, and --trials leaves {points} for "
            f"it: give {least - points} more, or search fewer fields"
        )
    while ranges and fixed * (steps + 1) ** ranges <= points:
        steps += 1
    axes = [
        d.choices
        if isinstance(d, CategoricalDistribution)
        else dict.fromkeys(at(d, i / (steps - 1)) for i in range(steps))
        for d in space.values()
    ]
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*axes)]


def coordinates(space: Space, values: Mapping[str, Any]) -> dict[str, Value] | None:
    """Of the values of all fields those that are searched; None if one is outside its range."""
    if MODE not in space and values[MODE] != "adaptive":
        return None
    found = {name: values[name] for name in space}
    return found if all(inside(found[name], d) for name, d in space.items()) else None
