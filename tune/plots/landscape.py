"""mAP over amplitude and learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from reid_train.report import style
from tune.plots.marks import COLOURS, Mark, colour_bar, fit_axis, inside, name, position, scale
from tune.space import AMPLITUDE, LEARNING_RATE, Choice, Space

_HALO = [withStroke(linewidth=3, foreground=style.PAPER)]


def landscape(path: Path, drawn: Sequence[Mark], space: Space) -> None:
    """Draw every adaptive trial at its learning rate and amplitude, coloured by its mAP.

    Args:
        path: the PNG file to write.
        drawn: trials; what has no place in the picture is marked on the scale beside it.
        space: gives the axes; two other dimensions are taken where these are not searched.
    """
    axes_of = [field for field in (LEARNING_RATE, AMPLITUDE) if field in space]
    axes_of += [f for f, d in space.items() if f not in axes_of and not isinstance(d, Choice)]
    shown = [mark for mark in drawn if mark.mode == "adaptive"]
    finished = [mark for mark in shown if mark.state == "finished"]
    counts = [
        style.count(len(finished), "adaptive trial") + " trained to the end",
        f"{sum(m.state == 'stopped' for m in shown)} stopped early",
        f"{sum(m.state == 'failed' for m in shown)} failed",
    ]
    if len(axes_of) < 2:
        figure = style.new_figure(8.4, 6, "mAP over what was searched", ", ".join(counts))
        style.blank(figure.subplots(), "one dimension was searched: see its own picture")
        style.save(figure, path)
        return
    across, up = axes_of[:2]
    title = f"mAP over {name(up)} and {name(across)}"
    figure = style.new_figure(8.4, 6, title, ", ".join(counts))
    axes = figure.subplots()
    style.panel(axes, "", x=name(across), y=name(up))
    axes.grid(axis="both", color=style.GRID, linewidth=0.8)
    axes.spines["bottom"].set_visible(False)
    placed = [m for m in shown if all(inside(space[f], m.values[f]) for f in (across, up))]
    norm = scale(drawn)
    where = {
        id(mark): (
            position(space[across], mark.values[across]),
            position(space[up], mark.values[up]),
        )
        for mark in placed
    }
    for mark in sorted(placed, key=lambda m: (m.state == "finished", m.score)):
        x, y = where[id(mark)]
        if mark.state == "finished":
            colour = COLOURS(norm(100 * mark.score))
            axes.scatter(
                x, y, s=130, color=[colour], edgecolor=style.PAPER, linewidth=1.2, zorder=4
            )
        elif mark.state == "stopped":
            axes.scatter(
                x, y, s=38, facecolor=style.PAPER, edgecolor=style.FAINT, linewidth=1.2, zorder=3
            )
        else:
            axes.scatter(x, y, s=38, marker="x", color=style.RED, linewidth=1.4, zorder=3)
    fit_axis(axes, "x", space[across])
    fit_axis(axes, "y", space[up])
    best = max((m for m in placed if m.state == "finished"), key=lambda m: m.score, default=None)
    if best is not None:
        _point_out(axes, *where[id(best)], f"best {100 * best.score:.1f}%", style.INK, 1)
    for mark in placed:
        if mark.label and mark is not best:
            text = f"{mark.label} {100 * mark.score:.1f}%"
            _point_out(axes, *where[id(mark)], text, style.ORANGE, -1)
    references = [m for m in drawn if m.state == "finished" and m.label and m not in placed]
    colour_bar(figure, axes, norm, references)
    legend = "Large dots: trained to the end. Rings: stopped early."
    if any(m.state == "failed" for m in placed):
        legend += " Crosses: failed."
    figure.supxlabel(legend, x=0.014, ha="left", size=style.SMALL, color=style.MUTED)
    style.save(figure, path)


def _point_out(axes: Axes, x: float, y: float, text: str, colour: str, side: int) -> None:
    """A ring around a dot, and a word above (`side` 1) or below it (-1)."""
    axes.scatter(x, y, s=290, facecolor="none", edgecolor=colour, linewidth=1.5, zorder=5)
    axes.annotate(
        text,
        (x, y),
        xytext=(0, 13 * side),
        textcoords="offset points",
        ha="center",
        va="bottom" if side > 0 else "top",
        size=style.TEXT,
        weight="bold",
        color=colour,
        zorder=6,
        path_effects=_HALO,
    )
