"""What a person sees while a sweep runs: a live table on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import ray.exceptions
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tune.controller import Study
from tune.space import AMPLITUDE, LEARNING_RATE, THETA_MULTIPLIER, Value
from tune.store import ENDED, Trial

LINE_EVERY = 30.0
"""Seconds between lines where there is no terminal."""
MOST_ROWS = 16
"""Rows of the live table; of the ended trials the best are shown."""
SHORT = {AMPLITUDE: "A", LEARNING_RATE: "lr", THETA_MULTIPLIER: "θ×"}
"""Names that fit a table."""
_COLOURS = {"finished": "green", "stopped": "yellow", "failed": "red", "running": "bold"}


@ray.remote(num_cpus=0)
class TrialBoard:
    """Holds the newest state of each trial, written by its first worker."""

    def __init__(self):
        self._states: dict[int, dict[str, object]] = {}

    def show(self, number: int, state: dict[str, object]) -> None:
        """Take a trial's state; evaluations come another way."""
        if "metrics" not in state:
            self._states[number] = state | {"time": time.time()}

    def read(self) -> dict[int, dict[str, object]]:
        """The newest states by trial."""
        return self._states


class Clock:
    """Seconds a step takes in each trial, from the first state seen of it."""

    def __init__(self):
        self._first: dict[int, tuple[int, float]] = {}
        self.seconds_per_step: dict[int, float] = {}

    def look(self, states: dict[int, dict[str, Any]]) -> None:
        """Take the newest states; a trial that began anew is timed anew."""
        for number, state in states.items():
            done, _ = steps(state)
            first = self._first.get(number)
            if first is None or done < first[0]:
                self._first[number] = (done, state["time"])
            elif done > first[0]:
                self.seconds_per_step[number] = (state["time"] - first[1]) / (done - first[0])

    def left(self, number: int, state: dict[str, Any] | None) -> float | None:
        """Seconds that a trial still takes, if its pace is known."""
        if state is None or number not in self.seconds_per_step:
            return None
        done, total = steps(state)
        return (total - done) * self.seconds_per_step[number]


def steps(state: dict[str, Any]) -> tuple[int, int]:
    """Steps done and steps in all."""
    return state["epoch"] * state["steps"] + state["step"], state["epochs"] * state["steps"]


@contextlib.contextmanager
def watch(study: Study, board: Any, console: Console, total: int, slots: int) -> Iterator[None]:
    """Show a study until the block ends.

    Args:
        study: whose trials are shown.
        board: a `TrialBoard` actor.
        console: where.
        total: trials that there will be.
        slots: trials that run at a time.
    """
    stop = threading.Event()
    arguments = (study, board, console, total, slots, stop)
    thread = threading.Thread(target=_follow, args=arguments, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)


def _follow(
    study: Study, board: Any, console: Console, total: int, slots: int, stop: threading.Event
) -> None:
    clock, said, last_line = Clock(), {t.number for t in study.trials if t.state in ENDED}, 0.0
    live = Live(console=console, transient=True, auto_refresh=False)
    with live if console.is_terminal else contextlib.nullcontext():
        while True:
            finished = stop.wait(1.0)
            try:
                states: dict[int, Any] = ray.get(board.read.remote(), timeout=5)  # type: ignore
            except ray.exceptions.RayError:
                return
            clock.look(states)
            with study.lock:
                trials = list(study.trials)
            for trial in trials:
                if trial.number in states:
                    trial.images_per_second = states[trial.number]["images_per_second"]
                if trial.state in ENDED and trial.number not in said:
                    said.add(trial.number)
                    console.print(_ending(trial), highlight=False)
            note = summary(trials, states, clock, total, slots)
            if console.is_terminal:
                live.update(Group(table(trials, states, clock), Text(note, "dim")), refresh=True)
            elif time.monotonic() - last_line > LINE_EVERY:
                last_line = time.monotonic()
                console.print(note, highlight=False)
            if finished:
                return


def table(trials: Sequence[Trial], states: dict[int, dict[str, Any]], clock: Clock) -> Table:
    """The running trials and the best of the ended ones."""
    made = Table(box=box.SIMPLE_HEAD, header_style="dim")
    made.add_column("trial")
    made.add_column("settings", overflow="ellipsis", no_wrap=True, max_width=60)
    for name in ("epoch", "mAP", "images/s", "time left"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("state", overflow="ellipsis", no_wrap=True, max_width=44)
    running = [trial for trial in trials if trial.state not in ENDED]
    ended = sorted(
        (trial for trial in trials if trial.state in ENDED),
        key=lambda trial: -trial.score if trial.evaluations else 1.0,
    )
    for trial in [*running, *ended][:MOST_ROWS]:
        state = states.get(trial.number) if trial.state == "running" else None
        speed = trial.images_per_second
        made.add_row(
            trial.name,
            trial.label or describe(trial.values),
            f"{state['epoch'] + 1 if state else trial.epoch}",
            f"{100 * trial.score:.1f}" if trial.evaluations else "–",
            f"{speed:,.0f}" if speed else "–",
            duration(clock.left(trial.number, state)),
            Text(f"{trial.state} {trial.reason}".strip(), _COLOURS.get(trial.state, "dim")),
        )
    return made


def summary(
    trials: Sequence[Trial],
    states: dict[int, dict[str, Any]],
    clock: Clock,
    total: int,
    slots: int,
) -> str:
    """One line on the whole sweep."""
    counts = {s: sum(t.state == s for t in trials) for s in ("running", *ENDED)}
    said = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    best = max((t for t in trials if t.evaluations), key=lambda t: t.score, default=None)
    leads = f"; best mAP {100 * best.score:.1f} ({best.name})" if best else ""
    running = [t for t in trials if t.state == "running"]
    lefts = [clock.left(t.number, states.get(t.number)) for t in running]
    took = [t.ended - t.began for t in trials if t.state in ENDED and t.ended > t.began]
    if not took or None in lefts:
        left = None
    else:
        ahead = max(total - len(trials), 0) * sum(took) / len(took)
        left = (ahead + sum(seconds or 0 for seconds in lefts)) / slots
    return f"{len(trials)} of {total} trials: {said or 'starting'}{leads}; {duration(left)} left"


def describe(values: dict[str, Value]) -> str:
    """`A 0.01, lr 0.0003`."""
    parts = []
    for field, value in values.items():
        name = SHORT.get(field, field.rpartition(".")[2])
        parts.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(parts)


def duration(seconds: float | None) -> str:
    """`1:02:03`, or `?`."""
    if seconds is None:
        return "?"
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _ending(trial: Trial) -> str:
    measured = f"mAP {100 * trial.score:.1f}" if trial.evaluations else "nothing measured"
    reason = f" ({trial.reason})" if trial.reason else ""
    named = trial.label or describe(trial.values)
    return f"{trial.name}  {trial.state}{reason}  {measured}  {named}"
