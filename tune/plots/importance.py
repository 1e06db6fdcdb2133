"""How much each setting mattered, and how."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from reid_train.config import TrainConfig
from reid_train.report import style
from tune import searchers as proposals
from tune.plots.marks import COLOURS, Mark, fit_axis, inside, marks, name, position, scale
from tune.space import Space
from tune.store import Trial

_ACROSS = 3


def importance(path: Path, trials: Sequence[Trial], base: TrainConfig, space: Space) -> None:
    """Draw each dimension's share in the variance of mAP, and mAP over each dimension.

    Args:
        path: the PNG file to write.
        trials: all trials of the sweep.
        base: the sweep's configuration.
        space: its dimensions.
    """
    drawn = [m for m in marks(trials, base) if m.mode == "adaptive" and m.state == "finished"]
    drawn = [m for m in drawn if all(inside(d, m.values[f]) for f, d in space.items())]
    shares = proposals.importance(space, base, trials)
    fields = list(shares) or list(space)
    rows = -(-len(fields) // _ACROSS)
    bars = 0.5 + 0.3 * len(fields)
    note = f"fANOVA over {style.count(len(drawn), 'adaptive trial')} trained to the end"
    figure = style.new_figure(10, 1.2 + bars + 2.6 * rows, "What mattered", note)
    grid = figure.add_gridspec(2, 1, height_ratios=(bars, 2.6 * rows))
    _bars(figure.add_subplot(grid[0]), shares)
    panels = grid[1].subgridspec(rows, _ACROSS).subplots(squeeze=False).flat
    norm = scale(drawn)
    for place, axes in enumerate(panels):
        if place >= len(fields):
            axes.set_visible(False)
            continue
        _slice(axes, drawn, fields[place], space, norm, first=place % _ACROSS == 0)
    style.save(figure, path)


def _bars(axes: Axes, shares) -> None:
    style.panel(axes, "Share of each setting in the variance of mAP")
    if not shares:
        style.blank(axes, "at least four different results are needed")
        return
    fields = list(shares)[::-1]
    axes.grid(False)
    axes.barh(range(len(fields)), [shares[f] for f in fields], height=0.55, color=style.BLUE)
    axes.set_yticks(range(len(fields)), [name(field) for field in fields])
    axes.tick_params(axis="y", labelsize=style.TEXT, labelcolor=style.INK)
    axes.set_xlim(0, 1.08 * max(shares.values()))
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    for place, field in enumerate(fields):
        axes.text(
            shares[field],
            place,
            f"  {shares[field]:.0%}",
            va="center",
            size=style.TEXT,
            color=style.INK,
        )


def _slice(
    axes: Axes, drawn: Sequence[Mark], field: str, space: Space, norm, *, first: bool
) -> None:
    style.panel(axes, name(field), y="mAP (%)" if first else "")
    for mark in drawn:
        axes.scatter(
            position(space[field], mark.values[field]),
            100 * mark.score,
            s=42,
            color=[COLOURS(norm(100 * mark.score))],
            edgecolor=style.MUTED,
            linewidth=0.5,
            zorder=3,
        )
    fit_axis(axes, "x", space[field], ticks=4)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=style.ROUND))
    axes.yaxis.set_major_formatter(FuncFormatter(style.plain))
