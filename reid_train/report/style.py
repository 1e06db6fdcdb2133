"""The look of every picture: colours, type sizes, axes, and how a file is written.

Figures use matplotlib's object API, without pyplot or rcParams: so any thread can draw a
picture, and no global state changes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
    StrMethodFormatter,
)
from scipy.optimize import isotonic_regression

from data_shards.storage.atomic import atomic_write

DPI = 144  # a 10 inch picture is 1440 pixels wide: sharp on a dense screen at half that size

INK = "#1f2933"
MUTED = "#6b7785"
FAINT = "#c5ccd4"
GRID = "#e8ebef"
PAPER = "#ffffff"
BLUE = "#3a6ea5"
ORANGE = "#d9822b"
GREEN = "#218c6b"
PURPLE = "#8a569e"
RED = "#cf3f4d"

ROUND = (1, 2, 2.5, 5, 10)  # ticks fall on these

TITLE, PANEL, TEXT, SMALL = 13.0, 9.5, 8.0, 7.0  # points
LONGEST_NAME = 12  # letters of a person, camera or file, where there is no room for more


def new_figure(width: float, height: float, title: str, note: str) -> Figure:
    """A blank figure of `width` × `height` inches with a heading in its top left corner."""
    # The layout does not see the heading, so its room is taken off first.
    rect = (0, 0, 1, 1 - 0.66 / height)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.03, hspace=0.05, rect=rect)
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER, layout=layout)
    heading(figure, title, note, left=0.14, top=0.17)
    return figure


def heading(figure: Figure, title: str, note: str, left: float, top: float) -> None:
    """Write a title and a line under it, `left` and `top` inches from the top left corner."""
    width, height = figure.get_size_inches()
    x, y = left / width, 1 - top / height
    figure.text(x, y, title, va="top", size=TITLE, weight="bold", color=INK)
    figure.text(x, y - 0.27 / height, note, va="top", size=TEXT + 0.5, color=MUTED)


def shorten(name: str, most: float = LONGEST_NAME) -> str:
    """Cut letters out of the middle: the ends tell files, people and cameras apart."""
    if len(name) <= most:
        return name
    kept = int(most) - 1
    return f"{name[: kept // 2]}…{name[-(kept - kept // 2) :]}"


def panel(axes: Axes, title: str, note: str = "", x: str = "", y: str = "") -> None:
    """Give axes the common look, with `title` and `note` above and `x` and `y` as axis labels."""
    axes.set_title(title, loc="left", size=PANEL, weight="bold", color=INK, pad=8)
    axes.set_title(note, loc="right", size=TEXT, color=MUTED, pad=8)
    axes.set_xlabel(x, size=TEXT, color=MUTED)
    axes.set_ylabel(y, size=TEXT, color=MUTED)
    axes.tick_params(which="both", length=0, pad=5, labelsize=SMALL, labelcolor=MUTED)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def time_axis(axes: Axes, time: np.ndarray, ticks: int = 6) -> None:
    """Fit the x axis to `time`, whole steps or epochs, with thousands separated."""
    low, high = float(time.min()), float(time.max())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if low == high:
        axes.set_xlim(low - 1, high + 1)
        axes.set_xticks([low])
        return
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True, steps=ROUND))


def value_axis(axes: Axes) -> None:
    """Give the y axis few round ticks with plain numbers."""
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
    axes.yaxis.set_major_formatter(FuncFormatter(plain))


def log_axis(axis: XAxis | YAxis, low: float, high: float) -> None:
    """Make an axis logarithmic, with ticks for what is between `low` and `high`."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    # Over few decades, powers of ten would give only one or two ticks.
    subs = (1.0, 2.0, 5.0) if high / low < 100 else (1.0, 3.0) if high / low < 1000 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def plain(value: float, _: int | None = None) -> str:
    """A tick's number, without trailing zeros and with a real minus sign."""
    return f"{value:,.7g}".replace("-", "−")


def number(value: float) -> str:
    """0.0002 as 2·10⁻⁴; numbers from 0.01 to 10,000 without a power; three or four digits."""
    if value == 0 or 0.01 <= abs(value) < 10_000:
        return f"{value:,.4g}".replace("-", "−")
    mantissa, exponent = f"{value:.2e}".split("e")
    power = f"10{superscript(int(exponent))}"
    return power if mantissa == "1.00" else f"{float(mantissa):g}·{power}".replace("-", "−")


def superscript(exponent: int) -> str:
    """An exponent in small raised digits."""
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def count(number: int, noun: str) -> str:
    """`1 step`, `2,000 steps`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def blank(axes: Axes, message: str) -> None:
    """Write in the middle of empty axes why nothing is drawn."""
    middle = {"ha": "center", "va": "center", "transform": axes.transAxes}
    axes.text(0.5, 0.5, message, size=TEXT, color=MUTED, **middle)
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Move labels apart until neighbours are `gap` away, each as little as possible.

    Once the gaps are taken off, this is isotonic regression. The gap shrinks if the labels do not
    fit between `low` and `high` otherwise.
    """
    if not len(wanted):
        return np.empty(0)
    order = np.argsort(wanted, kind="stable")
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    gaps = gap * np.arange(len(wanted))
    free = isotonic_regression(np.asarray(wanted, dtype=np.float64)[order] - gaps).x
    placed = np.empty(len(wanted))
    placed[order] = np.clip(free, low, high - gaps[-1]) + gaps
    return placed


def save(figure: Figure, path: Path) -> None:
    """Render `figure` as a PNG file."""
    with atomic_write(path) as file:
        # Without the version of matplotlib in the file, the same data gives the same bytes.
        figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
