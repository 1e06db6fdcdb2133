"""What a person looks at after a run: pictures, one page, and a table.

Functions take plain arrays and write files; none knows of a model, a dataset or a tracking
server. This is the door; each kind of picture has its own file here.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from reid_train.report.curves import curves
from reid_train.report.factor_map import factors
from reid_train.report.factor_table import Factors, load_factors, save_factors
from reid_train.report.page import Picture, Row, html
from reid_train.report.ranks import rank_list

__all__ = [
    "Factors",
    "Picture",
    "Row",
    "curves",
    "factors",
    "html",
    "load_factors",
    "print_summary",
    "rank_list",
    "save_factors",
]


def print_summary(console: Console, rows: Sequence[Row], title: str = "") -> None:
    """Print a table of metrics before and after training.

    Args:
        console: where to.
        rows: one metric each, such as `Row("mAP", 0.021, 0.594)`.
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
