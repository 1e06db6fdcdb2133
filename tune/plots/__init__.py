"""What a person looks at after a sweep: pictures in the look of a run's report.

Optuna draws importance, slices, parallel coordinates and the timeline. `landscape` stays beside
its contour plot, which fills the plane by interpolation between a few dots, and shows neither the
trials that were stopped nor the baselines.
"""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from data_shards.errors import ReidError
from data_shards.storage import Storage
from reid_train.config import TrainConfig
from reid_train.training.checkpoint import HISTORY
from reid_train.training.history import History
from tune.plots.factors import Curve, factors
from tune.plots.landscape import landscape
from tune.plots.optuna_plots import optuna_plots
from tune.results import Entry
from tune.space import Space
from tune.store import Trial

logger = logging.getLogger(__name__)

CURVES = 4
"""How many of the best trials' λ are drawn."""


def draw(
    folder: Path,
    trials: Sequence[Trial],
    entries: Sequence[Entry],
    base: TrainConfig,
    space: Space,
    storage: Storage,  # the sweep's folder, with the checkpoints that λ is read from
) -> list[str]:
    """Draw a sweep: PNG files in `folder`.

    Returns:
        A sentence for each picture that has too little to show.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = optuna_plots(folder, trials, base, space)
    if not landscape(folder / "landscape.png", trials, base, space):
        missing.append("No landscape.png: it needs two ranges of numbers.")
    constant = next((e for e in entries if e.mode == "constant"), None)
    factor = None if constant is None else constant.trial.config(base).regularization.factor
    curves = _curves([e for e in entries if e.mode == "adaptive"][:CURVES], storage)
    if curves:
        factors(folder / "factors.png", curves, factor)
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
