"""`python -m tune`: search the amplitude and the learning rates."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data_shards.command_line import program, run_command
from data_shards.progress import display, make_console, phase
from data_shards.ray_utils import prepare_ray
from reid_train.config import TrainConfig
from reid_train.recipes import parse_with_recipe
from tune.config import Sweep


@dataclass(frozen=True)
class Tune:
    """Search amplitude and learning rates with many trainings. The same command continues a search.

    python -m tune --recipe msmt17_resnet50 --data s3://bucket/msmt17 --output s3://bucket/runs
    --trials 40 --workers-per-trial 4 --search loss.label_smoothing="uniform(0, 0.3)"

    The options of `python -m reid_train train` are the settings that every trial starts from.
    """

    sweep: Annotated[Sweep, tyro.conf.arg(name="")]
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    workers_per_trial: int | None = None
    """Training workers of each trial, with a GPU each if there are GPUs."""
    space: Path | None = None
    """JSON file with the ranges to search instead of the default ones: field name to range."""
    search: tuple[str, ...] = ()
    """More ranges, FIELD=RANGE: [log]uniform(L, H), integer(L, H), choice(A, B) or fixed."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return run_command(lambda: _main(arguments))


def _main(arguments: list[str] | None) -> None:
    words = sys.argv[1:] if arguments is None else arguments
    parsed = parse_with_recipe(
        lambda base: Tune(Sweep(), base), words, program("tune", "reid-tune")
    )
    prepare_ray()  # before anything imports Ray
    from tune import space
    from tune.plan import make_plan

    config = parsed.config
    if parsed.workers_per_trial is not None:
        config = config.replace(workers=parsed.workers_per_trial)
    ranges = space.default(config) if parsed.space is None else space.read_file(parsed.space)
    ranges |= space.overrides(parsed.search)
    plan = make_plan(parsed.sweep.model_copy(update={"ranges": ranges}), config)
    console = make_console()
    # After the checks: a mistake is found before Ray is imported.
    with display(console) as progress, phase(progress, "loading PyTorch, Ray and Optuna"):
        from tune.sweep import sweep

    sweep(plan, console=console)
