"""What a sweep is given, beside the training configuration that it varies."""

import hashlib
import json
from typing import Annotated, Literal

import tyro
from pydantic import Field

from reid_train.config import Count, NonNegative, Section, TrainConfig

EXTENDABLE = {"trials", "seeds", "survivors", "concurrent"}
"""Settings that may differ when a sweep is continued: they only add to it. A population's number of
trials is fixed all the same (`Store.open`)."""
NEUTRAL = {"tracking", "loader", "checkpoint", "workers", "cpus_per_worker", "device"}
"""Of the configuration: what does not change what is computed, but for rounding."""


class Sweep(Section):
    """How many trials, what is searched and how, which trials are stopped, what is repeated."""

    trials: Count = 20
    """Trainings of the search. The first are baselines: the paper's configuration, one for each of
    --constant-factors, and no L2. So 20 trials search 15 points, and 6 search one."""
    searcher: Literal["tpe", "gp", "cmaes", "random", "grid"] = "tpe"
    """What proposes configurations: Optuna's TPE, Gaussian process, CMA-ES (numbers only) or random
    sampler, or a regular grid."""
    scheduler: Literal["asha", "hyperband", "median", "none", "population"] = "asha"
    """asha and hyperband stop the worse trials at each rung (hyperband later in some of them);
    median stops what is below the median of others; population copies the best and changes their
    settings."""
    ranges: Annotated[dict[str, str], tyro.conf.Suppress] = Field(default_factory=dict)
    """Field name to range: what is searched."""
    constant_factors: tuple[NonNegative, ...] = (5e-5, 5e-4, 2.5e-3)
    """λ of the constant baselines; 2.5e-3 is where the published adaptive λ starts."""
    seeds: Count = 1
    """More trainings, with fresh seeds, of each survivor, the paper's configuration, the best
    constant L2 and no L2, and of the best adaptive one with λ held where it starts, which shows
    what adaptation adds. The ranking takes their mean, without the search's own training. 1 repeats
    nothing."""
    survivors: Count = 2
    """How many of the best adaptive configurations are repeated; the paper's is in any case."""
    grace: Count | None = None
    """Epochs before a trial may be stopped; None is the first evaluation after the frozen phase and
    the warm-up that follows it (earlier in a short run, but not while the backbone is frozen)."""
    reduction: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 3
    """asha and hyperband keep one in so many trials at each rung."""
    interval: Count | None = None
    """Epochs between a population's exchanges; None is the evaluations' interval. The first
    comes after the frozen phase and the warm-up, as for `grace`."""
    concurrent: Count | None = None
    """Trials at a time; None is as many as fit the cluster."""


def default_name(settings: Sweep, config: TrainConfig) -> str:
    """A name that the same command gives again, so that it continues the same sweep."""
    given = (
        settings.model_dump(mode="json", exclude=EXTENDABLE),
        config.model_dump(mode="json", exclude={"name", *NEUTRAL}),
    )
    digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()
    return f"sweep-{config.recipe}-{digest[:8]}"
