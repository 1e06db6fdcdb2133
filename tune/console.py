"""What a person sees while a sweep runs: a live table on a terminal, lines in a log."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import ray.exceptions
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from data_shards.progress import LINE_EVERY, Stage, duration, no_key_echo, say
from reid_train.runs.process import Stop
from tune.controller import Controller
from tune.space import AMPLITUDE, LEARNING_RATE, THETA_MULTIPLIER, Value
from tune.store import ENDED, Trial

SHORT = {AMPLITUDE: "A", LEARNING_RATE: "lr", THETA_MULTIPLIER: "θ×"}  # names that fit a table
_COLOURS = {"finished": "green", "stopped": "yellow", "failed": "red", "running": "bold"}


class Paces:
    """Steps of the running trials, and how long they still take."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Any]] = {}
        self._stages: dict[int, Stage] = {}
        self._now = 0.0

    def update(self, trials: Sequence[Trial], states: dict[str, Any], now: float) -> None:
        """Take the newest states by name of the run; a trial that began anew is timed anew."""
        running = [t for t in trials if t.state == "running" and t.run_name in states]
        before, self._now = self._stages, now
        self.states = {trial.number: states[trial.run_name] for trial in running}
        self._stages = {}
        for trial in running:
            state = states[trial.run_name]
            trial.images_per_second = state.get("images_per_second", trial.images_per_second)
            total = state["epochs"] * state["steps"]
            done = state["epoch"] * state["steps"] + state["step"]
            stage = before.get(trial.number)
            if stage is None or done < stage.done:
                stage = Stage(trial.name, "steps", total, now, done)
            stage.update(done, total, now)
            self._stages[trial.number] = stage

    def left(self, number: int) -> float | None:
        """Seconds that a trial still takes, if its pace is known."""
        stage = self._stages.get(number)
        return stage and stage.left(self._now)

    def whole(self) -> list[float]:
        """Seconds that each running trial takes from its start to its end, where known."""
        paces = [(stage.total, stage.per_second()) for stage in self._stages.values()]
        return [total / pace for total, pace in paces if pace]


@contextlib.contextmanager
def watch(
    controller: Controller,
    board: Any,
    console: Console,
    total: int,
    slots: int,
    stop: Stop,
    later: int = 0,
) -> Iterator[None]:
    """Show a controller's trials until the block ends: `total` in all, `slots` at a time.

    Up to `later` repeats may follow; they count for the time left. When `stop` has a signal, say
    so: the trials need seconds to end.
    """
    ended = threading.Event()

    def follow() -> None:
        states: Any = {}
        paces, printed = Paces(), {t.number for t in controller.trials if t.state in ENDED}
        last_note, last_line, told = "", 0.0, False
        live = Live(console=console, transient=True, auto_refresh=False)
        with contextlib.ExitStack() as shown:
            if console.is_terminal:
                shown.enter_context(no_key_echo())
                shown.enter_context(live)
            while True:
                finished = ended.wait(1.0)
                # Ray may answer late while processes start; the trials' states are known here.
                with contextlib.suppress(ray.exceptions.RayError):
                    states = ray.get(board.states.remote(), timeout=5)
                trials = list(controller.trials)
                paces.update(trials, states, time.monotonic())
                note = summary(trials, paces, total, slots, later)
                new = [t for t in trials if t.state in ENDED and t.number not in printed]
                printed |= {trial.number for trial in new}
                lines = [f"{ending(trial, trials)}; {note}" for trial in new]
                if stop.signal is not None and not told:
                    told = True
                    lines.append("stopping: the same command resumes the running trials")
                if console.is_terminal:
                    live.update(screen(trials, paces, note, console.height), refresh=True)
                elif not lines and note != last_note and time.monotonic() - last_line > LINE_EVERY:
                    lines = [note]
                if lines:
                    say(console, "\n".join(lines))
                    last_note, last_line = note, time.monotonic()
                if finished:
                    return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=10)


def screen(trials: Sequence[Trial], paces: Paces, note: str, height: int) -> Group:
    """The line on the whole sweep, which may wrap once, and as many trials as fit below it."""
    return Group(Text(note, "dim"), table(trials, paces, max(height - 5, 1)))


