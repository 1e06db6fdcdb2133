"""λ over time as a picture: by layer, each tensor against its kind, and the spread of each kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator

from reid_train.report import style as style
from reid_train.report.factor_table import checked

KINDS = {"kernel": style.BLUE, "bias": style.ORANGE, "gamma": style.GREEN, "beta": style.PURPLE}
_KIND_LABELS = {"kernel": "kernels", "bias": "biases", "gamma": "γ", "beta": "β"}
_COLUMNS = 600  # moments drawn, however many were recorded: about one a pixel
_GROUPS = 20  # most layer groups that are labelled
_CROWDED = 0.4  # share of all tensors above which a group is split into its parts


def factors(
    path: Path,
    names: Sequence[str],
    steps: Sequence[int] | np.ndarray,
    values: np.ndarray,
    *,
    kinds: Sequence[str] | None = None,
) -> None:
    """Draw λ over time by layer, each tensor against its kind, and the spread of each kind.

    Args:
        path: the PNG file to write.
        names: n tensor names in network order, such as `backbone.layer3.5.conv2.weight`.
        steps: (T,) optimizer steps, ascending.
        values: (T, n) float32, λ of each tensor at each step; a step at which one is not finite
            is left out.
        kinds: "kernel", "bias", "gamma" or "beta" for each tensor; guessed from `names` if None.

    Raises:
        ValueError: the shapes disagree, or a kind is not one of the four.
    """
    names, steps, values = checked(names, steps, values)
    finite = np.isfinite(values).all(axis=1)
    steps, values = steps[finite], values[finite]
    kind = np.asarray([kind_of(name) for name in names] if kinds is None else kinds)
    if len(kind) != len(names) or not set(kind) <= set(KINDS):
        raise ValueError(
            f"kinds must name one of {', '.join(KINDS)} for each of {len(names)} tensors"
        )
    figure = style.new_figure(10, 9.2, "λ over time", _summary(steps, values))
    if not values.size:
        style.blank(figure.subplots(), "no λ recorded")
        style.save(figure, path)
        return
    moments, sampled = _sampled(steps, values.astype(np.float64))
    exponent = math.floor(math.log10(sampled.max())) if sampled.max() > 0 else 0
    sampled /= 10.0**exponent
    unit = f"λ  (× 10{style.superscript(exponent)})" if exponent else "λ"
    present = [name for name in KINDS if (kind == name).any()]
    # With amplitudes of their own, kinds are orders of magnitude apart: one scale shows one kind.
    starts = [float(np.median(sampled[0, kind == name])) for name in present]
    apart = 0 < min(starts) < max(starts) / 20
    grid = figure.add_gridspec(2, 1, height_ratios=(5, 2))
    maps = grid[0].subgridspec(1, 2, wspace=0.06).subplots(sharey=True, squeeze=False)[0]
    bands = grid[1].subgridspec(1, len(present)).subplots(sharey=not apart, squeeze=False)[0]
    _level(maps[0], moments, sampled, unit, apart)
    _difference(maps[1], moments, sampled, kind)
    _group_labels(maps, names)
    for axes, name in zip(bands, present, strict=True):
        _band(axes, moments, sampled[:, kind == name], name, unit if axes is bands[0] else "")
    legend = "Bands: median (line), quartiles (dark), minimum to maximum (pale)"
    figure.supxlabel(legend, x=0.014, ha="left", size=style.SMALL, color=style.MUTED)
    style.save(figure, path)


def kind_of(name: str) -> str:
    """Guess a tensor's kind from its name, as torchvision and this project name layers."""
    *modules, leaf = name.split(".")
    owner = ".".join(modules[-2:])
    last = modules[-1].lower() if modules else ""
    norm = "bn" in last or "norm" in last or owner == "downsample.1"
    if leaf == "bias":
        return "beta" if norm else "bias"
    return "gamma" if norm else "kernel"


def groups(names: Sequence[str]) -> list[tuple[str, int, int]]:
    """Cut tensors into runs of one module, and cut again where a run holds too much of them.

    Returns:
        (module, first, end) for each run, in order.
    """
    modules = [name.split(".")[:-1] or [name] for name in names]
    runs = _runs(modules, 0, len(names), 1)
    while True:
        crowded = [run for run in runs if run[2] - run[1] > _CROWDED * len(names)]
        for run in crowded:
            finer = _runs(modules, run[1], run[2], run[0].count(".") + 2)
            if finer != [run] and len(runs) + len(finer) - 1 <= _GROUPS:
                at = runs.index(run)
                runs[at : at + 1] = finer
                break
        else:
            return runs


def _runs(
    modules: Sequence[Sequence[str]], first: int, end: int, depth: int
) -> list[tuple[str, int, int]]:
    """Neighbours whose modules have the same first `depth` parts."""
    runs: list[tuple[str, int, int]] = []
    for i in range(first, end):
        label = ".".join(modules[i][:depth])
        if runs and runs[-1][0] == label:
            runs[-1] = (label, runs[-1][1], i + 1)
        else:
            runs.append((label, i, i + 1))
    return runs


def _summary(steps: np.ndarray, values: np.ndarray) -> str:
    if not values.size:
        return ""
    tensors = style.count(values.shape[1], "tensor")
    recorded = style.count(len(steps), "recorded step")
    first, last = float(np.median(values[0])), float(np.median(values[-1]))
    change = f" ({style.plain(float(f'{100 * (last / first - 1):.3g}'))}%)" if first > 0 else ""
    return (
        f"{tensors}, {recorded}; "
        f"the median went from {style.number(first)} to {style.number(last)}{change}"
    )


