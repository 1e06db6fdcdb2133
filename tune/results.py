"""What a sweep found: the ranking, whether adaptation pays, and how to train the best again."""

import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from reid_train.config import TrainConfig
from reid_train.recipes import recipe
from tune.console import describe, percent
from tune.space import THETA_MULTIPLIER
from tune.store import HELD, Trial

MODES = {
    "held": "the same with λ held where it starts",
    "adaptive": "adaptive L2",
    "constant": "constant L2",
    "none": "no L2",
}
FEW = 3  # with no more searched configurations than this, none is called the best
# Not on the command line: what is given anyway, and what does not change what is learnt.
LEFT_OUT = ("recipe", "data", "output", "name", "loader", "tracking", "checkpoint", "device")
HEADER = ("", "trial", "mAP (%)", "fresh seeds", "settings")  # columns of the ranking


@dataclass(frozen=True)
class Entry:
    """A configuration and its trainings: the search's, and those with fresh seeds."""

    trial: Trial
    repeats: tuple[Trial, ...]
    mode: str  # of the regularization; "held" for an adaptive one in which no λ is learnt

    @property
    def scores(self) -> list[float]:
        """mAP of the fresh seeds, which the search did not select by; else the search's own."""
        return [trial.score for trial in self.repeats] or [self.trial.score]

    @property
    def mean(self) -> float:
        return statistics.mean(self.scores)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation of mAP; None for a single training."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def best(self) -> Trial:
        """The training with the highest mAP."""
        return max((self.trial, *self.repeats), key=lambda trial: trial.score)

    @property
    def title(self) -> str:
        if self.mode == "held":
            return f"trial-{self.trial.repeats:03d}, {HELD}"
        return self.trial.label or describe(self.trial.values)

    def measured(self) -> str:
        """`61.2 ± 0.4`, in percent."""
        spread = "" if self.spread is None else f" ± {100 * self.spread:.1f}"
        return f"{100 * self.mean:.1f}{spread}"


def ranking(trials: Sequence[Trial], base: TrainConfig) -> list[Entry]:
    """Configurations that were trained to the end, the best first.

    Those repeated with fresh seeds come before those trained once: one high score among many is
    mostly luck.
    """
    entries = []
    for trial in trials:
        if trial.state == "finished" and trial.repeats is None:
            repeats = [t for t in trials if t.repeats == trial.number and t.state == "finished"]
            same = tuple(t for t in repeats if t.label != HELD)
            entries.append(Entry(trial, same, trial.config(base).regularization.mode))
            if fixed := tuple(t for t in repeats if t.label == HELD):
                entries.append(Entry(fixed[0], fixed, "held"))
    return sorted(entries, key=lambda e: (len(e.repeats) > 0, e.mean), reverse=True)


def survivors(trials: Sequence[Trial], base: TrainConfig, count: int) -> list[Trial]:
    """What is worth repeating: the best adaptive ones, the paper's, the best constant, no L2."""
    by_score = sorted(ranking(trials, base), key=lambda e: e.trial.score, reverse=True)
    adaptive = [e for e in by_score if e.mode == "adaptive"]
    chosen = adaptive[:count] + [e for e in adaptive[count:] if e.trial.label]
    for mode in ("constant", "none"):
        chosen += [e for e in by_score if e.mode == mode][:1]
    return [entry.trial for entry in chosen]


def held(trials: Sequence[Trial], base: TrainConfig) -> list[Trial]:
    """A repeat of the best adaptive configuration, if there is one, with θ's learning rate at 0.

    Its advantages over the baselines are that it was searched for, and that its λ are learnt. This
    removes the second.
    """
    best = [e.trial for e in ranking(trials, base) if e.mode == "adaptive"][:1]
    return [Trial(0, t.values | {THETA_MULTIPLIER: 0.0}, HELD, repeats=t.number) for t in best]


def too_few(entries: Sequence[Entry]) -> bool:
    """Whether too few searched configurations were trained to the end to call one the best."""
    return _searched(entries) <= FEW


def _searched(entries: Sequence[Entry]) -> int:
    return sum(not e.trial.label for e in entries)