def table(trials: Sequence[Trial], paces: Paces, rows: int) -> Table:
    """The running trials and the best of the ended ones, each on one line."""
    made = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1, 0, 0))
    made.show_edge = made.pad_edge = False
    made.add_column("trial", no_wrap=True)
    made.add_column("settings", max_width=60)  # the column that gives way
    for name in ("epoch", "mAP", "img/s", "left"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("state", no_wrap=True)
    going = [trial for trial in trials if trial.state not in ENDED]
    going.sort(key=lambda trial: trial.state != "running")
    for trial in [*going, *_ranked(trials)][:rows]:
        settings = trial.label or describe(trial.values, digits=2)
        state, speed = paces.states.get(trial.number), trial.images_per_second
        made.add_row(
            trial.name,
            Text(settings, no_wrap=True, overflow="ellipsis"),
            f"{state['epoch'] + 1 if state else trial.epoch}",
            percent(trial),
            f"{speed:,.0f}" if speed else "–",
            "–" if trial.state in ENDED else duration(paces.left(trial.number)),
            Text(trial.state, _COLOURS.get(trial.state, "dim")),
        )
    return made


def summary(trials: Sequence[Trial], paces: Paces, total: int, slots: int, later: int = 0) -> str:
    """One line on the whole sweep: `total` trials, and up to `later` repeats after them."""
    counts = Counter(trial.state for trial in trials)
    running, ended = counts["running"], sum(counts[state] for state in ENDED)
    states = ", ".join(f"{counts[state]} {state}" for state in ENDED if counts[state])
    # Without what goes without saying, the line fits 80 columns.
    beside = f" ({states})" if ended > counts["finished"] else ""
    count = f"up to {total + later}" if later else f"{total}"
    parts = [f"{ended} of {count} trials ended{beside}", f"{running} running"]
    best = max((t for t in trials if t.evaluations), key=lambda t: t.score, default=None)
    if best is not None:
        parts.append(f"best mAP {percent(best)} ({best.name})")
    timed = [t for t in trials if t.state in ENDED and t.ended > t.began]
    took = [t.ended - t.began for t in timed] or paces.whole()
    # No scheduler stops a repeat.
    whole = [t.ended - t.began for t in timed if t.state == "finished"] or took
    left = None
    if took:
        mean = sum(took) / len(took)
        now, known = time.time(), []
        for trial in (t for t in trials if t.state == "running"):
            seconds = paces.left(trial.number)  # not known before some steps
            passed = now - trial.began if trial.began else 0
            known.append(max(mean - passed, 0) if seconds is None else seconds)
        repeats = sum(t.state == "queued" and t.repeats is not None for t in trials)
        ahead = max(total - ended - running - repeats, 0) * mean
        ahead += (repeats + later) * sum(whole) / len(whole)
        left = max((ahead + sum(known)) / slots, *known, 0.0)
        left = None if running and left < 1 else left  # it takes longer than the others did
    return f"{', '.join(parts)}; {duration(left)} left"


def ending(trial: Trial, trials: Sequence[Trial]) -> str:
    """`trial-003 finished, mAP 45.1, rank 2 of 4 (A 0.01, lr 0.0003)`."""
    parts = [f"{trial.name} {trial.state}"]
    if trial.evaluations:
        ranked = [t for t in _ranked(trials) if t.evaluations]
        parts += [f"mAP {percent(trial)}", f"rank {ranked.index(trial) + 1} of {len(ranked)}"]
    settings = trial.label or describe(trial.values)
    return f"{', '.join(parts)} ({settings})" + (f": {trial.reason}" if trial.reason else "")


def _ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Ended trials, the highest mAP first."""
    ended = [trial for trial in trials if trial.state in ENDED]
    return sorted(ended, key=lambda trial: -trial.score if trial.evaluations else 1.0)


def percent(trial: Trial) -> str:
    """`45.1`: mAP in percent, if there is one."""
    return f"{100 * trial.score:.1f}" if trial.evaluations else "–"


def describe(values: dict[str, Value], digits: int = 6) -> str:
    """`A 0.01, lr 0.0003`."""
    parts = []
    for field, value in values.items():
        name = SHORT.get(field, field.rpartition(".")[2])
        text = f"{value:.{digits}g}" if isinstance(value, float) else value
        parts.append(f"{name} {text}")
    return ", ".join(parts)
