"""Write the report of a run as one HTML file that needs no script, no server and no other file."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
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
    document = _PAGE.format(
        style=_STYLE,
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


# With this policy a browser loads nothing that is not in the file itself.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header><p class="kicker">Training report</p><h1>{title}</h1><dl>{facts}</dl></header>
<section>
<table>
<thead><tr><th scope="col">Metric</th><th scope="col">Before</th><th scope="col">After</th>
<th scope="col">Change</th></tr></thead>
<tbody>{rows}</tbody>
</table>
</section>
<section>{pictures}</section>
<details><summary>Configuration</summary><pre>{config}</pre></details>
</main>
</body>
</html>
"""

_STYLE = """
:root { --paper: #fbfbfa; --card: #fff; --ink: #1f2933; --muted: #6b7785; --line: #e3e6ea;
  --up: #17795a; --down: #b93340; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181d; --card: #1c2229; --ink: #e6eaee; --muted: #93a0ad; --line: #2d353e;
    --up: #58c79b; --down: #f0808a; }
  figure img { filter: brightness(.92); }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 3.5rem 1.5rem 5rem; }
.kicker { margin: 0; color: var(--muted); font-size: .8rem; letter-spacing: .08em;
  text-transform: uppercase; }
h1 { margin: .1em 0 .6em; font-size: 2.1rem; line-height: 1.2; letter-spacing: -.015em;
  overflow-wrap: anywhere; }
dl { display: flex; flex-wrap: wrap; gap: .8rem 2.5rem; margin: 0; }
dt { color: var(--muted); font-size: .8rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
section { margin-top: 2.5rem; }
table { width: 100%; max-width: 40rem; border-collapse: collapse;
  font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .25rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th:first-child { text-align: left; font-weight: 500; }
thead th { color: var(--muted); font-size: .8rem; font-weight: 400; }
.after { font-weight: 650; }
.up { color: var(--up); } .down { color: var(--down); } .same { color: var(--muted); }
figure { margin: 0 0 2.5rem; }
figure img { display: block; width: 100%; height: auto; background: #fff;
  border: 1px solid var(--line); border-radius: 10px; }
figcaption { margin-top: .6rem; color: var(--muted); font-size: .9rem; max-width: 46rem; }
details { border-top: 1px solid var(--line); padding-top: 1rem; }
summary { cursor: pointer; font-weight: 500; }
pre { overflow-x: auto; padding: 1rem 1.25rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px;
  font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media print { details { display: none; } body { background: none; } }
"""
