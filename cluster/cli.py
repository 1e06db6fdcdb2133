"""The command line: `python -m cluster demo | local | serve | submit | plan | measure`."""

from data_shards.command_line import command, parse, program, run_one_of

PROGRAM = program("cluster", "reid-cluster")


def demo(arguments: list[str]) -> None:
    """Run the whole system on this machine in a few minutes."""
    from cluster.demo import demo

    parse(demo, arguments, f"{PROGRAM} demo")


def local(arguments: list[str]) -> int:
    """Run S3, MLflow and a Ray head on this machine: up, status, down."""
    from cluster.local.servers import down, status, up

    prog = f"{PROGRAM} local"
    commands = {run.__name__: command(run, f"{prog} {run.__name__}") for run in (up, status, down)}
    return run_one_of(commands, prog, arguments)


def serve(arguments: list[str]) -> None:
    """Serve a search page and an HTTP API over a gallery."""
    from cluster.serve.command import Serve, serve

    serve(parse(Serve, arguments, f"{PROGRAM} serve"))


def submit(arguments: list[str]) -> int:
    """Run a command as a job on a Ray cluster."""
    from cluster.submit import Submit, submit

    end = arguments.index("--") if "--" in arguments else len(arguments)
    words = arguments[:end]
    if words and "--" not in arguments and not words[0].startswith("-"):
        words = []  # a command without the -- before it
    return submit(arguments[end + 1 :], parse(Submit, words, f"{PROGRAM} submit"))


def plan(arguments: list[str]) -> None:
    """Estimate what a run takes and costs before it is started."""
    from cluster.plan.command import plan

    plan(*arguments)


def measure(arguments: list[str]) -> None:
    """Add the speed of a finished run to the table that plan reads."""
    from cluster.measure import measure

    parse(measure, arguments, f"{PROGRAM} measure")


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the command line names; return its exit code."""
    commands = {run.__name__: run for run in (demo, local, serve, submit, plan, measure)}
    return run_one_of(commands, PROGRAM, arguments)
