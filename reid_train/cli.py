"""The command line: `python -m reid_train COMMAND`; `COMMANDS` has them all."""

import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated

import tyro

from data_shards.command_line import Command, command, parse, peek, program, run_one_of
from data_shards.errors import ConfigError
from data_shards.progress import display, make_console, phase, print_table, say
from reid_train.config import TrainConfig
from reid_train.recipes import PURPOSES, RECIPES, parse_with_recipe

PROGRAM = program("reid_train", "reid-train")


@dataclass(frozen=True)
class Train:
    """Train with the settings of a recipe; options override them. Then track and register.

    python -m reid_train train --recipe msmt17_resnet50 --data s3://bucket/msmt17
        --output s3://bucket/runs
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    resume: bool = False
    """Continue the run --name in --output from its newest checkpoint, with its own settings."""
    resume_or_start: bool = False
    """Continue the run if it exists, else start it: for jobs that are tried again."""


def train(arguments: list[str]) -> None:
    """Train on a sharded dataset; measure, track and register the model."""
    known = peek(arguments, "name", "output", "workers", flags=("resume", "resume-or-start"))
    if (known.resume or known.resume_or_start) and not (known.name and known.output):
        raise ConfigError("--resume needs the run's --name and --output")
    resume, base = known.resume, None
    if resume or known.resume_or_start:
        from reid_train.runs.run_dir import Run

        resume = resume or Run.exists(known.output, known.name)
        base = Run.read(known.output, known.name).config if resume else None
        if base and known.workers not in (None, str(base.workers)):
            # Other workers share the cores anew.
            base = base.replace(cpus_per_worker=None, loader__workers=None)
    parsed = parse_with_recipe(Train, arguments, f"{PROGRAM} train", base)
    from reid_train.runs.job import run

    run(parsed.config, resume=resume, console=make_console())


def recipes() -> None:
    """List the recipes: what each is for, and what it sets."""
    width = shutil.get_terminal_size().columns
    for name, config in RECIPES.items():
        batch, optimizer, image = config.batch, config.optimizer, config.image
        epochs = f"{optimizer.frozen_epochs} + " * (optimizer.frozen_epochs > 0)
        sets = (
            f"{config.model.backbone}, weights {config.model.weights}, {image.height} × "
            f"{image.width} pixels, {batch.identities} people × {batch.images} images a batch, "
            f"{epochs}{optimizer.epochs} epochs"
        )
        print(textwrap.fill(f"{name}: {PURPOSES[name]}", width, break_on_hyphens=False))
        print(textwrap.fill(sets, width, initial_indent="    ", subsequent_indent="    "))


def models(tracking_uri: str | None = None) -> None:
    """List the registered models, their aliases and metrics.

    Args:
        tracking_uri: MLflow tracking URI; by default MLFLOW_TRACKING_URI.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    console = make_console()
    with display(console) as progress, phase(progress, "asking MLflow"):
        from reid_train.registry.registry import list_models

        found = list_models(tracking_uri)
    if not found:
        console.print("no model is registered yet: `train` registers one at its end")
        return
    names = "model", "version", "aliases", "mAP", "rank-1", "dataset", "created", "run"
    table = Table(*names, box=SIMPLE_HEAD)
    for model in found:
        table.add_row(*model.row())
    print_table(console, table, less=2)


def evaluate(arguments: list[str]) -> None:
    """Measure a model or a file of embeddings: CMC, mAP, mINP, re-ranking."""
    from reid_train.commands import evaluate as commands

    commands.evaluate(parse(commands.Evaluate, arguments, f"{PROGRAM} evaluate"), make_console())


def embed(arguments: list[str]) -> None:
    """Write the embeddings of a dataset or of a folder of images."""
    from reid_train.commands import embed as commands

    settings, console = parse(commands.Embed, arguments, f"{PROGRAM} embed"), make_console()
    images = commands.embed(settings, console)
    say(console, f"{images:,} embeddings at {settings.out}")


def search(arguments: list[str]) -> None:
    """Rank a gallery by its similarity to photos of people."""
    from reid_train.commands import search as commands

    commands.search(parse(commands.Search, arguments, f"{PROGRAM} search"), make_console())


def compare(arguments: list[str]) -> None:
    """Say how similar the people on two photos are."""
    from reid_train.commands import search as commands

    commands.compare(parse(commands.Compare, arguments, f"{PROGRAM} compare"), make_console())


def export(arguments: list[str]) -> None:
    """Write a model as one file for other programs: ONNX or torch.export."""
    from reid_train.commands import export as commands

    commands.export(parse(commands.Export, arguments, f"{PROGRAM} export"), make_console())


def visualize(arguments: list[str]) -> None:
    """Draw rank lists, activations and a map of a model's embeddings."""
    from reid_train.commands import visualize as commands

    settings = parse(commands.Visualize, arguments, f"{PROGRAM} visualize")
    commands.visualize(settings, make_console())


def report(
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    to: Path | None = None,
    browser: bool = False,
) -> None:
    """Copy the report of a run or a sweep here; print where its page is.

    python -m reid_train report s3://bucket/runs/first

    Args:
        run: folder or s3:// URL of the run or sweep: --output and --name with a slash between.
        to: where to copy it; by default reports/NAME.
        browser: open the page in a browser too.
    """
    from reid_train.runs.run_dir import fetch_report

    page = fetch_report(run, to or Path("reports") / PurePosixPath(run).name)
    print(page)
    if browser:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())


COMMANDS: dict[str, Command] = {
    "train": train,
    "evaluate": evaluate,
    "embed": embed,
    "search": search,
    "compare": compare,
    "export": export,
    "visualize": visualize,
    "report": command(report, f"{PROGRAM} report"),
    "models": command(models, f"{PROGRAM} models"),
    "recipes": command(recipes, f"{PROGRAM} recipes"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the command line names; return its exit code."""
    return run_one_of(COMMANDS, PROGRAM, arguments)
