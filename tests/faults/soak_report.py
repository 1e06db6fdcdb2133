"""What a soak came to: whether results are the same, whether anything grew; a table and a plot.

Memory, handles and threads are a process's own, so their growth is the slope of one line fitted to
all lives at once, each with a level of its own: what a new process starts with is no growth, and
neither is what its first minutes add, nor what comes after the last step. Lives that a fault cut
short have no line; what they took at most is compared with what the quiet run's took, and so are
folders, which outlive processes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
from soak_watch import Sample, Watch

from reid_train.report import style

WARM_UP = 300.0
"""Seconds of a process's life in which it may grow: allocators and pools find their size."""
GROWN = 120.0
"""Seconds after that without which a line through a life says nothing of an hour."""
MOST = 1.25
"""What a process under faults may take at most, of the most that one of the quiet run took."""
BOUNDS = {"memory": (100.0, 50.0), "handles": (20.0, 10.0), "threads": (10.0, 5.0)}
"""Growth an hour, and growth within the longest life: what exceeds both is growth. Memory in MB."""
ROLES = {"driver": style.BLUE, "worker": style.ORANGE}
MB = 1e6
SCALE = {"memory": MB, "handles": 1.0, "threads": 1.0}


@dataclass
class Event:
    """A fault that was caused, or a driver that ended without one."""

    BY_ITSELF: ClassVar[str] = "driver ended by itself"

    time: float
    step: int
    kind: str
    detail: str = ""
    seconds: float | None = None
    """Until a later step than the last one before was tracked; None if the run ended first."""
    met: bool = True
    """Whether a request met it."""
    left: Sequence[str] = ()
    """Processes that outlived their driver or worker for long."""


@dataclass(frozen=True)
class Growth:
    """Of a quantity of one role's processes."""

    hourly: float
    longest: float
    """Within the longest life."""
    lives: int

    def beyond(self, quantity: str) -> bool:
        hourly, longest = BOUNDS[quantity]
        return self.hourly > hourly and self.longest > longest


@dataclass
class Outcome:
    """A quiet run and a faulty one.

    Args:
        results: what each came to, by name.
        watches: what each took.
        events: faults of the second.
        said: what its drivers said.
        room: bytes that the shard cache may take.
        steps: of each run.
    """

    results: tuple[Mapping[str, object], Mapping[str, object]]
    watches: tuple[Watch, Watch]
    events: list[Event]
    said: str
    room: int
    steps: int
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.problems += list(self._problems())

    def _problems(self) -> Iterator[str]:
        calm, hard = self.results
        yield from (f"{name} differ" for name in calm if not same(calm[name], hard[name]))
        for event in self.events:
            if event.kind == Event.BY_ITSELF:
                yield f"{event.kind} after step {event.step}: {event.detail}"
            yield from (f"after {event.kind}, left behind: {name}" for name in event.left)
        for name, watch in zip(("quiet", "faulty"), self.watches, strict=True):
            for (role, quantity), found in growth(training(watch)).items():
                if found.beyond(quantity):
                    yield f"{quantity} of the {name} {role}: {found.hourly:+.1f} an hour"
        calm_most, hard_most = (most(training(watch)) for watch in self.watches)
        for (role, quantity), value in hard_most.items():
            bound = MOST * calm_most.get((role, quantity), 0.0)
            if value > bound:
                yield f"{quantity} of a faulty {role}: {value:.0f}, more than {bound:.0f}"
        hard = peaks(self.watches[1])
        for folder, bound in self.bounds().items():
            if hard[folder] > bound:
                yield f"{folder} took {hard[folder] / MB:.1f} MB, more than {bound / MB:.1f}"

    def bounds(self) -> dict[str, float]:
        """Bytes that folders may take at most in the faulty run."""
        calm = peaks(self.watches[0])
        # Three checkpoints are kept, and one is on its way. Cut off uploads stay until the end;
        # a restarted group has a copy on each rank, and finds what the last one left.
        checkpoint = calm["run folder"] / 4
        return {
            "cache": 1.05 * self.room,
            "run folder": calm["run folder"] + 2 * checkpoint,
            "temporary files": calm["temporary files"] + 4 * checkpoint,
        }


