"""What is searched: ranges of configuration fields, and the first points of a sweep.

Pure functions on values. A space maps dotted names of `TrainConfig` fields to dimensions:

    {"regularization.amplitude": Real(1e-4, 5e-2, log=True), "batch.images": Choice((2, 4))}
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from data_shards.errors import ConfigError
from reid_train.config import TrainConfig
from reid_train.recipes import PAPER

Value = float | int | str | bool | None

AMPLITUDE = "regularization.amplitude"
LEARNING_RATE = "optimizer.learning_rate"
THETA_MULTIPLIER = "regularization.theta_lr_multiplier"
MODE = "regularization.mode"
SECTIONS = ("batch", "image", "augment", "model", "regularization", "loss", "optimizer")
"""Sections with fields that can be searched; the others do not change what is learnt."""
FIXED = "fixed"
"""In place of a dimension: the field keeps its configured value."""
GOLDEN = (math.sqrt(5) - 1) / 2
"""A share of a range that is no whole number: a field that takes only integers refuses it."""
_CALL = re.compile(r"\s*(\w+)\s*\((.*)\)\s*")


@dataclass(frozen=True)
class Real:
    """Numbers from `low` to `high`, uniform, or uniform in the logarithm."""

    low: float
    high: float
    log: bool = False

    def near(self, value: float) -> float:
        """The value with four digits, clipped to the range."""
        return min(max(significant(value), self.low), self.high)

    def at(self, quantile: float) -> float:
        """The value below which a share `quantile` of the range lies."""
        if self.log:
            ends = math.log(self.low), math.log(self.high)
            return self.near(math.exp(ends[0] + quantile * (ends[1] - ends[0])))
        return self.near(self.low + quantile * (self.high - self.low))

    def edges(self) -> tuple[Value, ...]:
        """Values at which a configuration is checked: the ends, and one that is not an integer."""
        return self.low, self.low + GOLDEN * (self.high - self.low), self.high


@dataclass(frozen=True)
class Whole:
    """Whole numbers from `low` to `high`, both included."""

    low: int
    high: int

    def at(self, quantile: float) -> int:
        """The value below which a share `quantile` of the range lies."""
        return min(self.low + int(quantile * (self.high - self.low + 1)), self.high)

    def edges(self) -> tuple[Value, ...]:
        """Values at which a configuration is checked."""
        return self.low, self.high


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Value, ...]

    def at(self, quantile: float) -> Value:
        """The value below which a share `quantile` of the list lies."""
        return self.values[min(int(quantile * len(self.values)), len(self.values) - 1)]

    def edges(self) -> tuple[Value, ...]:
        """Values at which a configuration is checked."""
        return self.values


Dimension = Real | Whole | Choice
Space = dict[str, Dimension]


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
    """A configuration with these values of its fields.

    Raises:
        ConfigError: it does not accept them.
    """
    return config.replace(**{name.replace(".", "__"): value for name, value in values.items()})


def parse(text: str) -> Dimension:
    """Read `uniform(0, 0.3)`, `loguniform(5e-5, 1e-3)`, `integer(2, 8)` or `choice(a, b)`.

    Raises:
        ConfigError: it is none of these.
    """
    match = _CALL.fullmatch(text)
    kind = match[1] if match else ""
    values = [_value(part) for part in match[2].split(",")] if match else []
    numbers = len(values) == 2 and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) for v in values
    )
    if kind == "choice" and len(set(values)) == len(values) > 1:
        return Choice(tuple(values))
    if numbers and values[0] < values[1]:  # type: ignore[operator]
        low, high = values
        if kind == "uniform":
            return Real(float(low), float(high))  # type: ignore[arg-type]
        if kind == "loguniform" and low > 0:  # type: ignore[operator]
            return Real(float(low), float(high), log=True)  # type: ignore[arg-type]
        if kind == "integer" and isinstance(low, int) and isinstance(high, int):
            return Whole(low, high)
    raise ConfigError(
        f"cannot read the range {text!r}: write uniform(LOW, HIGH), loguniform(LOW, HIGH), "
        "integer(LOW, HIGH) or choice(A, B, ...), with LOW below HIGH"
    )


def build(texts: Mapping[str, str], config: TrainConfig) -> Space:
    """Read a space and check it against the configuration that it varies.

    Args:
        texts: field name to range, as `parse` reads it, or `fixed`.
        config: gives all fields that are not searched.

    Raises:
        ConfigError: an unknown field, a range that cannot be read, or values that the
            configuration refuses.
    """
    fields = {name for name in config.flat() if name.split(".")[0] in SECTIONS}
    space: Space = {}
    for name, text in texts.items():
        if name not in fields:
            near = [known for known in sorted(fields) if known.endswith(name.split(".")[-1])]
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{name!r} is not a field that can be searched{hint}")
        if text.strip() != FIXED:
            space[name] = parse(text)
    if not space:
        raise ConfigError("nothing is searched: give at least one range with --search or --space")
    choices = {name: d.values for name, d in space.items() if isinstance(d, Choice)}
    points = [dict(zip(choices, c, strict=True)) for c in itertools.product(*choices.values())]
    points += [{name: edge} for name, d in space.items() for edge in d.edges()]
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
    """Read `name=range` items of a command line.

    Raises:
        ConfigError: an item without `=`.
    """
    found = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"--search {item!r}: write name=range")
        found[name.strip().replace("-", "_")] = text
    return found


def read_file(text: str | bytes, where: str) -> dict[str, str]:
    """Read a space file: JSON, field name to range.

    Raises:
        ConfigError: it is something else.
    """
    try:
        texts = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from error
    if not isinstance(texts, dict) or not all(isinstance(v, str) for v in texts.values()):
        raise ConfigError(f'{where} must look like {{"optimizer.learning_rate": "uniform(…)"}}')
    return texts


def first_points(config: TrainConfig, factors: Iterable[float]) -> dict[str, dict[str, Value]]:
    """The published regularizer, constant L2 with some factors, and none, by label.

    They differ from the base in the regularization only, so the base's learning rate holds.
    """
    base = config.flat()
    published = {f"regularization.{name}": v for name, v in _flat(PAPER.regularization).items()}
    points = {"paper": {k: v for k, v in published.items() if base[k] != v or k == MODE}}
    for factor in factors:
        points[f"constant {factor:g}"] = {MODE: "constant", "regularization.factor": factor}
    points["no L2"] = {MODE: "none"}
    return points


def draw(space: Space, rng: np.random.Generator) -> dict[str, Value]:
    """A random point of the space, each field drawn independently."""
    return {name: dimension.at(float(rng.random())) for name, dimension in space.items()}


def grid(space: Space, points: int) -> list[dict[str, Value]]:
    """The finest grid of at most `points` points, with as many values on each numeric axis.

    Raises:
        ConfigError: even two values an axis are too many.
    """
    fixed = math.prod(len(d.values) for d in space.values() if isinstance(d, Choice))
    ranges = [d for d in space.values() if not isinstance(d, Choice)]
    steps = 1
    while ranges and fixed * (steps + 1) ** len(ranges) <= points:
        steps += 1
    if fixed > points or (ranges and steps < 2):
        least = fixed * 2 ** len(ranges)
        raise ConfigError(
            f"a grid over this space has {least} points or more, and --trials leaves {points} for "
            f"it: give {least - points} more, or search fewer fields"
        )
    axes = [
        d.values
        if isinstance(d, Choice)
        else tuple(dict.fromkeys(d.at(i / (steps - 1)) for i in range(steps)))
        for d in space.values()
    ]
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*axes)]


def coordinates(space: Space, config: TrainConfig) -> dict[str, Value] | None:
    """A configuration's values of what is searched; None if one is outside its range."""
    flat = config.flat()
    if MODE not in space and config.regularization.mode != "adaptive":
        return None
    found: dict[str, Value] = {}
    for name, dimension in space.items():
        value = flat[name]
        if isinstance(dimension, Choice):
            inside = value in dimension.values
        else:
            inside = isinstance(value, (int, float)) and dimension.low <= value <= dimension.high
        if not inside:
            return None
        found[name] = value  # type: ignore[assignment]
    return found


def significant(value: float) -> float:
    """Four digits: enough for any setting, and short on a command line."""
    return float(f"{value:.4g}")


def _value(text: str) -> Value:
    try:
        return json.loads(text)
    except ValueError:
        return text.strip()


def _flat(section) -> dict[str, Value]:
    values = section.model_dump(mode="json")
    inner = values.pop("amplitudes")
    return values | {f"amplitudes.{kind}": value for kind, value in inner.items()}
