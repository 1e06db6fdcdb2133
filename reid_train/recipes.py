"""Named configurations. A recipe is a Python value: read it, copy it, change it."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from pydantic import ValidationError

from data_shards.command_line import did_you_mean, parse, peek
from data_shards.errors import ConfigError
from reid_train.config import TrainConfig, explain

T = TypeVar("T")

PAPER = TrainConfig()  # the method is the same for every dataset
_SMALL = PAPER.replace(  # for a few thousand images at most: from scratch, minutes on two cores
    model__backbone="resnet18",
    model__weights="none",
    augment__pad=4,
    optimizer__schedule="cosine",
    optimizer__frozen_epochs=0,
    checkpoint__every_steps=None,
)

_RECIPES = {
    "msmt17_resnet50": ("the paper's settings, for any large dataset; a GPU", PAPER),
    "msmt17_resnet101": (
        "the same with a larger network",
        PAPER.replace(model__backbone="resnet101"),
    ),
    "msmt17_resnet152": (
        "the same with the paper's largest network",
        PAPER.replace(model__backbone="resnet152"),
    ),
    "market1501_resnet50": ("the paper's settings again, for Market-1501", PAPER),
    "people_small": (
        "a small set of people of your own: at least 4 people to train on; minutes on two cores",
        _SMALL.replace(
            image__height=128,
            image__width=64,
            batch__identities=4,
            batch__steps_per_epoch=20,
            optimizer__learning_rate=5e-4,
            optimizer__minimum_learning_rate=5e-6,
            optimizer__epochs=10,
            evaluation__every=5,
        ),
    ),
    "finetune_small": (
        "a few hundred images of people, from a model that knows many (--init-from): at least 4 "
        "people to train on",
        PAPER.replace(
            batch__identities=4,
            batch__steps_per_epoch=None,
            optimizer__schedule="cosine",
            optimizer__learning_rate=5e-5,
            optimizer__minimum_learning_rate=5e-7,
            optimizer__frozen_epochs=1,
            optimizer__epochs=10,
            evaluation__every=5,
            checkpoint__every_steps=None,
        ),
    ),
    "csv_small": (
        "small square images of anything but people, such as characters: no flips; at least 16 "
        "classes to train on; minutes on two cores",
        _SMALL.replace(
            image__height=64,
            image__width=64,
            # A mirrored character is another one. In few epochs erasing costs more than it gives.
            augment__flip=0.0,
            augment__erase=0.0,
            batch__steps_per_epoch=None,
            optimizer__learning_rate=1.5e-3,
            optimizer__minimum_learning_rate=1.5e-5,
            optimizer__epochs=10,
            evaluation__every=5,
            evaluation__mirror=False,
        ),
    ),
    "demo": (
        "what `make demo` trains: 32 drawn people; minutes on two cores",
        _SMALL.replace(
            image__height=80,
            image__width=40,
            batch__identities=8,
            batch__steps_per_epoch=20,
            optimizer__learning_rate=5e-4,
            optimizer__minimum_learning_rate=5e-6,
            optimizer__epochs=8,
            evaluation__every=4,
        ),
    ),
}
RECIPES = {name: config.replace(recipe=name) for name, (_, config) in _RECIPES.items()}
PURPOSES = {name: purpose for name, (purpose, _) in _RECIPES.items()}


def recipe(name: str) -> TrainConfig:
    """The recipe of that name; if there is none, a `ConfigError` names the nearest."""
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
    """Parse a command line with the defaults of `base`, or else of the recipe that it names.

    `make` turns a configuration into the command's settings; `prog` is the command, for its help.
    """
    default = make(base or recipe(peek(words, "recipe").recipe or PAPER.recipe))
    try:
        return parse(type(default), words, prog, default=default)
    except ValidationError as error:
        raise ConfigError(explain(error)) from error