def same(one: object, other: object) -> bool:
    """Equal in every bit; NaN is NaN."""
    return repr(one) == repr(other)


def training(watch: Watch) -> list[Sample]:
    """Samples up to the last step: the report after it takes what it takes, once."""
    last = max((row.step for row in watch.folders), default=0)
    ended = next((row.time for row in watch.folders if row.step == last), float("inf"))
    return [sample for sample in watch.samples if sample.time <= ended]


def growth(samples: Sequence[Sample]) -> dict[tuple[str, str], Growth]:
    """Growth of each quantity, by role and quantity; roles that nobody lived long in are left out.

    Args:
        samples: of all processes, in the order of time.
    """
    found = {}
    for role in ROLES:
        lives = list(_lives(samples, role))
        for quantity in BOUNDS if lives else ():
            above = below = 0.0
            for life in lives:
                times = np.array([sample.time for sample in life]) / 3600
                values = np.array([getattr(sample, quantity) for sample in life]) / SCALE[quantity]
                times -= times.mean()
                above += float(times @ values)
                below += float(times @ times)
            longest = max(life[-1].time - life[0].time for life in lives) / 3600
            found[role, quantity] = Growth(above / below, above / below * longest, len(lives))
    return found


def _lives(samples: Sequence[Sample], role: str) -> Iterator[list[Sample]]:
    by_pid: dict[int, list[Sample]] = {}
    for sample in samples:
        if sample.role == role:
            by_pid.setdefault(sample.pid, []).append(sample)
    for life in by_pid.values():
        if life[-1].time - life[0].time >= WARM_UP + GROWN:
            yield [sample for sample in life if sample.time > life[0].time + WARM_UP]


def most(samples: Sequence[Sample]) -> dict[tuple[str, str], float]:
    """The most that one process took of each quantity, by role and quantity; memory in MB."""
    found: dict[tuple[str, str], float] = {}
    for sample in samples:
        for quantity, scale in SCALE.items():
            key, value = (sample.role, quantity), getattr(sample, quantity) / scale
            found[key] = max(found.get(key, 0.0), value)
    return found


def peaks(watch: Watch) -> dict[str, float]:
    """The most bytes that each folder took."""
    return {
        "cache": max(row.cache for row in watch.folders),
        "run folder": max(row.run for row in watch.folders),
        "temporary files": max(row.temporary for row in watch.folders),
    }


def text(outcome: Outcome, picture: str) -> str:
    """The result as a section of Markdown."""
    calm, hard = outcome.watches
    faults = [event for event in outcome.events if event.kind != Event.BY_ITSELF]
    lines = [
        f"{outcome.steps} steps, 2 workers: {_minutes(calm)} min quietly, {_minutes(hard)} min with"
        f" {len(faults)} faults. {_verdict(outcome)}",
        "",
        f"![What the faulty run took over time]({picture})",
        "",
        "| min | step | fault | | goes on after |",
        "| --- | --- | --- | --- | --- |",
    ]
    for event in outcome.events:
        after = "the run ended" if event.seconds is None else f"{event.seconds:.0f} s"
        detail = event.detail + ("" if event.met else " (none came within a minute)")
        lines.append(
            f"| {event.time / 60:.1f} | {event.step} | {event.kind} | {detail} | {after} |"
        )
    lines += ["", "| | quiet | faulty |", "| --- | --- | --- |"]
    metrics = [result["metrics"] for result in outcome.results]
    for name in ("mAP", "rank-1", "mINP"):
        lines.append(f"| {name} | " + " | ".join(f"{m[name]!r}" for m in metrics) + " |")  # type: ignore[index]
    for name, value in outcome.results[0].items():
        equal = "equal in every bit" if same(value, outcome.results[1][name]) else "**differ**"
        lines.append(f"| {name} | | {equal} |")
    lines += ["", f"After the first {WARM_UP / 60:.0f} min of each process:", ""]
    lines += ["| growth an hour | quiet | faulty | may be |", "| --- | --- | --- | --- |"]
    grown = [growth(training(watch)) for watch in outcome.watches]
    for role, quantity in itertools.product(ROLES, SCALE):
        cells = [_grown(found.get((role, quantity))) for found in grown]
        lines.append(
            f"| {role}, {_name(quantity)} | {' | '.join(cells)} | {BOUNDS[quantity][0]:.0f} |"
        )
    lines += ["", "| most of a process | quiet | faulty | may be |", "| --- | --- | --- | --- |"]
    calm_most, hard_most = (most(training(watch)) for watch in outcome.watches)
    for (role, quantity), value in sorted(calm_most.items()):
        taken = hard_most.get((role, quantity), 0.0)
        lines.append(
            f"| {role}, {_name(quantity)} | {value:.0f} | {taken:.0f} | {MOST * value:.0f} |"
        )
    lines += ["", "| most bytes, MB | quiet | faulty | may be |", "| --- | --- | --- | --- |"]
    sizes = [peaks(watch) for watch in outcome.watches]
    for folder, bound in outcome.bounds().items():
        values = " | ".join(f"{size[folder] / MB:.1f}" for size in sizes)
        lines.append(f"| {folder} | {values} | {bound / MB:.1f} |")
    counts = (f"{len(re.findall(pattern, outcome.said))} × “{pattern}”" for pattern in SAID)
    lines += ["", f"Drivers said (Ray shows like lines once): {', '.join(counts)}.", ""]
    return "\n".join(lines)


