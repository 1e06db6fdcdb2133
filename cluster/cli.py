"""`python -m cluster`: what runs the rest on one machine or many."""

from __future__ import annotations

import tyro

from cluster.demo import demo
from data_shards.errors import run_command


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code."""
    return run_command(
        lambda: tyro.extras.subcommand_cli_from_dict(
            {"demo": demo},
            prog="python -m cluster",
            description="A cluster on this machine, and the way to others.",
            args=arguments,
        )
    )
