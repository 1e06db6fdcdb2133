"""What a person looks at after a sweep: pictures in the look of a run's report.

Optuna draws importance, slices, parallel coordinates and the timeline. `landscape` stays beside
its contour plot, which fills the plane by interpolation between a few dots, and shows neither the
trials that were stopped nor the baselines.
"""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_shards.errors import ReidError
from data_shards.storage import Storage
from reid_train.config import TrainConfig
from reid_train.report import style
from reid_train.training.checkpoint import HISTORY
from reid_train.training.history import History
from tune.plots.landscape import HALO, landscape
from tune.plots.optuna_plots import optuna_plots
from tune.results import Entry
from tune.space import Space
from tune.store import Trial

logger = logging.getLogger(__name__)

# A configuration, and λ of its first training: steps (T,) ascending, values (T, n).
Curve = tuple[Entry, np.ndarray, np.ndarray]
CURVES = 4  # how many of the best trials' λ are drawn


def draw(
    folder: Path,
    trials: Sequence[Trial],
    entries: Sequence[Entry],
    base: TrainConfig,
    space: Space,
    storage: Storage,  # the sweep's folder, with the checkpoints that λ is read from
) -> list[str]:
    """Draw PNG files in `folder`; return a sentence for each that has too little to show."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = optuna_plots(folder, trials, entries, base, space)
    if not landscape(folder / "landscape.png", trials, entries, base, space):
        missing.append("No landscape.png: it needs two ranges of numbers.")
    constant = next((e for e in entries if e.mode == "constant"), None)
    factor = None if constant is None else constant.trial.config(base).regularization.factor
    curves = _curves([e for e in entries if e.mode == "adaptive"][:CURVES], storage)
    if curves:
        _draw_factors(folder / "factors.png", curves, factor)
    else:
        missing.append("No factors.png: no adaptive trial recorded λ.")
    return missing


def _curves(entries: Sequence[Entry], storage: Storage) -> list[Curve]:
    """λ over time, from each trial's last checkpoint."""
    curves = []
    with tempfile.TemporaryDirectory(prefix="reid-history-") as temporary:
        for entry in entries:
            last, path = entry.trial.evaluations[-1], Path(temporary) / f"{entry.trial.name}"
            try:
                storage.download(f"{last['run']}/{last['checkpoint']}/{HISTORY}", path)
                steps, values = History.load(path).factors()
            except ReidError as error:
                logger.warning("λ of %s is not drawn: %s", entry.trial.name, error)
                continue
            if len(steps) > 1:
                curves.append((entry, steps, values))
    return curves


def _draw_factors(path: Path, curves: Sequence[Curve], constant: float | None) -> None:
    """Draw the spread of λ over all tensors, for each trial; the best constant λ as a line."""
    note = "Bands: median (line), quartiles (dark), minimum to maximum (pale); log scale"
    width = 3.0 + 2.4 * len(curves)
    figure = style.new_figure(
        max(width, 7.5), 4.4, "λ of the highest-ranked trials over time", note
    )
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    positive = np.concatenate([values[values > 0] for _, _, values in curves])
    top = max(positive.max() if len(positive) else 1.0, constant or 0.0)
    # Where θ reaches the end of its range λ is 0: no log scale has a place for that.
    floor = max(positive.min() if len(positive) else 0.0, top * 1e-3)
    least = min(floor, constant or floor)
    for axes, (entry, steps, values) in zip(panels, curves, strict=True):
        score, label = f"{100 * entry.mean:.1f}%", "λ" if axes is panels[0] else ""
        style.panel(axes, entry.trial.name, score, x="step", y=label)
        values = np.maximum(values.astype(np.float64), floor)
        low, quarter, median, three, high = np.quantile(values, (0, 0.25, 0.5, 0.75, 1), axis=1)
        axes.fill_between(steps, low, high, color=style.PURPLE, alpha=0.16, linewidth=0)
        axes.fill_between(steps, quarter, three, color=style.PURPLE, alpha=0.35, linewidth=0)
        axes.plot(steps, median, color=style.PURPLE, linewidth=1.8)
        if constant:
            axes.axhline(constant, color=style.ORANGE, linewidth=1.1, linestyle=(0, (4, 3)))
        style.log_axis(axes.yaxis, least, top)
        style.time_axis(axes, steps, ticks=3)
        settings = {"s": entry.title.replace(", ", "\n"), "path_effects": HALO}
        small = {"size": style.SMALL, "color": style.MUTED, "va": "bottom"}
        axes.text(0.04, 0.04, transform=axes.transAxes, **settings, **small)
    room = (top / least) ** 0.1
    panels[0].set_ylim(least / room**3.2, top * room)
    if constant:
        text = {"va": "center", "size": style.SMALL, "color": style.ORANGE}
        place = panels[-1].get_yaxis_transform()
        label = f"constant\n{style.number(constant)}"
        panels[-1].text(1.02, constant, label, transform=place, **text)
    style.save(figure, path)
