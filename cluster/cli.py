"""`python -m cluster`: what runs the rest on one machine or many."""

from __future__ import annotations

import sys

import tyro

from cluster.demo import demo
from cluster.plan.command import measure, plan
from data_shards.errors import run_command


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["plan"]:  # its defaults are those of the recipe that it names
        return run_command(lambda: plan(*arguments[1:]))
    return run_command(
        lambda: tyro.extras.subcommand_cli_from_dict(
            {"demo": demo, "measure": measure, "plan": plan},
            prog="python -m cluster",
            description="A cluster on this machine, and the way to others.",
            args=arguments,
        )
    )
