"""Every link of the pages leads somewhere, and every command and block of code in them is real."""

from __future__ import annotations

import ast
import importlib
import re
import shlex

import pytest
import tyro

from docs import hooks
from reid_train.recipes import recipe
from reid_train.runs.run_dir import Run

ROOT = hooks.ROOT
PAGES = [*hooks.PAGES, *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
SCRIPTS = {"reid-shards": "data_shards", "reid-train": "reid_train"}
SCRIPTS |= {"reid-tune": "tune", "reid-cluster": "cluster"}
LINE = re.compile(
    r"""(?:(?<!\S)\#[^\n]* | \\. | '[^']*' | "(?:[^"\\]|\\.)*" | [^\n'"\\])+""", re.X | re.S
)
"""A command of a shell block: a line, or several that a backslash or a quote joins."""
OTHERS = {"--help", "--host", "--shm-size", "--runtime-env-json", "--loss.NAME-weight"}
"""Flags in the text that are of mlflow, docker and ray, and one that stands for others."""


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings; equal headings are numbered."""
    found = set[str]()
    for match in hooks.HEADING.finditer(hooks.FENCE.sub("", text_of(page))):
        slug, number = hooks.slug(match[2]), 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    return hooks.command_help()


def broken_links(page: str, text: str) -> list[str]:
    """The links and includes that lead to no file, or to no heading of a page."""
    text, broken = hooks.FENCE.sub("", text), []
    for target in [match[2] for match in hooks.LINK.finditer(text)] + hooks.INCLUDE.findall(text):
        if not re.match(r"[a-z]+:", target):
            name, _, anchor = target.partition("#")
            file = hooks.resolve(name, page) if name else page
            if not (ROOT / file).exists() or (anchor and anchor not in anchors(file)):
                broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_links_and_includes_lead_to_a_file_and_a_heading(page):
    assert broken_links(page, text_of(page)) == []


def test_broken_links_are_found():
    links = "[a](METHOD.md#no) [b](none.md) [c](https://x.org) [d](../README.md#two-commands)"
    assert broken_links("docs/DATA.md", links) == ["METHOD.md#no", "none.md"]


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_python_are_python(page):
    for block in re.findall(r"^( *)```python\n(.*?)^\1```", text_of(page), re.M | re.S):
        assert ast.parse(block[1]).body


class _Parsed(BaseException):
    """Ends a command when its words have been parsed."""


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands end before they do anything; runs to resume have the settings of a recipe."""
    parse = tyro.cli

    def cli(*args, **options):
        result = parse(*args, **options)
        if options.get("return_unknown_args") and result[1]:
            return result  # the command line says which word is unknown
        raise _Parsed

    config = recipe("msmt17_resnet50").replace(data="s3://bucket/data", output="s3://bucket/runs")
    monkeypatch.setattr(tyro, "cli", cli)
    monkeypatch.setattr(Run, "exists", lambda *_: True)
    monkeypatch.setattr(Run, "read", lambda *_: type("Found", (), {"config": config}))


def commands(text: str) -> list[list[str]]:
    """Our commands in a page's shell blocks and indented blocks, also those that `submit` gets."""
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", text, re.M | re.S)
    blocks += re.findall(r"(?:^ {4,}python -m .*(?:\\\n.*)*\n)+", hooks.FENCE.sub("", text), re.M)
    found = []
    for line in LINE.findall("\n".join(blocks)):
        if re.search(r"python -m (?!pip|venv|pytest)|reid-", line):
            words = shlex.split(line.replace("\\\n", " "), comments=True)
            for part in split(words, "--"):
                found += [own] if (own := ours(part)) else []
    return found


def split(words: list[str], mark: str) -> list[list[str]]:
    if mark not in words:
        return [words]
    at = words.index(mark)
    return [words[:at], *split(words[at + 1 :], mark)]


def ours(words: list[str]) -> list[str] | None:
    """Package and arguments of a command of this project, else None."""
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=.*|&|[|>].*", word)]
    if words[:2] == ["python", "-m"] and words[2] in hooks.PACKAGES:
        return words[2:]
    return [SCRIPTS[words[0]], *words[1:]] if words and words[0] in SCRIPTS else None


def wrong_commands(text: str) -> list[list[str]]:
    """The commands of a page that the program does not take."""
    wrong = []
    for package, *words in commands(text):
        try:
            importlib.import_module(f"{package}.cli").main(
                [*words, "--", "true"] if words[:1] == ["submit"] else words
            )
        except _Parsed:
            continue
        except SystemExit:
            pass
        wrong.append([package, *words])
    return wrong


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_blocks_are_ones_that_the_program_takes(page, parse_only):
    assert wrong_commands(text_of(page)) == []


def test_wrong_commands_are_found(parse_only):
    page = """
    ```sh
    python -m data_shards info s3://reid/people
    python -m data_shards inform s3://reid/people
    python -m cluster submit -- python -m reid_train report \\
        s3://reid/runs/first --brwser
    ```
    """
    wrong = [["data_shards", "inform"], ["reid_train", "report"]]
    assert [words[:2] for words in wrong_commands(page)] == wrong


def test_there_are_commands_to_check():
    assert len([command for page in PAGES for command in commands(text_of(page))]) > 60


def test_flags_in_the_text_are_flags_of_a_command(helps):
    known = set(re.findall(r"--[a-z][\w.-]*", "".join(helps.values())))
    unknown = {
        (page, flag)
        for page in PAGES
        if page != "tests/benchmarks/RESULTS.md"  # which names the benchmarks' own
        for code in re.findall(r"`([^`\n]+)`", hooks.FENCE.sub("", text_of(page)))
        if re.match(r"--[a-z]|python -m (data_shards|reid_train|tune|cluster)\b", code)
        for flag in re.findall(r"(?<!\S)--[a-z][\w.-]*", code)
        if flag not in known | OTHERS
    }
    assert unknown == set()


def test_pages_about_commands_have_every_option_of_the_help(helps):
    for words in ("data_shards build", "reid_train train", "cluster submit"):
        shown = set(re.findall(r"^  (--[a-z][\w.-]*)", helps[words], re.M))
        rows = [name for rows in hooks.options(helps[words]).values() for name, _ in rows]
        assert shown
        assert shown <= {name.split()[0].rstrip(",") for name in rows}
        assert all(meaning for rows in hooks.options(helps[words]).values() for _, meaning in rows)
