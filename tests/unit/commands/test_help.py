"""Help and mistakes answer at once: nothing slow is imported before a command runs."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import subprocess
import sys
import time

import pytest

SLOW = (
    "ray", "torch", "torchvision", "numba", "scipy", "mlflow", "optuna", "boto3", "botocore",
    "pyarrow", "cv2", "PIL", "matplotlib", "webdataset",
)  # fmt: skip
PROBE = """
import contextlib, importlib, io, json, sys
cli = importlib.import_module(sys.argv[1] + ".cli")
found = {}
for line in json.loads(sys.argv[2]):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            code = cli.main(line)
        except SystemExit as exit:
            code = exit.code
    slow = [name for name in json.loads(sys.argv[3]) if name in sys.modules]
    found[" ".join(line)] = (code, slow, text.getvalue())
print(json.dumps(found))
"""
LINES = {
    "data_shards": [[], ["build"], ["verify"], ["info"]],
    "reid_train": [
        [], ["train"], ["evaluate"], ["embed"], ["search"], ["compare"], ["export"],
        ["visualize"], ["report"], ["models"], ["recipes"],
    ],
    "tune": [[]],
    "cluster": [
        [], ["demo"], ["local"], ["local", "up"], ["local", "status"], ["local", "down"],
        ["submit"], ["plan"], ["measure"],
    ],
}  # fmt: skip
MISTAKES = {
    "data_shards": [["bild"], ["build", "--sorce", "csv"]],
    "reid_train": [["trane"], ["train", "--recipe", "demmo"], ["train", "--schedule.epochs", "1"]],
    "tune": [["--recipe", "demmo"], ["--trails", "3"]],
    "cluster": [["subit"], ["plan", "--recipe", "demmo"], ["submit", "--adress", "x"]],
}


def probe(package: str, lines: list[list[str]]) -> dict[str, tuple[int, list[str], str]]:
    """Exit code, slow modules imported so far, and output, by command line."""
    command = [sys.executable, "-c", PROBE, package, json.dumps(lines), json.dumps(SLOW)]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(made.stdout)


@pytest.fixture(scope="module", params=LINES)
def answers(request: pytest.FixtureRequest) -> dict[str, tuple[int, list[str], str]]:
    package = request.param
    return probe(package, [[*line, "--help"] for line in LINES[package]])


def test_help_imports_nothing_slow(answers):
    assert {line: slow for line, (code, slow, _) in answers.items() if slow or code} == {}


def test_every_option_has_a_help_text(answers):
    silent = []
    for line, (_, _, text) in answers.items():
        text = re.sub(r"[│╭╮╰╯─]", " ", text)
        for option in re.split(r"\n +(?=--[a-z])", text)[1:]:
            words = re.sub(r"--[\w.-]+|\{[^}]*\}|\[STR.*\]|\((default|required)[^)]*\)", "", option)
            if not re.search(r"[a-z]{3}", words):
                silent.append(f"{line}: {option.split()[0]}")
    assert silent == []


def test_help_fits_80_columns_and_has_no_early_line_breaks(answers):
    for line, (_, _, text) in answers.items():
        rows = text.splitlines()
        assert [row for row in rows if len(row) > 80] == [], line
        assert "(default: )" not in text
        for row, following in itertools.pairwise(rows):
            indent = len(following) - len(following.lstrip())
            if indent >= 8 and row[:indent].endswith("  ") and row[indent:].strip():
                assert len(f"{row} {following.split()[0]}") > 80, f"{line}: {row}"


def test_examples_can_be_pasted_as_they_stand(answers):
    for line, (_, _, text) in answers.items():
        examples = re.findall(r"^ *(python -m (?:.*\\\n)*.*)$", text, re.MULTILINE)
        for example in examples:
            _, *later = example.split("\\\n")
            assert all(row.startswith("    --") for row in later), line
            assert shlex.split(example)[:2] == ["python", "-m"]
        follows = re.findall(r"^ *python -m .*[^\\]\n *(\S+)", text, re.MULTILINE)
        assert [word for word in follows if word.startswith("--")] == [], line


def test_help_that_is_not_read_to_its_end_is_no_error():
    command = f"{sys.executable} -m reid_train train --help | head -3"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage:")
    assert done.stderr == ""


@pytest.mark.parametrize("package", MISTAKES)
def test_a_mistake_imports_nothing_slow_and_is_answered(package):
    for line, (code, slow, text) in probe(package, MISTAKES[package]).items():
        assert (code, slow) == (2, []), line
        assert "Did you mean" in text or "Missing" in text, line


def test_help_answers_within_a_second_or_a_few_on_a_busy_machine():
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "reid_train", "train", "--help"], check=True, stdout=-3)
    assert time.monotonic() - began < 5.0


@pytest.mark.parametrize(
    ("option", "source", "parameter"),
    [
        ("--val", "msmt17", "val"),
        ("--identities", "synthetic", "identities"),
        ("--cameras", "synthetic", "cameras"),
        ("--images-per-camera", "synthetic", "images_per_camera"),
        ("--seed", "synthetic", "seed"),
    ],
)
def test_the_help_shows_the_defaults_of_sources(option, source, parameter):
    import inspect

    from data_shards.sources import SOURCES

    default = inspect.signature(SOURCES[source].read).parameters[parameter].default
    ((_, _, text),) = probe("data_shards", [["build", "--help"]]).values()
    shown = re.sub(r"[│\s]+", " ", text).partition(f"{option} ")[2]
    assert f"(default: {default})" in shown[:200]
