"""Hooks of mkdocs: pages that are made when the site is built, and links that work in both places.

- Pages that live elsewhere in the repository (`PAGES`), files of code that a page links to, and the
  commands' own help become pages of the site.
- `<!-- include: FILE -->` in a page stands for a file of code, `<!-- include: FILE.md#section -->`
  for a section of another page, so that every text has one source.
- Links are written as GitHub reads them, relative to the file. Here they lead to the site's pages.
"""

from __future__ import annotations

import contextlib
import html
import importlib
import io
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PACKAGES = ("data_shards", "reid_train", "tune", "cluster")
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "cluster/README.md": "project/cluster.md",
    "tests/benchmarks/RESULTS.md": "project/results.md",
}
"""Pages from outside docs/: file in the repository to page of the site."""
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
INCLUDE = re.compile(r"<!-- include: (\S+) -->")
FENCE = re.compile(r"^ *(?P<mark>```|~~~~).*?^ *(?P=mark)$", re.M | re.S)
HEADING = re.compile(r"^(#+) +(.*?)$", re.M)
TITLE = re.compile(r"^ (\S.*)\n -{10,}\n", re.M)  # of a section of a help
LANGUAGES = {".py": "python", ".md": "markdown", ".yaml": "yaml", ".json": "json", ".sh": "sh"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    from mkdocs.structure.files import File

    made = {page: (ROOT / file).read_text() for file, page in PAGES.items() if page != "index.md"}
    made |= dict(command_pages(command_help()))
    texts = {file.src_uri: file.content_string for file in files.documentation_pages()} | made
    for page, text in texts.items():
        for target in linked_files(text, source_of(page)):
            made[page_of(target)] = code_page(target)
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Include what the page includes, and turn its links to the site's pages."""
    return for_site(markdown, page.file.src_uri)


def for_site(text: str, page: str, source: str | None = None) -> str:
    """The Markdown of a page as the site shows it; `source` is the file that has it, if another."""
    source = source or source_of(page)

    def include(match: re.Match[str]) -> str:
        return for_site(*included(match[1], source, page))

    def link(match: re.Match[str]) -> str:
        return match[1] + site_link(match[2], source, page) + match[3]

    return outside_code(text, lambda part: INCLUDE.sub(include, LINK.sub(link, part)))


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """Change a page, but not its blocks of code."""
    changed, end = "", 0
    for code in FENCE.finditer(text):
        changed += change(text[end : code.start()]) + code[0]
        end = code.end()
    return changed + change(text[end:])


def included(target: str, source: str, page: str) -> tuple[str, str, str]:
    """What stands for an include: the text, the page, and the file that the text is from."""
    file, _, anchor = target.partition("#")
    file = resolve(file, source)
    text = (ROOT / file).read_text()
    return (section(text, anchor) if anchor else code_block(file), page, file)


def section(text: str, anchor: str) -> str:
    """A section of a page with its heading, up to the next heading."""
    code = [match.span() for match in FENCE.finditer(text)]
    headings = [
        match
        for match in HEADING.finditer(text)
        if not any(start < match.start() < end for start, end in code)
    ]
    for match, after in zip(headings, [*headings[1:], None], strict=True):
        if slug(match[2]) == anchor:
            return text[match.start() : after.start() if after else None].strip()
    raise ValueError(f"no section #{anchor}")


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    words = re.sub(r"\]\([^)]*\)", "", heading)
    return re.sub(r"[^\w\- ]", "", words.lower()).strip().replace(" ", "-")


def source_of(page: str) -> str:
    """The file of the repository that has a page of the site."""
    sources = {page: file for file, page in PAGES.items() if page != "index.md"}
    return sources.get(page, f"docs/{page}")


def resolve(target: str, source: str) -> str:
    """The file of the repository that a file links to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def is_relative(target: str) -> bool:
    """Whether a link leads to a file of the repository."""
    return not re.match(r"[a-z]+:|#|/", target)


def linked_files(text: str, source: str) -> Iterator[str]:
    """The files that a page links to, itself or by an include, and that are not in docs/."""
    for match in INCLUDE.finditer(text):
        if "#" in match[1]:
            part, _, file = included(match[1], source, "")
            yield from linked_files(part, file)
    for match in LINK.finditer(FENCE.sub("", text)):
        if is_relative(match[2]):
            target = resolve(match[2].partition("#")[0], source)
            if (ROOT / target).is_file() and page_of(target) == f"source/{target}.md":
                yield target


def page_of(file: str) -> str:
    """The page of the site, or the picture, that a file of the repository becomes."""
    if file in PAGES:
        return PAGES[file]
    inside = file.startswith("docs/") and file.endswith((".md", ".png"))
    return file.removeprefix("docs/") if inside else f"source/{file}.md"


def site_link(target: str, source: str, page: str) -> str:
    """A link of `source`, from the page of the site that shows it."""
    if not is_relative(target):
        return target
    file, mark, anchor = target.partition("#")
    path = posixpath.relpath(page_of(resolve(file, source)), posixpath.dirname(page) or ".")
    return path + mark + anchor


def code_block(file: str) -> str:
    """A file as a block of code."""
    text = (ROOT / file).read_text().strip()
    return f"~~~~{LANGUAGES.get(Path(file).suffix, 'text')}\n{text}\n~~~~"


def code_page(file: str) -> str:
    """A page with the code of a file, which the site's search leaves out."""
    return f"---\nsearch: {{exclude: true}}\n---\n# {file}\n\n{code_block(file)}\n"


def command_help() -> dict[str, str]:
    """The help of every command, by its words such as `cluster local up`."""
    found, waiting = dict[str, str](), [[package] for package in PACKAGES]
    while waiting:
        words = waiting.pop(0)
        text = found[" ".join(words)] = help_of(words)
        if "COMMAND [options]" in text:
            waiting += [[*words, name] for name in re.findall(r"^  (\w[\w-]*) {2,}", text, re.M)]
    return found


def help_of(words: list[str]) -> str:
    """What `python -m WORDS --help` prints, 100 characters wide."""
    main = importlib.import_module(f"{words[0]}.cli").main
    with (
        mock.patch.dict(os.environ, COLUMNS="100"),
        contextlib.redirect_stdout(io.StringIO()) as text,
        contextlib.suppress(SystemExit),
    ):
        main([*words[1:], "--help"])
    return text.getvalue()


def options(text: str) -> dict[str, list[tuple[str, str]]]:
    """The options in a command's help: (name and kind, meaning) by the title of their section."""
    sections = dict[str, list[tuple[str, str]]]()
    _, *parts = TITLE.split(text)
    for title, section in zip(parts[::2], parts[1::2], strict=True):
        rows = sections.setdefault(title, [])
        for line in section.splitlines():
            inside = line[2:].rstrip()
            name, _, meaning = inside.partition("  ")
            if inside.startswith("---"):
                rows.clear()  # above it is a sentence about the section
            elif name and rows and title != "positional arguments" and not name.startswith("-"):
                rows[-1] = (rows[-1][0] + name, meaning.strip())  # the name's second line
            elif name:
                rows.append((name, meaning.strip()))
            elif rows:
                rows[-1] = (rows[-1][0], f"{rows[-1][1]} {inside.strip()}".strip())
    return sections


def command_pages(helps: dict[str, str]) -> Iterator[tuple[str, str]]:
    """The pages about commands, one a package: name and Markdown; `helps` is of `command_help`."""
    of_train = {row for rows in options(helps["reid_train train"]).values() for row in rows}
    for package in PACKAGES:
        own = {words: text for words, text in helps.items() if words.split()[0] == package}
        parts = [command_section(words, text, of_train) for words, text in own.items()]
        yield f"reference/commands/{package}.md", "\n\n".join(parts)


def command_section(words: str, text: str, of_train: set[tuple[str, str]]) -> str:
    """The Markdown about one command, from its help."""
    level = "#" if " " not in words else "##"
    parts = [f"{level} python -m {words}"]
    if "COMMAND [options]" in text:
        rows = re.findall(r"^  (\w[\w-]*) {2,}(.*)", text, re.M)
        anchors = {name: slug(f"python -m {words} {name}") for name, _ in rows}
        table = [f"| [`{name}`](#{anchors[name]}) | {about} |" for name, about in rows]
        return "\n\n".join(
            [*parts, "\n".join(["| command | what it does |", "| --- | --- |", *table])]
        )
    usage, _, about = TITLE.split(text)[0].partition("\n")
    parts += [f"```text\n{usage.removeprefix('usage: ')}\n```", *map(example, about.split("\n\n"))]
    sections = options(text)
    shared = sum(row in of_train for rows in sections.values() for row in rows)
    takes_all = words != "reid_train train" and shared > len(of_train) / 2
    for title, rows in sections.items():
        kept = [row for row in rows if not row[0].startswith("-h,")]
        kept = [row for row in kept if not (takes_all and row in of_train)]
        if kept:
            parts += [f"**{title.capitalize()}**", definitions(kept)]
    if takes_all:
        train = "python -m reid_train train"
        parts.append(f"And all options of [`{train}`](reid_train.md#{slug(train)}).")
    return "\n\n".join(parts)


def example(paragraph: str) -> str:
    """A paragraph of a help; one that shows a command becomes a block."""
    text = paragraph.strip()
    shows = text.startswith("python -m ")
    return "```sh\n" + re.sub(r"\n *", " \\\n    ", text) + "\n```" if shows else text


def definitions(rows: list[tuple[str, str]]) -> str:
    """A list of options in HTML, because their texts are not Markdown."""
    lines = [
        f"<dt><code>{html.escape(name, False)}</code></dt><dd>{html.escape(meaning, False)}</dd>"
        for name, meaning in rows
    ]
    text = re.sub(r"`(.*?)`", r"<code>\1</code>", "\n".join(lines))
    return f"<dl>\n{text}\n</dl>"