SAID = ("trying again", "is damaged; fetching it again", "rank . failed", "resuming after step")
"""What drivers say of faults; these are counted."""


def _name(quantity: str) -> str:
    return "memory, MB" if quantity == "memory" else quantity


def _grown(found: Growth | None) -> str:
    return "–" if found is None else f"{found.hourly:+.1f} ({found.lives} lives)"


def _minutes(watch: Watch) -> str:
    return f"{watch.folders[-1].time / 60:.1f}"


def _verdict(outcome: Outcome) -> str:
    if outcome.problems:
        return "**Not as it should be**: " + "; ".join(outcome.problems) + "."
    return "The same bits came out, and nothing grew beyond its bound."


def draw(outcome: Outcome, path: Path) -> None:
    """Plot what the faulty run took, its faults as lines."""
    watch = outcome.watches[1]
    count = sum(event.kind != Event.BY_ITSELF for event in outcome.events)
    note = f"{outcome.steps} steps in {_minutes(watch)} min, {count} faults (S3's dotted)"
    figure = style.new_figure(10, 7.2, "A run under faults", note)
    grid = figure.subplots(3, 2, sharex=True)
    processes = (("memory", "Memory, MB", MB), ("handles", "Open handles", 1.0))
    for axes, (name, title, scale) in zip(
        grid.flat, (*processes, ("threads", "Threads", 1.0)), strict=False
    ):
        style.panel(axes, title, "driver blue, workers orange")
        for role, colour in ROLES.items():
            for pid in {sample.pid for sample in watch.samples if sample.role == role}:
                life = [sample for sample in watch.samples if sample.pid == pid]
                minutes = [sample.time / 60 for sample in life]
                values = [getattr(sample, name) / scale for sample in life]
                axes.plot(minutes, values, color=colour, linewidth=1.2)
    minutes = [row.time / 60 for row in watch.folders]
    folders = (("cache", "Shard cache, MB"), ("run", "Run folder, MB"))
    for axes, (name, title) in zip(
        grid.flat[3:], (*folders, ("temporary", "Temporary files, MB")), strict=True
    ):
        style.panel(axes, title)
        values = [getattr(row, name) / MB for row in watch.folders]
        axes.plot(minutes, values, color=style.GREEN, linewidth=1.2)
    for axes in grid.flat:
        axes.set_ylim(bottom=0)
        for event in outcome.events:
            dotted = ":" if event.kind.startswith("S3") else "-"
            axes.axvline(event.time / 60, color=style.RED, linewidth=0.6, linestyle=dotted)
    for axes in grid[-1]:
        style.panel(axes, axes.get_title("left"), x="minutes")
    style.save(figure, path)
