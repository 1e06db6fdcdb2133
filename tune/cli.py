"""`python -m tune`: search the amplitude and the learning rates."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from data_shards.errors import ConfigError, run_command
from reid_train.config import TrainConfig
from reid_train.recipes import recipe
from tune.config import Sweep
from tune.space import default, overrides, read_file


@dataclass(frozen=True)
class Tune:
    """Search amplitude and learning rates with many trainings; the same command continues.

    python -m tune --recipe msmt17_resnet50 --data s3://bucket/msmt17 --output s3://bucket/runs
    --trials 40 --workers-per-trial 4 --search loss.label_smoothing="uniform(0, 0.3)"

    All options of `python -m reid_train train` set what every trial starts from.
    """

    sweep: Annotated[Sweep, tyro.conf.arg(name="")]
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    workers_per_trial: int | None = None
    """Training workers of each trial (one GPU each where there are GPUs)."""
    space: Path | None = None
    """JSON file with what is searched instead of the default: field name to range."""
    search: tuple[str, ...] = ()
    """More of it, name=range: uniform(LOW, HIGH), loguniform(LOW, HIGH), integer(LOW, HIGH),
    choice(A, B, ...), or fixed to leave a field out."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return run_command(lambda: _main(arguments))


def _main(arguments: list[str] | None) -> None:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="msmt17_resnet50")
    known, _ = first.parse_known_args(arguments)
    parsed = tyro.cli(
        Tune,
        default=Tune(Sweep(), recipe(known.recipe)),
        args=arguments,
        prog="python -m tune",
        config=(tyro.conf.AvoidSubcommands,),
    )
    config = parsed.config
    if parsed.workers_per_trial is not None:
        config = config.replace(workers=parsed.workers_per_trial)
    ranges = default(config)
    if parsed.space is not None:
        try:
            ranges = read_file(parsed.space.read_bytes(), str(parsed.space))
        except OSError as error:
            raise ConfigError(f"--space: cannot read {parsed.space}: {error}") from error
    ranges |= overrides(parsed.search)
    settings = Sweep.model_validate(parsed.sweep.model_dump() | {"ranges": ranges})
    from tune.sweep import sweep

    sweep(settings, config, console=Console())
