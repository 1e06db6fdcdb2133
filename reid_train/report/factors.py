"""λ over time: as a picture, and as a table in a file."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from data_shards.storage.atomic import atomic_write
from reid_train.report import style

KINDS = {"kernel": style.BLUE, "bias": style.ORANGE, "gamma": style.GREEN, "beta": style.PURPLE}
_KIND_LABELS = {"kernel": "kernels", "bias": "biases", "gamma": "γ", "beta": "β"}
_COLUMNS = 600  # moments that are drawn: about one for each pixel
_GROUPS = 20  # into which a group may be split
_CROWDED = 0.4  # share of all tensors above which a group is split into its parts
_STILL = 1e-4  # relative change below which there is nothing to see
_SMALL = 0.02  # relative change below which ticks of λ itself would look equal


def save_factors(path: Path, names: Sequence[str], steps: np.ndarray, values: np.ndarray) -> None:
    """Write λ over time as Parquet: a column `step`, then one column for each tensor."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    _require_shape(names, steps, values)
    table = pa.table([pa.array(column) for column in (steps, *values.T)], names=["step", *names])
    # λ moves slowly. Split into planes of bytes, all but its last bytes compress to almost nothing.
    split: Any = {"use_dictionary": False, "use_byte_stream_split": True}
    with atomic_write(path) as file:
        pq.write_table(table, file, compression="zstd", write_statistics=False, **split)


def draw_factors(
    path: Path, names: Sequence[str], steps: np.ndarray, values: np.ndarray, *, kinds: Sequence[str]
) -> None:
    """Draw λ by layer, each tensor against its kind, and the spread of each kind.

    A small change is drawn in per cent of the first step. If λ has hardly moved, the picture is one
    sentence.

    Args:
        names: n tensor names in network order, such as `backbone.layer3.5.conv2.weight`.
        steps: (T,) int64, ascending optimizer steps.
        values: (T, n) float32, λ of each tensor at each step. Steps with a value that is not
            finite are not drawn.
        kinds: "kernel", "bias", "gamma" or "beta" for each tensor.
    """
    _require_shape(names, steps, values)
    kind = np.asarray(kinds)
    if len(kind) != len(names) or not set(kinds) <= set(KINDS):
        raise ValueError(
            f"kinds must name one of {', '.join(KINDS)} for each of {len(names)} tensors"
        )
    finite = np.isfinite(values).all(axis=1)
    steps, values = steps[finite], values[finite].astype(np.float64)
    if sentence := without_movement(steps, values):
        figure = style.new_figure(10, 0.8, "λ over time", sentence)
    else:
        figure = style.new_figure(10, 9.2, "λ over time", _summary(steps, values))
        _fill(figure, names, steps, values, kind)
    style.save(figure, path)


def without_movement(steps: np.ndarray, values: np.ndarray) -> str | None:
    """Say it in a sentence if λ has no movement to draw; None if it has. Shapes (T,) and (T, n)."""
    if not values.size:
        return "no λ was recorded"
    low, high = style.number(float(values.min())), style.number(float(values.max()))
    where = f"it is {low} for every tensor" if low == high else f"it is between {low} and {high}"
    if len(steps) == 1:
        return f"λ was recorded at one step only, step {steps[0]:,}: {where}"
    largest = float(np.abs(_change(values)).max())
    if largest >= _STILL:
        return None
    amount = f"changed by at most {style.number(100 * largest)}%" if largest else "did not change"
    return f"λ {amount} over {len(steps):,} recorded steps: {where}"


def _change(values: np.ndarray) -> np.ndarray:
    """(T, n), the change of each tensor since the first step, as a fraction."""
    from_zero = np.where(values == 0, 1.0, np.inf)
    return np.divide(values, values[0], out=from_zero, where=values[0] > 0) - 1


def _summary(steps: np.ndarray, values: np.ndarray) -> str:
    tensors = style.count(values.shape[1], "tensor")
    recorded = style.count(len(steps), "recorded step")
    first, last = float(np.median(values[0])), float(np.median(values[-1]))
    change = f" ({style.plain(float(f'{100 * (last / first - 1):.3g}'))}%)" if first > 0 else ""
    before, after = style.number(first), style.number(last)
    moved = f"was {before} at first" if before == after else f"went from {before} to {after}"
    return f"{tensors}, {recorded}; the median {moved}{change}"


