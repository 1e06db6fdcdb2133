"""`python -m cluster`: what runs the rest on one machine or many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from data_shards.errors import run_one_of

HELP = """usage: python -m cluster COMMAND [options]

  demo       the whole system on this machine in a few minutes
  local      up, status, down: S3, MLflow and a Ray head on this machine
  submit     run a command as a job on a Ray cluster
  plan       what a run will take before it is paid for
  measure    add what a finished run showed to the table of speeds that plan reads

Each command says what it takes with --help."""


def demo(arguments: list[str]) -> None:
    """Parse and run `demo`."""
    from cluster.demo import demo

    tyro.cli(demo, args=arguments, prog="python -m cluster demo")


def local(arguments: list[str]) -> None:
    """Parse and run `local up`, `local status` or `local down`."""
    from cluster.local.servers import COMMANDS

    tyro.extras.subcommand_cli_from_dict(
        COMMANDS, args=arguments, prog="python -m cluster local", description=""
    )


@dataclass(frozen=True)
class Submit:
    """Run a command as a job on a Ray cluster; follow its log; end with its exit code.

    python -m cluster submit -- python -m reid_train train --recipe msmt17_resnet50 …
    """

    address: str | None = None
    """The job server, such as http://HOST:8265; by default RAY_API_SERVER_ADDRESS, or the local
    stack."""
    working_dir: Path = Path()
    """What the job runs in: packaged without data, caches and .git, and sent."""
    install: bool = False
    """Install the dependencies on the nodes, at the versions of constraints.txt; an image made by
    cluster/Dockerfile has them."""
    detach: bool = False
    """Return when the job is accepted."""


def submit(arguments: list[str]) -> int:
    """Parse and run `submit`; what follows `--` is the job's command."""
    from cluster.submit import submit

    end = arguments.index("--") if "--" in arguments else len(arguments)
    parsed = tyro.cli(Submit, args=arguments[:end], prog="python -m cluster submit [OPTIONS] -- …")
    return submit(arguments[end + 1 :], **vars(parsed))


def plan(arguments: list[str]) -> None:
    """Parse and run `plan`."""
    from cluster.plan.command import plan

    plan(*arguments)


def measure(arguments: list[str]) -> None:
    """Parse and run `measure`."""
    from cluster.plan.command import measure

    tyro.cli(measure, args=arguments, prog="python -m cluster measure")


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "demo": demo,
    "local": local,
    "submit": submit,
    "plan": plan,
    "measure": measure,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the command line names; return its exit code."""
    return run_one_of(COMMANDS, HELP, arguments)