def verdict(entries: Sequence[Entry]) -> list[str]:
    """Sentences: the best adaptive configuration against the paper's, and with less adaptation."""
    lines = []
    if any(e.repeats for e in entries) and not all(e.repeats for e in entries):
        lines.append(
            "Configurations repeated with fresh seeds rank first, by the mean of these; those "
            "trained once follow."
        )
    if too_few(entries):
        lines.append(
            f"Searched configurations that ended: {_searched(entries)}, too few to call one the "
            "best. Give more --trials."
        )
    adaptive = [e for e in entries if e.mode == "adaptive"]
    if not adaptive:
        return ["No adaptive configuration was trained to the end.", *lines]
    best = adaptive[0]
    tied = [e for e in adaptive if e.measured() == best.measured()]
    rivals = [e for e in entries if e.trial.label == "paper" and e is not best][:1]
    # A sweep that was extended may have held λ of another configuration, which was the best then.
    rivals += [e for e in entries if e.mode == "held" and e.trial.repeats == best.trial.number]
    for mode in ("constant", "none"):
        rivals += [e for e in entries if e.mode == mode][:1]
    rank = "highest-ranked" if too_few(entries) else "best"
    name = f"The {rank} adaptive configuration"
    if len(tied) > 1:
        names = ", ".join(e.trial.name for e in tied)
        lines.append(f"{len(tied)} adaptive configurations are tied at {best.measured()}: {names}.")
        name = "The first of the tied"
    compared = [_compared(name, best, rival) for rival in rivals]
    return lines + (compared or ["There is no baseline to compare with."])


def _compared(first: str, best: Entry, rival: Entry) -> str:
    gain = best.mean - rival.mean
    paper = "the paper's setting"
    name = paper if rival.trial.label == "paper" else MODES[rival.mode]
    own = f"{paper}, " if best.trial.label == "paper" else ""
    signed = f"{100 * gain:+.1f}".replace("-", "−")
    start = (
        f"{first} ({best.trial.name}, {own}mAP {best.measured()}) "
        f"against {name} ({rival.trial.name}, {rival.measured()}): {signed}"
    )
    if best.spread is None or rival.spread is None:
        return f"{start}; one training shows nothing of the spread (see --seeds)."
    spread = math.hypot(best.spread, rival.spread)
    relation = "within" if abs(gain) <= spread else "beyond"
    return f"{start}, {relation} the spread of the difference (± {100 * spread:.1f})."


def command(config: TrainConfig, output: str) -> str:
    """The command line that trains a configuration by itself and keeps its run in `output`."""
    usual = recipe(config.recipe).flat()
    parts = ["python", "-m", "reid_train", "train", "--recipe", config.recipe]
    parts += ["--data", config.data, "--output", output]
    for name, value in config.flat().items():
        if value == usual[name] or name.split(".")[0] in LEFT_OUT or name == "evaluation.initial":
            continue
        section, dot, field = name.replace("_", "-").rpartition(".")
        parts.append(f"--{section}{dot}{'no-' if value is False else ''}{field}")
        if not isinstance(value, bool):
            parts += map(str, value if isinstance(value, list) else [value])
    return shlex.join(parts)


def rows(entries: Sequence[Entry]) -> list[tuple[str, ...]]:
    """The ranking as cells under `HEADER`."""
    return [
        (str(place), e.trial.name, e.measured(), f"{len(e.repeats) or '–'}", e.title)
        for place, e in enumerate(entries, 1)
    ]


def markdown(entries: Sequence[Entry], trials: Sequence[Trial]) -> str:
    """The ranking, and what was not trained to the end, as tables."""
    rest = [
        (t.name, str(t.epoch), percent(t), describe(t.values), f"{t.state}: {t.reason}")
        for t in trials
        if t.state in ("stopped", "failed")
    ]
    text = _table(HEADER, rows(entries))
    header = ("trial", "epochs", "mAP (%)", "settings", "why")
    return f"{text}\n{_table(header, rest)}" if rest else text


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = (header, ["---"] * len(header), *rows)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
