"""A table of metrics before and after training, for a terminal and for the report page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Row:
    """One metric before and after training.

    `unit` is "%" for a fraction that is shown in per cent. Any other unit is printed after the
    number. A value that was not measured is None.
    """

    metric: str
    before: float | None
    after: float | None
    unit: str = "%"

    def cells(self) -> tuple[str, str, str]:
        """Before, after and change as text, with a dash for what is not known."""
        before, after = _known(self.before), _known(self.after)
        if before is None or after is None:
            return self._text(before), self._text(after), "–"
        change = after - before
        sign = "+" if change > 0 else "−" if change < 0 else "±"
        # A change of a percentage is in points.
        size = f"{100 * abs(change):.1f}" if self.unit == "%" else self._text(abs(change))
        return self._text(before), self._text(after), sign + size

    def _text(self, value: float | None) -> str:
        if value is None:
            return "–"
        if self.unit == "%":
            return f"{100 * value:.1f}%"
        number = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return f"{number} {self.unit}".rstrip()


def print_summary(console: Console, rows: Sequence[Row], title: str = "") -> None:
    """Print a table of metrics before and after training.

    Args:
        console: where to print it.
        rows: one for each metric, such as `Row("mAP", 0.021, 0.594)`.
        title: a line above the table.
    """
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


def _known(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
