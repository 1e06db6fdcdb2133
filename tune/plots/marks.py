"""What the pictures share: trials as marks, one colour scale of mAP, axes of a dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from reid_train.config import TrainConfig
from reid_train.report import style
from tune.space import Choice, Dimension, Real, Value
from tune.store import State, Trial

# Dark where mAP is high: the best stand out on white paper.
COLOURS: Colormap = LinearSegmentedColormap.from_list(
    "score", ["#d3dfe8", "#a9cbd2", "#6fb0b5", "#2f7f98", "#1d4e7f", "#17264d"]
)
NAMES = {
    "regularization.amplitude": "amplitude A",
    "regularization.theta_lr_multiplier": "θ learning-rate multiplier",
    "regularization.saturation": "saturation c",
    "optimizer.learning_rate": "learning rate",
}


@dataclass(frozen=True)
class Mark:
    """A trial as it is drawn: `values` holds every field of its configuration."""

    trial: Trial
    values: dict[str, Value]
    score: float
    state: State
    mode: str

    @property
    def label(self) -> str:
        return self.trial.label


def marks(trials: Sequence[Trial], base: TrainConfig) -> list[Mark]:
    """The search's trials; repeats with other seeds are left out."""
    found = []
    for trial in trials:
        if trial.repeats is None:
            config = trial.config(base)
            values: dict[str, Value] = config.flat()  # type: ignore[assignment]
            mode = config.regularization.mode
            found.append(Mark(trial, values, trial.score, trial.state, mode))
    return found


def scale(drawn: Sequence[Mark]) -> Normalize:
    """One colour scale for all trials that came to their end."""
    scores = [100 * mark.score for mark in drawn if mark.state == "finished"] or [0.0, 100.0]
    room = max(0.0, 0.2 - (max(scores) - min(scores))) / 2
    return Normalize(min(scores) - room, max(scores) + room)


def colour_bar(figure: Figure, axes: Axes, norm: Normalize, references: Sequence[Mark]) -> None:
    """A bar of mAP beside axes, with the references' scores marked on it."""
    beside = axes.inset_axes((1.035, 0, 0.03, 1))
    bar = figure.colorbar(ScalarMappable(norm, COLOURS), cax=beside)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.locator = MaxNLocator(6, steps=style.ROUND)
    bar.formatter = FuncFormatter(style.plain)
    bar.update_ticks()
    beside.tick_params(length=0, labelsize=style.SMALL, labelcolor=style.MUTED)
    beside.set_title("mAP (%)", loc="left", size=style.TEXT, color=style.MUTED, pad=8)
    if not references:
        return
    low, high = float(norm.vmin or 0), float(norm.vmax or 1)
    heights = [(100 * mark.score - low) / (high - low) for mark in references]
    for mark, height, place in zip(
        references, heights, style.spread(heights, 0.05, 0, 1), strict=True
    ):
        line = {"transform": axes.transAxes, "color": style.ORANGE, "clip_on": False}
        axes.plot([1.035, 1.065], [height, height], linewidth=1.6, **line)
        axes.plot([1.12, 1.135, 1.15], [height, place, place], linewidth=0.8, **line)
        axes.text(
            1.155,
            place,
            mark.label,
            transform=axes.transAxes,
            va="center",
            size=style.SMALL,
            color=style.ORANGE,
        )


def name(field: str) -> str:
    """A field in words."""
    return NAMES.get(field, field.rpartition(".")[2].replace("_", " "))


def position(dimension: Dimension, value: Value) -> float:
    """A value on a linear axis: its logarithm where the range is logarithmic, a choice's place."""
    if isinstance(dimension, Choice):
        return float(dimension.values.index(value))
    assert isinstance(value, (int, float))
    return float(np.log10(value)) if isinstance(dimension, Real) and dimension.log else float(value)


def inside(dimension: Dimension, value: Value) -> bool:
    """Whether a value can be drawn on the dimension's axis."""
    if isinstance(dimension, Choice):
        return value in dimension.values
    return isinstance(value, (int, float)) and dimension.low <= value <= dimension.high


def ends(dimension: Dimension) -> tuple[float, float]:
    """The axis's limits, as `position` has them."""
    if isinstance(dimension, Choice):
        return -0.3, len(dimension.values) - 0.7
    return position(dimension, dimension.low), position(dimension, dimension.high)


def fit_axis(axes: Axes, which: str, dimension: Dimension, ticks: int = 5) -> None:
    """Ticks and limits of an axis on which `position` gives the places."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = ends(dimension)
    margin = 0.04 * (high - low)
    (axes.set_xlim if which == "x" else axes.set_ylim)(low - margin, high + margin)
    places = tick_places(dimension, ticks)
    axis.set_major_locator(FixedLocator([place for place, _ in places]))
    axis.set_minor_locator(NullLocator())
    texts = dict(places)
    axis.set_major_formatter(
        FuncFormatter(lambda place, _: texts[min(texts, key=lambda known: abs(known - place))])
    )


def tick_places(dimension: Dimension, ticks: int = 5) -> list[tuple[float, str]]:
    """Places on the axis and what stands beside them."""
    if isinstance(dimension, Choice):
        return [(float(i), str(value)) for i, value in enumerate(dimension.values)]
    low, high = dimension.low, dimension.high
    if isinstance(dimension, Real) and dimension.log:
        subs = (1.0, 2.0, 5.0) if high / low < 30 else (1.0, 3.0) if high / low < 1000 else (1.0,)
        found = LogLocator(subs=subs, numticks=20).tick_values(low, high)
    else:
        whole = not isinstance(dimension, Real)
        found = MaxNLocator(ticks, steps=style.ROUND, integer=whole).tick_values(low, high)
    slack = 1e-9 * abs(high)
    kept = [float(v) for v in found if low - slack <= v <= high + slack]
    return [(position(dimension, v), style.number(v)) for v in kept]
