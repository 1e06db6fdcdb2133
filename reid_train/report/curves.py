"""Draw training curves: losses, accuracy, learning rate and speed in one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from reid_train.report import style

_LOSSES = {
    "loss/cross_entropy": ("cross-entropy", style.BLUE),
    "loss/triplet": ("triplet", style.ORANGE),
    "loss/penalty": ("L2 penalty", style.PURPLE),
}
_ACCURACIES = {"rank-1": style.GREEN, "mAP": style.BLUE, "mINP": style.PURPLE}
_LINE_POINTS = 200  # of a smoothed line; more make no difference to the eye
_RAW_POINTS = 2000  # about one for each pixel


def draw_curves(path: Path, history: Mapping[str, Sequence[float] | np.ndarray]) -> None:
    """Draw losses, accuracy, learning rate and speed of a training.

    Args:
        history: arrays by name. Of length S: `step`, `loss/…`, `learning_rate`,
            `images_per_second`. Of length E: `epoch`, `mAP`,
            `rank-1`, `mINP`, fractions from 0 to 1. Any may be missing or empty. Values that are
            not finite are not drawn.
    """
    data = {name: np.asarray(values, dtype=np.float64) for name, values in history.items()}
    steps, epochs = len(data.get("step", ())), len(data.get("epoch", ()))
    note = f"{style.count(steps, 'recorded step')}, {style.count(epochs, 'evaluation')}"
    figure = style.new_figure(10, 6.6, "Training curves", note)
    panels = figure.subplots(2, 2, height_ratios=(3, 2)).flat
    for axes, draw in zip(panels, (_losses, _accuracy, _learning_rate, _speed), strict=True):
        draw(axes, data)
    figure.align_labels()
    style.save(figure, path)


def _losses(axes: Axes, data: Mapping[str, np.ndarray]) -> None:
    style.panel(axes, "Parts of the loss", "log scale", x="step", y="loss")
    ends = []
    for name in (name for name in data if name.startswith("loss/") and name != "loss/total"):
        label, colour = _LOSSES.get(name, (name.removeprefix("loss/"), style.GREEN))
        x, y = _points(data, "step", name, positive=True)
        if len(x):
            last = _smooth_line(axes, x, y, colour)
            ends.append((last, f"{label} {last:.3g}", colour))
    if not ends:
        style.blank(axes, "no loss recorded")
        return
    style.log_axis(axes.yaxis, *axes.get_ylim())
    style.time_axis(axes, data["step"])
    _label_ends(axes, ends)


def _accuracy(axes: Axes, data: Mapping[str, np.ndarray]) -> None:
    x, y = _points(data, "epoch", "mAP")
    best = len(y) - 1 - np.argmax(y[::-1]) if len(y) else 0  # of equal ones the last, which is kept
    note = f"best mAP {y[best]:.1%} at epoch {x[best]:,.0f}" if len(x) else ""
    style.panel(axes, "Accuracy", note, x="epoch", y="score (%)")
    ends = []
    for name, colour in _ACCURACIES.items():
        epoch, value = _points(data, "epoch", name)
        if len(epoch):
            dots = {"marker": "o" if len(epoch) <= 40 else None, "markersize": 3.5}
            axes.plot(epoch, 100 * value, color=colour, linewidth=1.6, clip_on=False, **dots)
            ends.append((100 * value[-1], f"{name} {value[-1]:.1%}", colour))
    if not ends:
        style.blank(axes, "no evaluation recorded")
        return
    if len(x):
        ring = {"marker": "o", "markersize": 8, "fillstyle": "none", "clip_on": False}
        axes.plot(x[best], 100 * y[best], color=style.BLUE, markeredgewidth=1.4, **ring)
    axes.set_ylim(0, min(100.0, axes.get_ylim()[1] * 1.04))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=style.ROUND))
    style.time_axis(axes, data["epoch"])
    _label_ends(axes, ends)


def _learning_rate(axes: Axes, data: Mapping[str, np.ndarray]) -> None:
    x, y = _points(data, "step", "learning_rate", positive=True)
    note = f"peak {style.number(y.max())}" if len(x) else ""
    style.panel(axes, "Learning rate", note, x="step", y="learning rate")
    if not len(x):
        style.blank(axes, "no learning rate recorded")
        return
    axes.plot(x, y, color=style.INK, linewidth=1.4, marker=_marker(x), drawstyle="steps-post")
    style.log_axis(axes.yaxis, *axes.get_ylim())
    style.time_axis(axes, data["step"])


def _speed(axes: Axes, data: Mapping[str, np.ndarray]) -> None:
    x, y = _points(data, "step", "images_per_second")
    note = f"median {np.median(y):,.4g} images/s" if len(x) else ""
    style.panel(axes, "Speed", note, x="step", y="images/s")
    if not len(x):
        style.blank(axes, "no speed recorded")
        return
    _smooth_line(axes, x, y, style.GREEN)
    axes.set_ylim(0, 1.15 * np.quantile(y, 0.99) or 1)
    style.value_axis(axes)
    style.time_axis(axes, data["step"])


def _points(
    data: Mapping[str, np.ndarray], time: str, name: str, positive: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The points of one series that can be drawn: finite, and positive on a log axis."""
    x, y = data.get(time, np.empty(0)), data.get(name, np.empty(0))
    if not len(x) or not len(y):
        return np.empty(0), np.empty(0)
    keep = np.isfinite(y) & ((y > 0) | (not positive))
    return x[keep], y[keep]


def _smooth_line(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str) -> float:
    """Draw a running median of 1/25 of the points, over the faint points; return its last value."""
    half = len(x) // 50
    centres = np.unique(np.linspace(0, len(x) - 1, min(len(x), _LINE_POINTS)).astype(int))
    line = [np.median(y[max(0, centre - half) : centre + half + 1]) for centre in centres]
    stride = max(1, len(x) // _RAW_POINTS)
    axes.plot(x[::stride], y[::stride], color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(x[centres], line, color=colour, linewidth=1.6, marker=_marker(centres))
    return float(line[-1])


def _marker(x: np.ndarray) -> str | None:
    return "o" if len(x) == 1 else None  # a line of one point cannot be seen


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write the name of each line at its right end, without overlaps."""
    to_axes = axes.transScale + axes.transLimits
    wanted = [to_axes.transform((0, value))[1] for value, _, _ in ends]
    for y, (_, label, colour) in zip(style.spread(wanted, 0.065, 0, 1), ends, strict=True):
        axes.text(
            1.035, y, label, transform=axes.transAxes, va="center", size=style.TEXT, color=colour
        )
