"""What a person looks at after a sweep: five pictures, in the look of a run's report."""

from __future__ import annotations

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
from tune.plots.importance import importance
from tune.plots.landscape import landscape
from tune.plots.marks import marks
from tune.plots.parallel import parallel
from tune.plots.timeline import timeline
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
    storage: Storage,
) -> None:
    """Draw a sweep.

    Args:
        folder: where the PNG files go.
        trials: all trials.
        entries: the ranking.
        base: the sweep's configuration.
        space: what was searched.
        storage: the sweep's folder, with the checkpoints whose λ are drawn.
    """
    drawn = marks(trials, base)
    landscape(folder / "landscape.png", drawn, space)
    parallel(folder / "parallel.png", drawn, space)
    importance(folder / "importance.png", trials, base, space)
    timeline(folder / "timeline.png", trials, base.total_epochs)
    constant = next((e for e in entries if e.mode == "constant"), None)
    factor = None if constant is None else constant.trial.config(base).regularization.factor
    best = [entry for entry in entries if entry.mode == "adaptive"][:CURVES]
    factors(folder / "factors.png", _curves(best, storage), factor)


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
            if len(steps):
                curves.append(Curve(entry.trial.name, entry.title, entry.mean, steps, values))
    return curves
