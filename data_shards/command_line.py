"""What every command line shares: how commands are chosen, parsed, and how their errors look.

Help and mistakes answer at once, so nothing slow is imported before a command runs: modules named
`cli` import Ray, PyTorch, boto3 and the like inside the functions that need them.
"""

import argparse
import contextlib
import difflib
import functools
import io
import logging
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_shards.errors import ConfigError, Interrupted, ReidError
from data_shards.progress import wrap

# Takes the words after its name; returns an exit code, or None for 0.
Command = Callable[[list[str]], int | None]


def program(package: str, script: str) -> str:
    """How this process was started: `reid-train`, or `python -m reid_train`."""
    return script if Path(sys.argv[0]).name == script else f"python -m {package}"


def _complain(text: str) -> None:
    """Print on stderr, broken between words on a terminal."""
    if sys.stderr.isatty():
        text = wrap(text, shutil.get_terminal_size().columns)
    print(text, file=sys.stderr)


class _Warnings(logging.Handler):
    """Prints what is logged where nobody has set logging up."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            _complain(self.format(record))
        except Exception:
            self.handleError(record)


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command; print a `ReidError` as one line on stderr, and return the exit code."""
    logging.lastResort = _Warnings(logging.WARNING)
    try:
        return main() or 0
    except ReidError as error:
        kind = "" if isinstance(error, Interrupted) else "error: "
        _complain(f"{kind}{error}")
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def run_one_of(
    commands: Mapping[str, Command], prog: str, words: Sequence[str] | None = None
) -> int:
    """Run the command that the first word names; return its exit code.

    The help, with `prog` before the names, shows the first line of each command's docstring.
    """
    name, *arguments = (sys.argv[1:] if words is None else words) or [""]

    def run() -> int | None:
        if name in ("", "-h", "--help"):
            first = {key: (run.__doc__ or "").partition("\n")[0] for key, run in commands.items()}
            lines = [f"  {key:9}  {line.rstrip('.')}" for key, line in first.items()]
            print(f"usage: {prog} COMMAND [options]\n", *lines, sep="\n")
            print(f"\nOptions of a command: {prog} COMMAND --help", flush=True)
            return 0 if name else 2
        if name not in commands:
            hint, there = did_you_mean(name, commands), ", ".join(commands)
            raise ConfigError(f"no command {name!r}.{hint} There are: {there}.")
        return commands[name](arguments)

    return run_command(run)


def command(target: Callable[..., Any], prog: str) -> Command:
    """A command that parses its words and calls `target` with them."""
    return functools.update_wrapper(functools.partial(parse, target, prog=prog), target)


def parse(target: Callable[..., Any], words: Sequence[str], prog: str, **options: Any) -> Any:
    """Call `target`, a settings class or a function, with words parsed by tyro; return its result.

    `options` are those of `tyro.cli`, such as `default`.

    Raises:
        ConfigError: an option that does not exist; the message names the nearest.
        SystemExit: help was asked for, or tyro has shown what is wrong.
    """
    import tyro

    @functools.wraps(target)
    def later(*args: Any, **kwargs: Any) -> Any:
        return functools.partial(target, *args, **kwargs)

    def call(words: Sequence[str], **more: Any) -> Any:
        # A function runs after all of its words are known to be right.
        held = target if isinstance(target, type) else later
        config = (tyro.conf.AvoidSubcommands,)
        return tyro.cli(held, args=words, prog=prog, config=config, **options, **more)

    def shown_help() -> str:
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
            call(["--help"])
        return reflowed(text.getvalue(), shutil.get_terminal_size().columns)

    def known() -> list[str]:
        return re.findall(r"--[a-z][\w.-]*", shown_help())

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parsed, unknown = call(words, return_unknown_args=True, console_outputs=False)
    except SystemExit as stop:
        # A mistyped option is also a missing one: tyro would complain about that first.
        given = [word for word in words if word.startswith("--")] if stop.code else []
        names = {name.replace("_", "-") for name in known()} if given else set()
        unknown = [w for w in given if w.partition("=")[0].replace("_", "-") not in names]
        if not unknown:
            if stop.code:
                call(words)  # shows what is wrong
            print(shown_help(), flush=True)
            raise
    if unknown:
        word = next((word for word in unknown if word.startswith("-")), unknown[0])
        name = word.partition("=")[0]
        kind = "option" if name.startswith("-") else "word"
        raise ConfigError(f"unknown {kind} {name}.{did_you_mean(name, known())} See {prog} --help")
    return parsed if isinstance(target, type) else parsed()


def reflowed(text: str, width: int) -> str:
    """A help of tyro's without the line breaks of docstrings, and no line wider than `width`."""
    rows: list[tuple[str, str]] = []  # what stays in front of a paragraph, and its text
    for line in text.replace("(default: )", "").splitlines():
        body = line.strip()
        indent = len(line) - len(line.lstrip())
        before = "".join(rows[-1]) if rows else ""
        if indent >= 8 and before[indent - 2 : indent] == "  " and before[indent:].strip():
            rows[-1] = before[:indent], f"{before[indent:]} {body}"
        elif body.startswith("--") and before.lstrip().startswith("python "):
            rows[-1] = rows[-1][0], f"{rows[-1][1]} {body}"  # an example continues
        else:
            rows.append((line[:indent], body))
    return "\n".join(_wrapped(front, words, width) for front, words in rows)


def _wrapped(front: str, words: str, width: int) -> str:
    """A paragraph with `front` before it; an example can be pasted into a shell."""
    later = " " * len(front)
    if words.startswith("usage:"):
        later += "    "
    if not words.startswith("python "):
        return textwrap.TextWrapper(width, front, later, break_on_hyphens=False).fill(words)
    # Lines break before options only, and not inside quotes.
    words = re.sub(r'"[^"]*"|--\S+ (?!-)', lambda found: found[0].replace(" ", "\0"), words)
    wrapper = textwrap.TextWrapper(width - 2, front, f"{later}    ", break_on_hyphens=False)
    return " \\\n".join(wrapper.wrap(words)).replace("\0", " ")


def peek(words: Sequence[str], *options: str, flags: Sequence[str] = ()) -> argparse.Namespace:
    """Read a few options before all others, whose defaults depend on them."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in options:
        first.add_argument(f"--{option}")
    for flag in flags:
        first.add_argument(f"--{flag}", action="store_true")
    dashed = []  # as tyro takes them, too
    for word in words:
        name, equals, value = word.partition("=")
        dashed.append(f"{name.replace('_', '-')}{equals}{value}" if name[:2] == "--" else word)
    return first.parse_known_args(dashed)[0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean NAME?`, or nothing if no name is near.

    An option of another section comes first: `--schedule.epochs` is near `--optimizer.epochs`.
    """
    names, field = list(dict.fromkeys(known)), word.rpartition(".")[2].lstrip("-")
    near = [name for name in names if name.rpartition(".")[2].lstrip("-") == field]
    near = near or difflib.get_close_matches(word, names, n=1)
    return f" Did you mean {near[0]}?" if near else ""
