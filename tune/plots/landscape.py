"""mAP over amplitude and learning rate."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator
from optuna.distributions import CategoricalDistribution, IntDistribution

from reid_train.config import TrainConfig
from reid_train.report import style
from tune.results import Entry, too_few
from tune.space import AMPLITUDE, LEARNING_RATE, MODE, Space, inside
from tune.store import Trial

# Dark where mAP is high: the best stand out on white paper.
COLOURS: Colormap = LinearSegmentedColormap.from_list(
    "score", ["#d3dfe8", "#a9cbd2", "#6fb0b5", "#2f7f98", "#1d4e7f", "#17264d"]
)
NAMES = {
    AMPLITUDE: "amplitude A",
    "regularization.theta_lr_multiplier": "θ multiplier",
    "regularization.saturation": "saturation c",
}
HALO = [withStroke(linewidth=3, foreground=style.PAPER)]


def name(field: str) -> str:
    """A field in words."""
    return NAMES.get(field, field.rpartition(".")[2].replace("_", " "))


def percents(entries: Sequence[Entry]) -> dict[int, float]:
    """mAP in percent by a trial's number, as the ranking has it: a mean where it was repeated."""
    return {e.trial.number: 100 * e.mean for e in entries if e.mode != "held"}


def landscape(
    path: Path,
    trials: Sequence[Trial],
    entries: Sequence[Entry],
    base: TrainConfig,
    space: Space,
) -> bool:
    """Draw every adaptive trial at its learning rate and amplitude, coloured by its mAP.

    Other ranges are taken where these are not searched. A baseline without a place in the picture
    is marked on the scale. Returns whether it was drawn: it needs two ranges.
    """
    ranges = [field for field, d in space.items() if not isinstance(d, CategoricalDistribution)]
    wanted = [field for field in (LEARNING_RATE, AMPLITUDE) if field in ranges]
    wanted += [field for field in ranges if field not in wanted]
    if len(wanted) < 2:
        return False
    across, up = wanted[:2]
    searched = [trial for trial in trials if trial.repeats is None]
    # Not `trial.config`: the values of a trial that failed may not be a valid configuration.
    values: dict[int, dict[str, Any]] = {t.number: base.flat() | t.values for t in searched}
    shown = [trial for trial in searched if values[trial.number][MODE] == "adaptive"]
    scores = percents(entries)
    states = [trial.state for trial in shown]
    note = (
        f"{style.count(states.count('finished'), 'adaptive trial')} trained to the end, "
        f"{states.count('stopped')} stopped early, {states.count('failed')} failed"
    )
    if any(entry.repeats for entry in entries):
        note += "; repeated ones by the mean of their fresh seeds"
    figure = style.new_figure(8.4, 6, f"mAP over {name(up)} and {name(across)}", note)
    axes = figure.subplots()
    style.panel(axes, "", x=name(across), y=name(up))
    axes.grid(axis="both", color=style.GRID, linewidth=0.8)
    axes.spines["bottom"].set_visible(False)
    low, high = (min(scores.values()), max(scores.values())) if scores else (0.0, 100.0)
    room = max(0.0, 0.2 - (high - low)) / 2
    norm = Normalize(low - room, high + room)
    places: dict[int, tuple[float, float]] = {}
    for trial in shown:
        x, y = values[trial.number][across], values[trial.number][up]
        if inside(x, space[across]) and inside(y, space[up]):
            places[trial.number] = x, y
            _dot(axes, *places[trial.number], trial.state, scores.get(trial.number), norm)
    _fit(axes.xaxis, space[across])
    _fit(axes.yaxis, space[up])
    placed = [entry.trial for entry in entries if entry.trial.number in places]
    for trial in placed:
        first = trial is placed[0]
        text = trial.label or trial.name
        if trial is entries[0].trial and not too_few(entries):
            text = "best"
        if first or trial.label:
            colour, side = (style.INK, 1) if first else (style.ORANGE, -1)
            text = f"{text} {scores[trial.number]:.1f}%"
            _point_out(axes, *places[trial.number], text, colour, side)
    others = [t for t in searched if t.label and t.number in scores and t.number not in places]
    _colour_bar(figure, axes, norm, {t.label: scores[t.number] for t in others})
    legend = "Large dots: trained to the end. Rings: stopped early. Crosses: failed."
    figure.supxlabel(legend, x=0.014, ha="left", size=style.SMALL, color=style.MUTED)
    style.save(figure, path)
    return True