def _sampled(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Interpolate onto evenly spaced moments, since steps need not be and pictures are."""
    if len(steps) == 1:
        steps, values = np.array([steps[0] - 1, steps[0] + 1]), np.repeat(values, 2, axis=0)
    moments = np.linspace(steps[0], steps[-1], _COLUMNS)
    return moments, np.stack([np.interp(moments, steps, column) for column in values.T], axis=1)


def _level(axes: Axes, moments: np.ndarray, values: np.ndarray, unit: str, apart: bool) -> None:
    low, high = float(values.min()), float(values.max())
    if apart:
        norm = LogNorm(max(float(values[values > 0].min()), high * 1e-4), high, clip=True)
    else:
        # A range under a thousandth is next to no change, and must not look like a great one.
        room = max(1e-3 * (high or 1.0) - (high - low), 0.0) / 2
        norm = Normalize(low - room, high + room)
    style.panel(axes, "λ by layer", x="step")
    _colour_bar(axes, _image(axes, moments, values, "viridis", norm), unit)


def _difference(axes: Axes, moments: np.ndarray, values: np.ndarray, kind: np.ndarray) -> None:
    """Tensors decay together; the difference to the median of a tensor's kind sets them apart."""
    percent = np.zeros_like(values)
    for name in np.unique(kind):
        member = kind == name
        median = np.median(values[:, member], axis=1, keepdims=True)
        safe = np.where(median > 0, median, 1.0)
        percent[:, member] = np.where(median > 0, 100 * (values[:, member] / safe - 1), 0.0)
    # Under a tenth of a per cent is noise; a single stray tensor must not flatten the rest.
    limit = max(0.1, float(np.quantile(np.abs(percent), 0.995)))
    style.panel(axes, "Difference to the median of its kind", x="step")
    _colour_bar(axes, _image(axes, moments, percent, "RdBu_r", Normalize(-limit, limit)), "%")


def _image(
    axes: Axes, moments: np.ndarray, values: np.ndarray, colours: str, norm: Normalize
) -> AxesImage:
    extent = (moments[0], moments[-1], values.shape[1], 0)
    image = axes.imshow(
        values.T, cmap=colours, norm=norm, extent=extent, aspect="auto", interpolation="nearest"
    )
    style.time_axis(axes, moments, ticks=4)
    axes.grid(False)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return image


def _colour_bar(axes: Axes, image: AxesImage, label: str) -> None:
    """A colour bar exactly as high as its map."""
    beside = axes.inset_axes((1.03, 0, 0.035, 1))
    figure = axes.get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(image, cax=beside, format=FuncFormatter(style.plain))
    if not isinstance(image.norm, LogNorm):
        bar.locator = MaxNLocator(7, steps=style.ROUND)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.minorticks_off()
    beside.tick_params(length=0, labelsize=style.SMALL, labelcolor=style.MUTED)
    beside.set_title(label, loc="left", size=style.TEXT, color=style.MUTED, pad=8)


def _group_labels(maps: np.ndarray, names: Sequence[str]) -> None:
    """Name each stage beside its rows, with a bracket, and rule the maps between stages."""
    rows, runs = len(names), groups(names)
    for axes, colour in zip(maps, (style.PAPER, style.FAINT), strict=True):
        for _, first, _ in runs[1:]:
            axes.axhline(first, color=colour, linewidth=0.9)
    left = maps[0]
    across = left.get_yaxis_transform()
    line = {"transform": across, "color": style.FAINT, "linewidth": 1.0, "clip_on": False}
    # A model of very many small modules: name the largest, rule them all.
    runs = sorted(runs, key=lambda run: run[1] - run[2])[: 2 * _GROUPS]
    middles = [(first + end) / 2 for _, first, end in runs]
    places = style.spread(middles, 0.03 * rows, 0.01 * rows, 0.99 * rows)
    for (label, first, end), middle, place in zip(runs, middles, places, strict=True):
        inset = min(0.25 * (end - first), 0.003 * rows)
        left.plot([-0.015, -0.015], [first + inset, end - inset], **line)
        left.plot([-0.015, -0.055, -0.07], [middle, place, place], **line)
        short = label if len(label) <= 24 else "…" + label[-23:]
        text = {"ha": "right", "va": "center_baseline", "size": style.SMALL, "color": style.INK}
        left.text(-0.085, place, short, transform=across, **text)


def _band(axes: Axes, moments: np.ndarray, values: np.ndarray, kind: str, unit: str) -> None:
    low, quarter, median, three, high = np.quantile(values, (0, 0.25, 0.5, 0.75, 1), axis=1)
    style.panel(axes, _KIND_LABELS[kind], style.count(values.shape[1], "tensor"), x="step", y=unit)
    colour = KINDS[kind]
    axes.fill_between(moments, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.fill_between(moments, quarter, three, color=colour, alpha=0.35, linewidth=0)
    axes.plot(moments, median, color=colour, linewidth=1.6)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=style.ROUND))
    axes.yaxis.set_major_formatter(FuncFormatter(style.plain))
    style.time_axis(axes, moments, ticks=4)
