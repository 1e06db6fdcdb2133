"""Draw how similar pairs of images are, and the thresholds that tell people apart."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from reid_train.evaluation.thresholds import Thresholds
from reid_train.report import style


def draw_thresholds(path: Path, found: Thresholds) -> None:
    """Draw histograms of the similarities, and true accepts by the rate of false ones."""
    note = f"{found.genuine:,} pairs of one person, {found.impostors:,} of different people"
    figure = style.new_figure(10, 4.2, "Same person or not", note)
    left, right = figure.subplots(1, 2)
    _histograms(left, found)
    _roc(right, found)
    style.save(figure, path)


def _histograms(axes: Axes, found: Thresholds) -> None:
    style.panel(axes, "Similarity of pairs", "share of each kind", x="cosine similarity", y="")
    for name, shares, colour in (
        ("different people", found.impostor_bins, style.RED),
        ("one person", found.genuine_bins, style.GREEN),
    ):
        axes.stairs(shares, np.array(found.bins), color=colour, fill=True, alpha=0.35, label=name)
    top = max((*found.impostor_bins, *found.genuine_bins), default=1.0)
    for at in found.at:
        axes.axvline(at.similarity, color=style.INK, linewidth=0.8, linestyle=(0, (4, 3)))
        rate = style.number(at.false_accept_rate)
        axes.text(
            at.similarity, 1.04 * top, f" {rate}", size=style.SMALL, rotation=90, va="top",
            ha="right", color=style.INK,
        )  # fmt: skip
    axes.set_ylim(0, 1.08 * top)
    axes.set_yticks([])
    axes.legend(frameon=False, fontsize=style.TEXT, loc="upper left", labelcolor=style.INK)


def _roc(axes: Axes, found: Thresholds) -> None:
    note = "thresholds with 95 % intervals" if found.at else "too few pairs for a threshold"
    style.panel(axes, "Accepted pairs", note, x="rate of false accepts", y="true accepts (%)")
    rates, accepts = np.array(found.roc).T
    axes.plot(rates, 100 * accepts, color=style.BLUE, linewidth=1.6)
    for at in found.at:
        low, high = (100 * end for end in (at.true_accept_low, at.true_accept_high))
        rate, middle = at.false_accept_rate, 100 * at.true_accept_rate
        axes.plot([rate, rate], [low, high], color=style.BLUE, linewidth=1.2, alpha=0.6)
        axes.plot([rate], [middle], color=style.BLUE, marker="o", markersize=4)
        text = f"{middle:.1f} %\nfrom {at.similarity:.3f}"
        # The curve rises, so there is room above it on the left and below it on the right.
        below = {"xytext": (4, -4), "ha": "left", "va": "top"}
        above = {"xytext": (-4, 4), "ha": "right", "va": "bottom"}
        axes.annotate(
            text, (rate, middle), textcoords="offset points", size=style.SMALL, color=style.INK,
            **(below if middle > 50 else above),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: style.number(value)))
    axes.set_ylim(0, 104)
