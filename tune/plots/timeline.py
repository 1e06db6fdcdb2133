"""Which trials were stopped when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.ticker import MaxNLocator

from reid_train.report import style
from tune.console import describe
from tune.plots.marks import COLOURS, Mark, scale
from tune.store import HELD, Trial

_MOST = 60
"""Trials drawn; of more, the first are the ones."""


def timeline(path: Path, trials: Sequence[Trial], epochs: int) -> None:
    """Draw each trial's evaluations over the epochs, and how it ended.

    Args:
        path: the PNG file to write.
        trials: all trials, repeats too.
        epochs: of a whole training.
    """
    shown = list(trials)[:_MOST]
    spent = sum(trial.epoch for trial in shown)
    whole = epochs * len(shown)
    note = f"{spent:,} of {whole:,} epochs trained"
    if spent < whole:
        note += f": stopping early saved {1 - spent / whole:.0%}"
    height = 1.5 + 0.235 * len(shown)
    figure = style.new_figure(10, height, "Which trials were stopped when", note)
    axes = figure.subplots()
    style.panel(axes, "", x="epoch")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=style.GRID, linewidth=0.8)
    norm = scale([Mark(t, {}, e["mAP"], "finished", "") for t in shown for e in t.evaluations])
    for row, trial in enumerate(shown):
        end = trial.epoch
        axes.plot([0, end], [row, row], color=style.GRID, linewidth=5, zorder=1)
        for evaluation in trial.evaluations:
            axes.scatter(
                evaluation["epoch"],
                row,
                s=44,
                color=[COLOURS(norm(100 * evaluation["mAP"]))],
                edgecolor=style.MUTED,
                linewidth=0.4,
                zorder=3,
                clip_on=False,
            )
        if trial.state in ("stopped", "failed"):
            colour = style.ORANGE if trial.state == "stopped" else style.RED
            mark = {"stopped": "|", "failed": "x"}[trial.state]
            room = 0.014 * epochs
            axes.scatter(
                end + room, row, s=60, marker=mark, color=colour, linewidth=1.8, clip_on=False
            )
        axes.text(
            1.02,
            row,
            _remark(trial),
            transform=axes.get_yaxis_transform(),
            va="center",
            size=style.SMALL,
            color=style.INK if trial.state == "finished" else style.MUTED,
        )
    axes.set_yticks(range(len(shown)), [trial.name for trial in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, epochs)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=style.ROUND))
    style.save(figure, path)


def _remark(trial: Trial) -> str:
    score = f"{100 * trial.score:.1f}%  " if trial.evaluations else ""
    if trial.state == "failed":
        text = f"failed: {trial.reason}"
    else:
        text = trial.label or describe(trial.values)
        if trial.repeats is not None:
            text = f"seed {trial.seed} of trial-{trial.repeats:03d}"
            text += f", {HELD}" if trial.label == HELD else ""
    text = score + text
    return text if len(text) <= 62 else f"{text[:61]}…"
