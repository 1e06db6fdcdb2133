"""A sweep's settings, checked against each other, before anything is opened or started."""

import logging
from collections.abc import Collection
from dataclasses import dataclass

from data_shards.errors import ConfigError
from reid_train.config import TrainConfig
from tune.config import Sweep, default_name
from tune.population import Population
from tune.schedulers import STOPPING, decides_while_frozen
from tune.searchers import GridSearcher, OptunaSearcher, Searcher
from tune.space import Space, build, default, first_points
from tune.store import Trial

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a sweep will do."""

    settings: Sweep  # with the ranges that are searched
    config: TrainConfig  # what every trial starts from; `name` is the sweep's
    space: Space  # the ranges, read
    first: list[Trial]  # of the first points: the paper's configuration and the baselines
    searcher: Searcher  # proposes the other trials

    @property
    def repeats(self) -> int:
        """The most trainings with fresh seeds that may follow the search."""
        settings = self.settings
        if settings.seeds == 1:
            return 0
        adaptive = min(settings.survivors, settings.trials - len(self.first)) + 1  # the paper's
        others = bool(settings.constant_factors) + 2  # no L2, and λ held
        return settings.seeds * (adaptive + others)


def make_plan(settings: Sweep, config: TrainConfig) -> Plan:
    """Check a sweep's settings; without a name, `config` gets one from them."""
    settings = settings.model_copy(update={"ranges": settings.ranges or default(config)})
    config = config.replace(name=config.name or default_name(settings, config))
    space = build(settings.ranges, config)
    points = first_points(config, settings.constant_factors)
    _check(settings, config, points)
    first = [Trial(i, v, label, config.seed) for i, (label, v) in enumerate(points.items())]
    searcher: Searcher
    if settings.scheduler == "population":
        interval = settings.interval or config.evaluation.every
        size = settings.trials - len(first)
        searcher = Population(size, interval, space, config, len(first))
    elif settings.searcher == "grid":
        searcher = GridSearcher(settings, space, config, len(first))
    else:
        searcher = OptunaSearcher(settings, space, config)
    return Plan(settings, config, space, first, searcher)


def _check(settings: Sweep, config: TrainConfig, points: Collection[str]) -> None:
    if settings.trials <= len(points):
        raise ConfigError(
            f"--trials {settings.trials} leaves nothing to search: the first {len(points)} are "
            "the paper's configuration and the baselines; give more (or fewer --constant-factors)"
        )
    every = config.evaluation.every
    if settings.interval is not None and settings.interval % every:
        raise ConfigError(f"--interval must be a multiple of --evaluation.every, {every}")
    if settings.scheduler == "population" and settings.seeds > 1:
        raise ConfigError(
            "--seeds repeats fixed configurations, and a population changes them while it trains"
        )
    grace = settings.grace if settings.scheduler in STOPPING else None
    if grace is not None and decides_while_frozen(grace, config):
        logger.warning(
            "--grace %d stops trials while the backbone is frozen (%d epochs), by an mAP that "
            "hardly depends on what is searched: leave it out, or give a larger one",
            grace,
            config.optimizer.frozen_epochs,
        )
