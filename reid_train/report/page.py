"""One page about a run that opens anywhere: no script, no server, nothing fetched from outside."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from reid_train.report.style import write_file


@dataclass(frozen=True)
class Row:
    """One metric before and after training.

    `unit` is "%" for a fraction shown in per cent; any other unit is printed after the number.
    A value that was not measured is None.
    """

    metric: str
    before: float | None
    after: float | None
    unit: str = "%"

    def cells(self) -> tuple[str, str, str]:
        """Before, after and change as they are printed; a dash stands for what is not known."""
        before, after = _known(self.before), _known(self.after)
        if before is None or after is None:
            return self._text(before), self._text(after), "–"
        change = after - before
        sign = "+" if change > 0 else "−" if change < 0 else "±"
        # In points, not per cent of what was before.
        size = f"{100 * abs(change):.1f}" if self.unit == "%" else self._text(abs(change))
        return self._text(before), self._text(after), sign + size

    def _text(self, value: float | None) -> str:
        if value is None:
            return "–"
        if self.unit == "%":
            return f"{100 * value:.1f}%"
        number = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return f"{number} {self.unit}".rstrip()


@dataclass(frozen=True)
class Picture:
    """A PNG file and what it shows."""

    path: Path
    caption: str


def html(
    path: Path,
    title: str,
    rows: Sequence[Row],
    pictures: Sequence[Picture],
    config: Mapping[str, Any],
    *,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write a self-contained page: metrics, pictures (embedded), configuration.

    Args:
        path: the HTML file to write.
        title: name of the run.
        rows: metrics before and after training.
        pictures: PNG files, in order of appearance.
        config: what the run was told; anything JSON can hold.
        facts: short facts by name, such as the dataset's digest, the commit or the time it took.
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
    write_file(path, document.encode())


def _row(row: Row) -> str:
    before, after, change = row.cells()
    kind = {"+": "up", "−": "down"}.get(change[:1], "same")
    return (
        f'<tr><th scope="row">{escape(row.metric)}</th><td>{escape(before)}</td>'
        f'<td class="after">{escape(after)}</td><td class="{kind}">{escape(change)}</td></tr>'
    )


def _figure(picture: Picture) -> str:
    data = base64.b64encode(Path(picture.path).read_bytes()).decode()
    caption = escape(picture.caption)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _known(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


# The policy holds the page to its promise: a browser refuses whatever is not in the file itself.
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
