"""From which epoch on mAP says something of what is searched. Pure functions."""

from __future__ import annotations

from reid_train.config import TrainConfig


def first_decision(config: TrainConfig, factor: float) -> int:
    """The first evaluation at which a trial may be stopped, or take another's place.

    While the backbone is frozen, and while the second phase warms up, mAP hardly depends on what is
    searched: it is the first evaluation after both. In a shorter run it is earlier, so that there
    is another decision at `factor` times its epoch; but never while the backbone is frozen.
    """
    every, frozen = config.evaluation.every, config.optimizer.frozen_epochs
    warmup = config.optimizer.warmup_epochs if config.optimizer.schedule == "step" else 0
    # The last epoch's evaluation decides nothing: its trial has ended.
    last = (config.total_epochs - 1) // every * every
    early_enough = int(last / factor) // every * every
    wanted = _evaluation_after(frozen + warmup, every)
    return max(_evaluation_after(frozen, every), min(wanted, early_enough))


def decides_while_frozen(grace: int, config: TrainConfig) -> bool:
    """Whether the first evaluation after so many epochs is of a frozen backbone."""
    return _evaluation_after(grace - 1, config.evaluation.every) <= config.optimizer.frozen_epochs


def _evaluation_after(epoch: int, every: int) -> int:
    return (epoch // every + 1) * every
