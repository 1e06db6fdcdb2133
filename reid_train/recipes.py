"""Named configurations. A recipe is a Python value: read it, copy it, change it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from pydantic import ValidationError

from data_shards.command_line import did_you_mean, parse, peek
from data_shards.errors import ConfigError
from reid_train.config import TrainConfig, explain

T = TypeVar("T")

PAPER = TrainConfig()
"""The paper's setting; the method is the same for every dataset."""

_CONFIGS = {
    "msmt17_resnet50": PAPER,
    "msmt17_resnet101": PAPER.replace(model__backbone="resnet101"),
    "msmt17_resnet152": PAPER.replace(model__backbone="resnet152"),
    "market1501_resnet50": PAPER,
    # Small crops and a few thousand images, such as Omniglot: from scratch, minutes on two cores.
    "csv_small": PAPER.replace(
        model__backbone="resnet18",
        model__weights="none",
        image__height=64,
        image__width=64,
        # A mirrored character is another one; in so few epochs erasing costs more than it gives.
        augment__pad=4,
        augment__flip=0.0,
        augment__erase=0.0,
        batch__steps_per_epoch=None,
        optimizer__learning_rate=1.5e-3,
        optimizer__minimum_learning_rate=1.5e-5,
        optimizer__schedule="cosine",
        optimizer__frozen_epochs=0,
        optimizer__epochs=10,
        evaluation__every=5,
        evaluation__mirror=False,
        loader__workers=1,
        checkpoint__every_steps=None,
    ),
    # Procedural people on two cores in a few minutes: what `make demo` runs.
    "demo": PAPER.replace(
        model__backbone="resnet18",
        model__weights="none",
        image__height=96,
        image__width=48,
        augment__pad=4,
        batch__identities=8,
        batch__steps_per_epoch=20,
        optimizer__learning_rate=5e-4,
        optimizer__minimum_learning_rate=5e-6,
        optimizer__schedule="cosine",
        optimizer__frozen_epochs=0,
        optimizer__epochs=8,
        evaluation__every=4,
        loader__workers=0,
        checkpoint__every_steps=None,
    ),
}
RECIPES = {name: config.replace(recipe=name) for name, config in _CONFIGS.items()}


def recipe(name: str) -> TrainConfig:
    """The recipe of that name.

    Raises:
        ConfigError: there is none; the message names the nearest.
    """
    if name not in RECIPES:
        hint, there = did_you_mean(name, RECIPES), ", ".join(RECIPES)
        raise ConfigError(f"unknown recipe {name!r}.{hint} There are: {there}.")
    return RECIPES[name]


def parse_with_recipe(
    make: Callable[[TrainConfig], T],
    words: Sequence[str],
    prog: str,
    base: TrainConfig | None = None,
) -> T:
    """Parse a command line whose defaults come from the recipe that it names.

    Args:
        make: makes the settings with their defaults from a configuration.
        words: of the command line.
        prog: the command, for its help.
        base: the defaults instead of a recipe.

    Raises:
        ConfigError: an unknown recipe or option, or a value out of range.
    """
    default = make(base or recipe(peek(words, "recipe").recipe or PAPER.recipe))
    try:
        return parse(type(default), words, prog, default=default)
    except ValidationError as error:
        raise ConfigError(explain(error)) from error
