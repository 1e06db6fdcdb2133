"""What tests of the command line share: how to give one, and what to make of its answer."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

COLUMNS = ("path", "pid", "camid", "split")
Say = Callable[..., tuple[int, str]]
"""Takes a program and its arguments; returns exit code and what it said on standard error."""


def write_csv(folder: Path, name: str, rows: list[tuple], columns: tuple = COLUMNS) -> Path:
    path = folder / f"{name}.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *(row[: len(columns)] for row in rows)])
    return path


def error_line(said: str) -> str:
    """The one line that begins with error."""
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    return lines[0]


def train(say: Say, *arguments: object) -> tuple[int, str]:
    return say(
        "reid_train", "train", "--recipe", "demo", "--batch.identities", 2, "--tracking.uri", "off",
        *arguments,
    )  # fmt: skip
