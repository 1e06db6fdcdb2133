"""Population-based training (Jaderberg et al. 2017, arXiv 1711.09846) in synchronous rounds.

All members train for an interval of epochs; the first round lasts at least until mAP depends on
what is searched. Then each of the worst quarter takes a checkpoint of the best quarter, with its
settings changed a little. What follows a round is a pure function of its results, so a sweep that
was killed continues exactly, also in the middle of a round.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution, IntDistribution

from data_shards.errors import ConfigError
from reid_train.config import TrainConfig
from tune.schedulers import first_decision
from tune.searchers import Searcher
from tune.space import MODE, Dimension, Space, Value, at, draw, near
from tune.store import Trial

QUARTER = 0.25
RESAMPLE = 0.25  # probability that a setting is drawn anew instead of changed a little
STEPS = (0.8, 1.25)  # factors by which a number is changed; in a list, one place down or up
ROUNDS = 2  # the first exchange is in the first half of a run, unless the backbone is frozen then
# Fields, or sections, in which members must not differ: a copied checkpoint would not fit.
UNFIT = ("model.", "optimizer.epochs", "optimizer.frozen_epochs", MODE)


class Population(Searcher):
    """Proposes the members of a population, and their next parts round by round."""

    def __init__(self, size: int, interval: int, space: Space, base: TrainConfig, first: int):
        if unfit := [name for name in space if name.startswith(UNFIT)]:
            raise ConfigError(
                f"a population cannot search {', '.join(unfit)}: members take each other's "
                "checkpoints, which would not fit; leave it out (--search NAME=fixed), or take "
                "another --scheduler"
            )
        self.size, self.interval, self.space, self.base = size, interval, space, base
        self._first, self._start = first, first_decision(base, ROUNDS)

    def propose(self, trials: Sequence[Trial]) -> Trial | None:
        """A new member, or one whose next part can begin."""
        members = list(trials[self._first :])
        if len(members) < self.size:
            number = self._first + len(members)
            rng = np.random.default_rng((self.base.seed, number))
            values: dict[str, Value] = {MODE: "adaptive", **draw(self.space, rng)}
            changes = [{"epoch": 0, "values": values, "from": None}]
            return Trial(number, values, "", self.base.seed, until=self._until(0), changes=changes)
        alive = [member for member in members if member.state != "failed"]
        part = min((member.part for member in alive), default=0)
        # A part is stored when it begins: after a kill, some members may be a part behind others.
        behind = [member for member in alive if member.part == part]
        if behind and all(member.state == "waiting" for member in behind):
            self._next_round(members, part, behind[0].epoch)
        return next((member for member in alive if member.state == "queued"), None)

    def exhausted(self, trials: Sequence[Trial]) -> bool:
        """Whether every member has come to its end."""
        members = list(trials[self._first :])
        return len(members) == self.size and all(m.state in ("finished", "failed") for m in members)

    def _next_round(self, members: Sequence[Trial], part: int, done: int) -> None:
        """Queue what follows `part`, which ended at epoch `done`, where it has not begun."""
        rng = np.random.default_rng((self.base.seed, done))
        trained = [member for member in members if member.state != "failed" or member.part > part]
        ends = {member.number: _at_the_end(member, part, done) for member in trained}
        donors = exchange(list(ends.values()), rng)
        for member in trained:
            donor = donors.get(member.number)
            end = ends[member.number if donor is None else donor]
            values = end.values if donor is None else explore(end.values, self.space, rng)
            if member.part > part:
                continue
            member.state, member.part = "queued", member.part + 1
            member.start = f"{end.run_name}/{end.evaluations[-1]['checkpoint']}"
            member.values, member.until = values, self._until(done)
            member.changes.append({"epoch": done, "values": values, "from": donor})

    def _until(self, done: int) -> int | None:
        until = max(done + self.interval, self._start)
        return until if until < self.base.total_epochs else None


def _at_the_end(member: Trial, part: int, done: int) -> Trial:
    """A member as it was after a part, which ended at epoch `done`."""
    evaluations = [e for e in member.evaluations if e["epoch"] <= done]
    return replace(
        member, part=part, values=member.changes[part]["values"], evaluations=evaluations
    )


def exchange(members: Sequence[Trial], rng: np.random.Generator) -> dict[int, int]:
    """For each number of the worst quarter, by the last mAP, one of the best quarter's."""
    ranked = sorted(members, key=lambda m: (m.evaluations[-1]["mAP"], -m.number))
    count = min(math.ceil(len(ranked) * QUARTER), len(ranked) // 2)
    best = ranked[len(ranked) - count :]
    return {loser.number: best[int(rng.integers(count))].number for loser in ranked[:count]}


def explore(values: dict[str, Value], space: Space, rng: np.random.Generator) -> dict[str, Value]:
    """Settings near the given ones, inside the space."""
    moved = dict(values)
    for name, dimension in space.items():
        if rng.random() < RESAMPLE:
            moved[name] = at(dimension, float(rng.random()))
        else:
            moved[name] = _step(values[name], dimension, bool(rng.integers(2)))
    return moved


def _step(value: Any, dimension: Dimension, up: bool) -> Value:
    move = 1 if up else -1
    if isinstance(dimension, CategoricalDistribution):
        place = dimension.choices.index(value) + move
        return dimension.choices[min(max(place, 0), len(dimension.choices) - 1)]
    if isinstance(dimension, IntDistribution):
        return min(max(value + move, dimension.low), dimension.high)
    return near(value * STEPS[up], dimension)
