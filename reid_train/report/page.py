"""The report of a run: a table for a terminal, and an HTML file that needs no script or server."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_shards.storage.atomic import atomic_write


@dataclass(frozen=True)
class Row:
    """One metric before and after training; None is not measured."""

    metric: str
    before: float | None
    after: float | None
    unit: str = "%"  # of a fraction that is shown in per cent; others are printed after the number

    def cells(self) -> tuple[str, str, str]:
        """Before, after and change as text, with a dash for what is not known."""
        before, after = (math.nan if v is None else v for v in (self.before, self.after))
        change = after - before
        sign = "+" if change > 0 else "−" if change < 0 else "±"
        # A change of a percentage is in points.
        size = f"{100 * abs(change):.1f}" if self.unit == "%" else self._text(abs(change))
        change = sign + size if math.isfinite(change) else "–"
        return self._text(before), self._text(after), change

    def _text(self, value: float) -> str:
        if not math.isfinite(value):
            return "–"
        if self.unit == "%":
            return f"{100 * value:.1f}%"
        number = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return f"{number} {self.unit}".rstrip()


class Picture(NamedTuple):
    """A PNG file and what it shows."""

    path: Path
    caption: str


def print_summary(console: Console, rows: Sequence[Row], title: str = "") -> None:
    """Print a table of metrics before and after training, with a title above it."""
    heading = Text(title, style="bold") if title else None
    table = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, header_style="dim")
    table.add_column("metric")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        before, after, change = row.cells()
        colour = {"+": "green", "−": "red"}.get(change[:1], "dim")
        table.add_row(Text(row.metric), Text(before), Text(after, "bold"), Text(change, colour))
    console.print(table)


def write_page(
    path: Path,
    title: str,
    rows: Sequence[Row],
    pictures: Sequence[Picture],
    config: Mapping[str, Any],
    *,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write a page with metrics, copies of the pictures, settings and short facts of a run."""
    template = Template(Path(__file__).with_name("page.html").read_text())
    document = template.substitute(
        title=escape(title),
        facts="".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
            for name, value in (facts or {}).items()
        ),
        rows="".join(_row(row) for row in rows),
        pictures="".join(_figure(picture) for picture in pictures),
        config=escape(json.dumps(config, indent=2, ensure_ascii=False, default=str)),
    )
    with atomic_write(path) as file:
        file.write(document.encode())


def _row(row: Row) -> str:
    before, after, change = map(escape, row.cells())
    kind = {"+": "up", "−": "down"}.get(change[:1], "same")
    return (
        f'<tr><th scope="row">{escape(row.metric)}</th><td>{before}</td>'
        f'<td class="after">{after}</td><td class="{kind}">{change}</td></tr>'
    )


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    caption = escape(picture.caption)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )
