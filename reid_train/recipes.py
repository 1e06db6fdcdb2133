"""Named configurations. A recipe is a Python value: read it, copy it, change it."""

from __future__ import annotations

import difflib

from data_shards.errors import ConfigError
from reid_train.config import TrainConfig

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
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"unknown recipe {name!r}.{hint} There are: {', '.join(RECIPES)}.")
    return RECIPES[name]