def _dot(axes: Axes, x: float, y: float, state: str, score: float | None, norm: Normalize) -> None:
    if score is not None:
        colour, above = COLOURS(norm(score)), 4 + score / 100  # the best on top
        axes.scatter(*(x, y), s=130, color=[colour], edgecolor=style.PAPER, zorder=above)
    elif state == "stopped":
        axes.scatter(x, y, s=38, facecolor=style.PAPER, edgecolor=style.FAINT, zorder=3)
    else:
        axes.scatter(x, y, s=38, marker="x", color=style.RED, zorder=3)


def _point_out(axes: Axes, x: float, y: float, text: str, colour: str, side: int) -> None:
    """A ring around a dot, and a word above (`side` 1) or below it (-1)."""
    axes.scatter(x, y, s=290, facecolor="none", edgecolor=colour, linewidth=1.5, zorder=5)
    place = {"xytext": (0, 13 * side), "textcoords": "offset points", "ha": "center"}
    look = {"size": style.TEXT, "weight": "bold", "color": colour, "path_effects": HALO}
    va = "bottom" if side > 0 else "top"
    axes.annotate(text, (x, y), va=va, zorder=6, **place, **look)


def _colour_bar(
    figure: Figure, axes: Axes, norm: Normalize, baselines: Mapping[str, float]
) -> None:
    """A bar of mAP beside the axes, with the baselines' scores marked on it."""
    beside = axes.inset_axes((1.035, 0, 0.03, 1))
    ticks = {"ticks": MaxNLocator(6, steps=style.ROUND), "format": FuncFormatter(style.plain)}
    bar = figure.colorbar(ScalarMappable(norm, COLOURS), cax=beside, **ticks)
    bar.outline.set_visible(False)  # type: ignore[operator]
    beside.tick_params(length=0, labelsize=style.SMALL, labelcolor=style.MUTED)
    beside.set_title("mAP (%)", loc="left", size=style.TEXT, color=style.MUTED, pad=8)
    heights = [float(norm(score)) for score in baselines.values()]
    line = {"transform": axes.transAxes, "color": style.ORANGE, "clip_on": False}
    places = style.spread(heights, 0.05, 0, 1)
    for label, height, place in zip(baselines, heights, places, strict=True):
        axes.plot([1.035, 1.065], [height, height], linewidth=1.6, **line)
        axes.plot([1.12, 1.135, 1.15], [height, place, place], linewidth=0.8, **line)
        text = {"transform": axes.transAxes, "color": style.ORANGE, "va": "center"}
        axes.text(1.155, place, label, size=style.SMALL, **text)


def _fit(axis: XAxis | YAxis, dimension: Any) -> None:
    """Give an axis the limits, the scale and the ticks of a range."""
    low, high = dimension.low, dimension.high
    if dimension.log:
        room = (high / low) ** 0.04
        limits = (low / room, high * room)
        style.log_axis(axis, low, high)
    else:
        room = 0.04 * (high - low)
        limits = (low - room, high + room)
        integer = isinstance(dimension, IntDistribution)
        axis.set_major_locator(MaxNLocator(5, steps=style.ROUND, integer=integer))
        axis.set_major_formatter(FuncFormatter(lambda value, _: style.number(value)))
    axis.axes.set(**{f"{axis.axis_name}lim": limits})
