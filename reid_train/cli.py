"""`python -m reid_train`: train, evaluate, embed, and look models up."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import tyro
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from data_shards.errors import ConfigError, run_one_of
from reid_train.config import TrainConfig, explain
from reid_train.recipes import RECIPES, recipe

HELP = """usage: python -m reid_train COMMAND [options]

  train      train on a sharded dataset, measure it, register it
  evaluate   measure a model or a file of embeddings: CMC, mAP, mINP, re-ranking
  embed      write the embeddings of a dataset
  models     list what is registered
  recipes    list the named configurations

Each command says what it takes with --help."""


@dataclass(frozen=True)
class Train:
    """Train with a recipe's values and any of them overridden; measure, track and register.

    python -m reid_train train --recipe msmt17_resnet50 --data s3://bucket/msmt17 --output s3://runs
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    resume: bool = False
    """Continue the run --name under --output from its last checkpoint, with its own settings."""
    resume_or_start: bool = False
    """Continue that run if there is one, else start it: for whatever tries a command again."""


def train(arguments: list[str]) -> None:
    """Parse and run `train`. The recipe, or the run that is resumed, gives the defaults."""
    from reid_train.runs.job import run
    from reid_train.runs.run_dir import Run

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="msmt17_resnet50")
    first.add_argument("--resume", action="store_true")
    first.add_argument("--resume-or-start", action="store_true")
    first.add_argument("--name")
    first.add_argument("--output")
    known, _ = first.parse_known_args(arguments)
    if (known.resume or known.resume_or_start) and not (known.name and known.output):
        raise ConfigError("--resume needs the run's --name and --output")
    resume = known.resume or (known.resume_or_start and Run.exists(known.output, known.name))
    base = Run.read(known.output, known.name).config if resume else recipe(known.recipe)
    try:
        parsed = tyro.cli(
            Train,
            default=Train(base),
            args=arguments,
            prog="python -m reid_train train",
            config=(tyro.conf.AvoidSubcommands,),
        )
    except ValidationError as error:
        raise ConfigError(explain(error)) from error
    run(parsed.config, resume=resume, console=Console())


def recipes(arguments: list[str]) -> None:
    """List the recipes and what sets them apart."""
    tyro.cli(lambda: None, args=arguments, prog="python -m reid_train recipes", description="")
    table = Table("recipe", "backbone", "input", "batch", "epochs", "weights")
    for name, config in RECIPES.items():
        batch, optimizer = config.batch, config.optimizer
        table.add_row(
            name,
            config.model.backbone,
            f"{config.image.height} × {config.image.width}",
            f"{batch.identities} × {batch.images}",
            f"{optimizer.frozen_epochs} + {optimizer.epochs}",
            config.model.weights,
        )
    Console().print(table)


@dataclass(frozen=True)
class Models:
    """List the registered models, their aliases and what they measured."""

    tracking_uri: str | None = None
    """MLflow tracking URI; by default MLFLOW_TRACKING_URI."""


def models(arguments: list[str]) -> None:
    """List what is registered."""
    from reid_train.registry.registry import list_models

    parsed = tyro.cli(Models, args=arguments, prog="python -m reid_train models")
    table = Table("model", "version", "aliases", "mAP", "rank-1", "dataset", "created", "run")
    for model in list_models(parsed.tracking_uri):
        table.add_row(*model.row())
    Console().print(table)


def evaluate(arguments: list[str]) -> None:
    """Measure a model or embeddings."""
    from reid_train.commands import evaluate as commands

    prog = "python -m reid_train evaluate"
    commands.evaluate(tyro.cli(commands.Evaluate, args=arguments, prog=prog), Console())


def embed(arguments: list[str]) -> None:
    """Embed a dataset."""
    from reid_train.commands import evaluate as commands

    prog = "python -m reid_train embed"
    commands.embed(tyro.cli(commands.Embed, args=arguments, prog=prog), Console())


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "evaluate": evaluate,
    "embed": embed,
    "models": models,
    "recipes": recipes,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the command line names; return its exit code."""
    return run_one_of(COMMANDS, HELP, arguments)
