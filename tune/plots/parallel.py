"""Parallel coordinates: every trial a line through what it was told, to what it reached."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from reid_train.report import style
from tune.plots.marks import COLOURS, Mark, ends, inside, name, position, scale, tick_places
from tune.space import Space

_BEND = np.linspace(0, 1, 40)


def parallel(path: Path, drawn: Sequence[Mark], space: Space) -> None:
    """Draw the finished trials' lines coloured by mAP; the stopped ones' are faint.

    Args:
        path: the PNG file to write.
        drawn: trials; those outside the space are left out.
        space: one axis for each dimension.
    """
    shown = [m for m in drawn if all(inside(d, m.values[f]) for f, d in space.items())]
    shown = [m for m in shown if m.mode == "adaptive" or "regularization.mode" in space]
    finished = sorted((m for m in shown if m.state == "finished"), key=lambda m: m.score)
    width = min(14, 3.2 + 1.9 * (len(space) + 1))
    note = f"{style.count(len(finished), 'trial')} trained to the end, best on top"
    figure = style.new_figure(width, 4.6, "From settings to mAP", note)
    axes = figure.subplots()
    if not finished:
        style.blank(axes, "no trial was trained to the end")
        style.save(figure, path)
        return
    axes.axis("off")
    axes.set_xlim(-0.25, len(space) + 0.32)
    axes.set_ylim(-0.1, 1.13)
    norm = scale(drawn)
    low, high = float(norm.vmin or 0), float(norm.vmax or 1)
    for mark in shown:
        if mark.state == "stopped":
            axes.plot(*_line(_heights(mark, space)), color=style.GRID, linewidth=1, zorder=1)
    for rank, mark in enumerate(finished):
        heights = [*_heights(mark, space), (100 * mark.score - low) / (high - low)]
        best = mark is finished[-1]
        axes.plot(
            *_line(heights),
            color=COLOURS(norm(100 * mark.score)),
            linewidth=3.0 if best else 1.6,
            zorder=3 + rank,
            solid_capstyle="round",
        )
    top = 4 + len(finished)
    for place, (field, dimension) in enumerate(space.items()):
        start, end = ends(dimension)
        ticks = [((at - start) / (end - start), text) for at, text in tick_places(dimension, 4)]
        _axis(axes, place, name(field), ticks, top)
    scores = [
        v for v in MaxNLocator(5, steps=style.ROUND).tick_values(low, high) if low <= v <= high
    ]
    ticks = [((v - low) / (high - low), style.plain(v)) for v in scores]
    _axis(axes, len(space), "mAP (%)", ticks, top)
    style.save(figure, path)


def _heights(mark: Mark, space: Space) -> list[float]:
    heights = []
    for field, dimension in space.items():
        low, high = ends(dimension)
        heights.append((position(dimension, mark.values[field]) - low) / (high - low))
    return heights


def _line(heights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Level at each axis and a cosine between: lines that meet can be told apart."""
    bend = (1 - np.cos(np.pi * _BEND)) / 2
    pairs = list(pairwise(heights))
    x = np.concatenate([place + _BEND for place in range(len(pairs))])
    y = np.concatenate([start + (end - start) * bend for start, end in pairs])
    return x, y


def _axis(
    axes: Axes, x: float, title: str, ticks: Sequence[tuple[float, str]], zorder: float
) -> None:
    axes.plot([x, x], [0, 1], color=style.MUTED, linewidth=1, zorder=zorder)
    axes.text(x, 1.07, title, ha="center", size=style.TEXT, weight="bold", color=style.INK)
    for height, text in ticks:
        axes.plot([x, x + 0.018], [height, height], color=style.MUTED, linewidth=1, zorder=zorder)
        axes.text(
            x + 0.035,
            height,
            text,
            va="center",
            size=style.SMALL,
            color=style.MUTED,
            zorder=zorder + 1,
            bbox={"facecolor": style.PAPER, "edgecolor": "none", "alpha": 0.85, "pad": 1.0},
        )
