"""What every command line shares."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field

import pytest

from data_shards.command_line import command, did_you_mean, parse, peek, program, run_one_of
from data_shards.errors import ConfigError, DataError


@dataclass(frozen=True)
class Optimizer:
    epochs: int = 3
    learning_rate: float = 0.1


@dataclass(frozen=True)
class Settings:
    """Settings of a test."""

    optimizer: Optimizer = field(default_factory=Optimizer)
    decode: bool = False


def test_a_reader_of_the_help_may_leave_early(monkeypatch):
    def leave(*_: object, **__: object) -> None:
        raise BrokenPipeError

    reader, writer = os.pipe()
    monkeypatch.setattr("builtins.print", leave)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    assert run_one_of({"build": lambda words: None}, "prog", ["--help"]) == 141
    os.close(reader)


def test_known_options_are_parsed():
    words = ["--optimizer.epochs", "5", "--decode"]
    assert parse(Settings, words, "prog") == Settings(Optimizer(5), decode=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--schedule.epochs", "5"], "unknown option --schedule.epochs. Did you mean --optimizer."),
        (["--optimizer.learning-rat=1"], "Did you mean --optimizer.learning-rate?"),
        (["--decod"], "Did you mean --decode?"),
        (["--xyzzy"], "unknown option --xyzzy. See prog --help"),
        (["word"], "unknown word word. See prog --help"),
    ],
)
def test_an_unknown_option_names_the_nearest(words, expected):
    with pytest.raises(ConfigError) as caught:
        parse(Settings, words, "prog")
    assert expected in str(caught.value)


@dataclass(frozen=True)
class Required:
    """Settings without defaults."""

    source: str
    max_age: int


def test_a_mistyped_option_is_named_before_the_one_that_is_therefore_missing(capsys):
    with pytest.raises(ConfigError, match=r"unknown option --sorce\. Did you mean --source\?"):
        parse(Required, ["--sorce", "csv", "--max_age", "3"], "prog")
    assert capsys.readouterr() == ("", "")
    with pytest.raises(SystemExit):
        parse(Required, ["--source", "csv"], "prog")
    assert "--max-age" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(Required, ["--source", "csv", "--max-age", "old"], "prog")
    assert capsys.readouterr().err.count("invalid literal for int()") == 1
    with pytest.raises(SystemExit):
        parse(Required, ["--help"], "prog")
    assert "Settings without defaults." in capsys.readouterr().out


def test_a_function_does_not_run_before_all_options_are_known():
    calls = []

    def target(count: int = 1) -> None:
        """Count.

        Args:
            count: how often.
        """
        calls.append(count)

    with pytest.raises(ConfigError, match=r"unknown option --cuont\. Did you mean --count\?"):
        parse(target, ["--cuont", "2"], "prog")
    assert calls == []
    parse(target, ["--count", "2"], "prog")
    assert calls == [2]


def test_options_are_read_before_the_others():
    known = peek(["--recipe", "demo", "--other", "1", "--resume"], "recipe", flags=("resume",))
    assert known.recipe == "demo"
    assert known.resume
    assert peek(["--recipe=demo"], "recipe", "name").name is None
    known = peek(["--resume_or_start", "--a_b=c_d"], "a-b", flags=("resume-or-start",))
    assert (known.resume_or_start, known.a_b) == (True, "c_d")


def fails(words: list[str]) -> None:
    """Fail on purpose."""
    raise DataError("broken")


def test_an_error_is_one_line_and_its_exit_code(capsys):
    assert run_one_of({"fails": fails}, "prog", ["fails"]) == 3
    assert capsys.readouterr().err == "error: broken\n"


def test_an_unknown_command_names_the_nearest(capsys):
    assert run_one_of({"fails": fails}, "prog", ["fail"]) == 2
    line = "error: no command 'fail'. Did you mean fails? There are: fails.\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(("words", "code"), [([], 2), (["--help"], 0), (["-h"], 0)])
def test_usage_lists_commands_by_their_docstrings(capsys, words, code):
    assert run_one_of({"fails": fails, "a": command(Settings, "prog a")}, "prog", words) == code
    said = capsys.readouterr().out
    assert "usage: prog COMMAND [options]" in said
    assert "  fails      Fail on purpose\n" in said
    assert "  a          Settings of a test\n" in said


def test_a_program_is_named_as_it_was_started(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/venv/bin/reid-train", "train"])
    assert program("reid_train", "reid-train") == "reid-train"
    monkeypatch.setattr(sys, "argv", ["/repo/reid_train/__main__.py", "train"])
    assert program("reid_train", "reid-train") == "python -m reid_train"


def test_near_names():
    assert did_you_mean("demmo", ["demo", "csv_small"]) == " Did you mean demo?"
    assert did_you_mean("zzz", ["demo"]) == ""
