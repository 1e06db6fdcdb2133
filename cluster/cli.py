"""The command line: `python -m cluster demo | local | submit | plan | measure`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_shards.command_line import Command, command, parse, program, run_one_of

PROGRAM = program("cluster", "reid-cluster")


def demo(arguments: list[str]) -> None:
    """Run the whole system on this machine in a few minutes."""
    from cluster.demo import demo

    parse(demo, arguments, f"{PROGRAM} demo")


def local(arguments: list[str]) -> int:
    """Run S3, MLflow and a Ray head on this machine: up, status, down."""
    from cluster.local.servers import COMMANDS

    prog = f"{PROGRAM} local"
    commands = {name: command(target, f"{prog} {name}") for name, target in COMMANDS.items()}
    return run_one_of(commands, prog, arguments)


@dataclass(frozen=True)
class Submit:
    """Run a command as a job on a Ray cluster, follow its log, and end with its exit code.

    python -m cluster submit -- python -m reid_train train --recipe msmt17_resnet50 …
    """

    address: str | None = None
    """Job server, such as http://HOST:8265; None: RAY_API_SERVER_ADDRESS, or the local stack."""
    working_dir: Path = Path()
    """Folder that is sent and that the job runs in, without data, caches and .git."""
    install: bool = False
    """Install the dependencies of constraints.txt on the nodes; cluster/Dockerfile has them."""
    detach: bool = False
    """Return as soon as the job is accepted."""


def submit(arguments: list[str]) -> int:
    """Run a command as a job on a Ray cluster."""
    from cluster.submit import submit

    end = arguments.index("--") if "--" in arguments else len(arguments)
    parsed = parse(Submit, arguments[:end], f"{PROGRAM} submit [OPTIONS] -- …")
    return submit(arguments[end + 1 :], **vars(parsed))


def plan(arguments: list[str]) -> None:
    """Estimate what a run takes and costs before it is started."""
    from cluster.plan.command import plan

    plan(*arguments)


def measure(arguments: list[str]) -> None:
    """Add the speed of a finished run to the table that plan reads."""
    from cluster.measure import measure

    parse(measure, arguments, f"{PROGRAM} measure")


COMMANDS: dict[str, Command] = {
    "demo": demo,
    "local": local,
    "submit": submit,
    "plan": plan,
    "measure": measure,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the command line names; return its exit code."""
    return run_one_of(COMMANDS, PROGRAM, arguments)
