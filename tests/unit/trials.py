"""Trials of a sweep as they are once it has run, without running one."""

from __future__ import annotations

from reid_train.recipes import recipe
from tune.space import AMPLITUDE, first_points
from tune.store import Trial

BASE = recipe("demo").replace(data="s3://b/data", output="o", name="s", optimizer__epochs=4)


def trained(number: int, score: float, values=None, label: str = "", **changes) -> Trial:
    trial = Trial(number, values or {AMPLITUDE: 0.01}, label, state="finished", **changes)
    for epoch in (2, 4):
        trial.evaluations.append(
            {
                "epoch": epoch,
                "step": 20 * epoch,
                "mAP": score if epoch == 4 else score / 2,
                "rank-1": score,
                "run": trial.name,
                "checkpoint": f"c{epoch}",
            }
        )
    return trial


def swept(repeated: dict[int, list[float]] | None = None) -> list[Trial]:
    """Five first points, two searched trials, and repeats."""
    points = first_points(BASE, (5e-5, 5e-4, 2.5e-3))
    scores = (0.60, 0.55, 0.59, 0.57, 0.50)
    trials = [
        trained(i, score, values, label)
        for i, ((label, values), score) in enumerate(zip(points.items(), scores, strict=True))
    ]
    trials += [trained(5, 0.64, {AMPLITUDE: 0.02}), trained(6, 0.61, {AMPLITUDE: 0.01})]
    for number, values in (repeated or {}).items():
        for seed, score in enumerate(values, 1):
            original = trials[number]
            trials.append(
                trained(
                    len(trials), score, original.values, original.label, seed=seed, repeats=number
                )
            )
    return trials


def searched_more() -> list[Trial]:
    """A sweep in which enough is searched to name a best."""
    return [*swept(), trained(7, 0.58, {AMPLITUDE: 0.03}), trained(8, 0.57, {AMPLITUDE: 0.04})]