def _fill(
    figure: Figure, names: Sequence[str], steps: np.ndarray, values: np.ndarray, kind: np.ndarray
) -> None:
    # Steps need not be evenly spaced, but the columns of a picture are.
    moments = np.linspace(steps[0], steps[-1], _COLUMNS)
    values = np.stack([np.interp(moments, steps, column) for column in values.T], axis=1)
    change = _change(values)
    if np.abs(change).max() < _SMALL:
        title, unit, shown = f"Change of λ since step {steps[0]:,}", "%", 100 * change
    else:
        exponent = math.floor(math.log10(values.max()))
        unit = f"λ  (× 10{style.superscript(exponent)})" if exponent else "λ"
        title, shown = "λ by layer", values / 10.0**exponent
    present = [name for name in KINDS if (kind == name).any()]
    # If each kind has its own amplitude, kinds differ by orders of magnitude: one scale would show
    # only one kind.
    starts = [float(np.median(shown[0, kind == name])) for name in present]
    apart = 0 < min(starts) < max(starts) / 20
    grid = figure.add_gridspec(2, 1, height_ratios=(5, 2))
    maps = grid[0].subgridspec(1, 2, wspace=0.06).subplots(sharey=True, squeeze=False)[0]
    bands = grid[1].subgridspec(1, len(present)).subplots(sharey=not apart, squeeze=False)[0]
    low, high = float(shown.min()), float(shown.max())
    norm = Normalize(low, high)
    if apart:
        norm = LogNorm(max(float(shown[shown > 0].min()), high * 1e-4), high, clip=True)
    style.panel(maps[0], title, x="step")
    _map(maps[0], moments, shown, "viridis", norm, unit)
    percent = _difference(values, kind)
    # One tensor that is far off must not flatten the rest.
    limit = max(100 * _STILL, float(np.quantile(np.abs(percent), 0.995)))
    style.panel(maps[1], "Difference to the median of its kind", x="step")
    _map(maps[1], moments, percent, "RdBu_r", Normalize(-limit, limit), "%")
    _group_labels(maps, names)
    for axes, name in zip(bands, present, strict=True):
        _band(axes, moments, shown[:, kind == name], name, unit if axes is bands[0] else "")
    legend = "Bands: median (line), quartiles (dark), minimum to maximum (pale)"
    figure.supxlabel(legend, x=0.014, ha="left", size=style.SMALL, color=style.MUTED)


def _difference(values: np.ndarray, kind: np.ndarray) -> np.ndarray:
    """(T, n), the difference of each tensor to the median of its kind, in per cent."""
    medians = np.empty_like(values)
    for name in np.unique(kind):
        member = kind == name
        medians[:, member] = np.median(values[:, member], axis=1, keepdims=True)
    # Where the median is 0, the difference is shown as none.
    ratio = np.divide(values, medians, out=np.ones_like(values), where=medians > 0)
    return 100 * (ratio - 1)


def _map(
    axes: Axes, moments: np.ndarray, values: np.ndarray, colours: str, norm: Normalize, unit: str
) -> None:
    """Draw a row for each tensor, and a colour bar of the height of the map."""
    image = axes.imshow(
        values.T,
        cmap=colours,
        norm=norm,
        extent=(moments[0], moments[-1], values.shape[1], 0),
        aspect="auto",
        interpolation="nearest",
    )
    style.time_axis(axes, moments, ticks=4)
    axes.grid(False)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    beside = axes.inset_axes((1.03, 0, 0.035, 1))
    bar = axes.figure.colorbar(image, cax=beside, format=FuncFormatter(style.plain))
    if not isinstance(norm, LogNorm):
        bar.locator = MaxNLocator(7, steps=style.ROUND)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.minorticks_off()
    beside.tick_params(length=0, labelsize=style.SMALL, labelcolor=style.MUTED)
    beside.set_title(unit, loc="left", size=style.TEXT, color=style.MUTED, pad=8)


def groups(names: Sequence[str]) -> list[tuple[str, int, int]]:
    """Group neighbouring tensors by module, as (module, first, end); split groups of too many."""
    modules = [name.split(".")[:-1] or [name] for name in names]

    def split(first: int, end: int, depth: int) -> list[tuple[str, int, int]]:
        found: list[tuple[str, int, int]] = []
        for module, members in itertools.groupby(modules[first:end], lambda m: m[:depth]):
            last = first + len(list(members))
            group = [(".".join(module), first, last)]
            if last - first > _CROWDED * len(names) and len(module) == depth:
                parts = split(first, last, depth + 1)
                group = parts if len(parts) <= _GROUPS else group
            found += group
            first = last
        return found

    return split(0, len(names), 1)


def _group_labels(maps: np.ndarray, names: Sequence[str]) -> None:
    """Label the rows of each group with a bracket, and draw lines between groups."""
    rows, runs = len(names), groups(names)
    for axes, colour in zip(maps, (style.PAPER, style.FAINT), strict=True):
        for _, first, _ in runs[1:]:
            axes.axhline(first, color=colour, linewidth=0.9)
    left = maps[0]
    across = left.get_yaxis_transform()
    line = {"transform": across, "color": style.FAINT, "linewidth": 1.0, "clip_on": False}
    # A model may have very many small modules: label only the largest.
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
    style.value_axis(axes)
    style.time_axis(axes, moments, ticks=4)


def _require_shape(names: Sequence[str], steps: np.ndarray, values: np.ndarray) -> None:
    if values.shape != (len(steps), len(names)):
        raise ValueError(
            f"λ over time: {len(steps)} steps and {len(names)} names need values of shape "
            f"{(len(steps), len(names))}, not {values.shape}"
        )
