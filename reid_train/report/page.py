"""Write the report of a run as one HTML file that needs no script, no server and no other file."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from data_shards.storage.atomic import atomic_write
from reid_train.report.summary import Row


class Picture(NamedTuple):
    """A PNG file and what it shows."""

    path: Path
    caption: str


def write_page(
    path: Path,
    title: str,
    rows: Sequence[Row],
    pictures: Sequence[Picture],
    config: Mapping[str, Any],
    *,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write a page with metrics, pictures and the configuration.

    Args:
        path: the HTML file to write.
        title: name of the run.
        rows: metrics before and after training.
        pictures: PNG files, which are copied into the page in this order.
        config: the configuration of the run; anything that JSON can hold.
        facts: short facts by name, such as the dataset, the commit or the time it took.
    """
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
