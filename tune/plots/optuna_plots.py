"""Optuna's pictures of a sweep, in the look of a run's report."""

import warnings
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import optuna
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState, create_trial

from reid_train.config import TrainConfig
from reid_train.report import style
from tune.plots.landscape import COLOURS, name, percents
from tune.results import Entry
from tune.searchers import as_optuna, new_study
from tune.space import Space
from tune.store import ENDED, Trial

_STATES = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}
LEAST = 4  # different results that fANOVA needs; parallel coordinates of fewer show nothing


def optuna_plots(
    folder: Path,
    trials: Sequence[Trial],
    entries: Sequence[Entry],
    base: TrainConfig,
    space: Space,
) -> list[str]:
    """Draw importance, slices, parallel coordinates and the timeline; see `plots.draw`."""
    from optuna.visualization import matplotlib as draw

    finished, ended = new_study(), new_study()
    scores = percents(entries)
    for trial in trials:
        if trial.state in ENDED:
            ended.add_trial(_timed(trial))
        made = as_optuna(trial, space, base)
        if made is not None and trial.number in scores:
            made.params = {name(field): value for field, value in made.params.items()}
            made.distributions = {name(field): d for field, d in space.items()}
            made.value = scores[trial.number]
            finished.add_trial(made)
    different = len({trial.value for trial in finished.trials})
    missing = []
    if different < LEAST:
        missing.append(
            f"No importance.png and parallel.png: they need {LEAST} finished trials that differ in "
            "mAP and have a value of each setting."
        )
    else:
        title = f"Share of each setting in the variance of mAP ({len(finished.trials)} trials)"
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        plot = partial(draw.plot_param_importances, finished, evaluator=evaluator)
        _save(folder / "importance.png", plot, title)
        plot = partial(draw.plot_parallel_coordinate, finished, target_name="mAP (%)")
        _save(folder / "parallel.png", plot, "From settings to mAP")
    if different < 2:
        missing.append("No slice.png: it needs two such trials.")
    else:
        plot = partial(draw.plot_slice, finished, target_name="mAP (%)")
        _save(folder / "slice.png", plot, "mAP over each setting", width=3.2 * len(space))
    title = "When each trial was trained"
    _save(folder / "timeline.png", partial(draw.plot_timeline, ended), title)
    return missing


def _timed(trial: Trial) -> FrozenTrial:
    """A trial with its times; its place among all is its number."""
    score = None if trial.state == "failed" else trial.score
    made = create_trial(state=_STATES[trial.state], value=score)
    made.datetime_start = datetime.fromtimestamp(trial.began or trial.ended)
    made.datetime_complete = datetime.fromtimestamp(trial.ended)
    return made


def _save(path: Path, plot: Callable[[], Any], title: str, width: float = 9) -> None:
    """Draw with Optuna, whose pictures come from pyplot, and give them the report's look."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are experimental
        drawn = plot()  # axes, or an array of them
        figure: Figure = getattr(drawn, "flat", [drawn])[0].figure
        figure.set_size_inches(max(width, 7), 4.6)
        figure.suptitle("")
        _restyle(figure)
        figure.text(0.02, 1.02, title, size=style.TITLE, weight="bold", color=style.INK)
        figure.savefig(path, dpi=style.DPI, bbox_inches="tight", metadata={"Software": None})
        pyplot.close(figure)


def _restyle(figure: Figure) -> None:
    figure.set_facecolor(style.PAPER)
    for axes in figure.axes:
        axes.set_facecolor(style.PAPER)
        for side in ("left", "center"):
            axes.set_title("", loc=side)
        axes.grid(color=style.GRID, linewidth=0.8)
        colours: dict[str, Any] = {"labelcolor": style.INK, "color": style.FAINT}
        axes.tick_params(which="both", labelsize=style.TEXT, **colours)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set(size=style.TEXT, color=style.MUTED)
        for collection in axes.collections:
            if collection.get_array() is not None:
                collection.set_cmap(COLOURS)
        if (legend := axes.get_legend()) is not None:
            words = {state.name: word for word, state in _STATES.items()}
            for text in legend.get_texts():
                text.set(text=words.get(text.get_text(), ""), size=style.TEXT)
            legend.set_visible(any(text.get_text() for text in legend.get_texts()))
