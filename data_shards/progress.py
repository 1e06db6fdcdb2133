"""What a person sees of long work: live bars on a terminal, a plain line now and then in a log.

Every long function takes a `Progress` and calls it with `(stage, done, total)`; every command shows
these calls with `display`.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
import termios
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, what is done, and the total. The stage ends when `done` reaches
`total`. A stage with nothing to count has a total of 1: see `phase`. A total of -1 is not known."""

LINE_EVERY = 30.0  # seconds between two lines of a stage in a log
LONG = 10.0  # seconds from which a stage is long: its end gets a line
SMOOTHING = 60.0  # seconds over which the pace is averaged: older progress counts less and less


def silent(stage: str, done: int, total: int) -> None:
    """Show nothing."""


@contextlib.contextmanager
def phase(progress: Progress, name: str) -> Iterator[None]:
    """Report the block as a stage with nothing to count, such as "starting Ray"."""
    progress(name, 0, 1)
    yield
    progress(name, 1, 1)


def make_console(*, stderr: bool = False) -> Console:
    """The console of every command. It prints text as it is: no markup, and no breaks in lines."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, soft_wrap=True)


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a note as it is, broken between words on a terminal; in a log a line stays whole."""
    if console.is_terminal:
        text = wrap(text, console.width)
    console.print(text, markup=False, highlight=False, soft_wrap=True, style=style)


def wrap(text: str, width: int) -> str:
    """Break lines between words; a command in backticks stays whole, to be copied."""
    whole = re.sub("`[^`\n]*`", lambda found: found[0].replace(" ", "\0"), text)
    wrapper = textwrap.TextWrapper(width, break_on_hyphens=False, break_long_words=False)
    return "\n".join(map(wrapper.fill, whole.splitlines())).replace("\0", " ")


def print_places(console: Console, lines: Iterable[str]) -> None:
    """Print lines of a label and an address or command, two or more spaces apart.

    Where a terminal would break the address, it has a line of its own.
    """
    for line in lines:
        if console.is_terminal and len(line) > console.width:
            line = re.sub(" {2,}", "\n", line).lstrip("\n")
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_table(console: Console, table: Table, *, less: int = 0) -> None:
    """Print a table at its full width: no cell is wrapped or shortened, on narrow terminals too.

    Columns move together if they then fit; otherwise up to `less` of the last are left out there.
    """
    before = console.width
    console.width = 10_000
    if console.measure(table).maximum > before:
        table.show_edge = table.pad_edge = False
        table.padding = (0, 1, 0, 0)
    while less and console.is_terminal and console.measure(table).maximum > before:
        table.columns.pop()
        less -= 1
    console.width = max(before, console.measure(table).maximum)
    console.print(table, crop=False)
    console.width = before


def duration(seconds: float | None) -> str:
    """Seconds as `1:02:03`, or `?` for None."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


@dataclass
class Stage:
    """One stage's progress, and its pace as a moving average."""

    name: str
    unit: str  # what is counted, such as "images"; empty for a phase
    total: int  # -1: not known yet
    began: float  # `time.monotonic()` of the first report
    done: int = 0
    note: str = ""  # what is shown after the figures
    later: float = 0.0  # seconds that the whole takes beside this stage's own: evaluations
    first: int = field(init=False)  # what was done before
    seen: float = field(init=False)  # when `done` last grew
    reported: float = field(init=False)
    lined: float = field(init=False)  # when a line was last printed
    _amount: float = 0.0
    _seconds: float = 0.0

    def __post_init__(self) -> None:
        self.first = self.done
        self.seen = self.reported = self.lined = self.began

    def update(self, done: int, total: int, now: float) -> None:
        """Take a report."""
        if done > self.done:
            seconds = now - self.seen
            keep = math.exp(-seconds / SMOOTHING)
            self._amount = self._amount * keep + done - self.done
            self._seconds = self._seconds * keep + seconds
            self.done, self.seen = done, now
        self.total, self.reported = total, now

    def per_second(self) -> float | None:
        """The pace; None before there is one."""
        return self._amount / self._seconds if self._amount and self._seconds else None

    def left(self, now: float) -> float | None:
        """Seconds to the end, if the pace is known."""
        pace = self.per_second()
        if pace is None:
            return None
        return self.later + max((self.total - self.done) / pace - (now - self.seen), 0)

    def __str__(self) -> str:
        """`3,200 of 19,732 images, 410/s, 0:00:40 left`; of a phase the time since its start."""
        now = time.monotonic()
        if not self.unit:
            return duration(now - self.began)
        of = f" of {self.total:,}" if self.total >= 0 else ""
        counts, left = f"{self.done:,}{of} {self.unit}", self.left(now)
        if self.total < 0 and left is not None:
            return f"{counts}{_rate(self.per_second())}"
        if left is None:
            return f"{counts}, {duration(now - self.began)}"  # a clock, until there is a pace
        beside = f" ({duration(self.later)} to evaluate)" if self.later >= 1 else ""
        return f"{counts}{_rate(self.per_second())}, {duration(left)} left{beside}"

    @property
    def lines(self) -> str:
        """The same, and the note on a line of its own: 80 columns have no room for both."""
        return f"{self}\n{self.note}" if self.note else f"{self}"

    def ending(self, seconds: float) -> str:
        """`19,732 images in 0:00:48, 411/s`; only what was done here: a run may be resumed."""
        if not self.unit:
            return f"done in {duration(seconds)}"
        done = self.total - self.first
        what = f"{self.total:,}" if done == self.total else f"{done:,} of {self.total:,}"
        return f"{what} {self.unit} in {duration(seconds)}{_rate(done / seconds)}"


def _rate(per_second: float | None) -> str:
    if per_second is None:
        return ""
    return f", {per_second:,.0f}/s" if per_second >= 10 else f", {per_second:.2g}/s"


class Display:
    """A `Progress` that shows what it is told; get one from `display`."""

    def __init__(self, console: Console, units: Mapping[str, str], unit: str) -> None:
        self.console = console
        self._units, self._unit = units, unit
        self._stages: dict[str, Stage] = {}
        self._lock = threading.Lock()
        self._bars = _bars(console) if console.is_terminal else None
        self._tasks: dict[str, Any] = {}

    def __call__(
        self, stage: str, done: int, total: int, note: str = "", later: float = 0.0
    ) -> None:
        """Take a report, from any thread; for `note` and `later` see `Stage`."""
        with self._lock:
            now = time.monotonic()
            shown = self._stages.get(stage)
            if shown is None or done < shown.done:
                self._remove(stage)
                unit = self._units.get(stage, self._unit) if total not in (0, 1) else ""
                shown = self._stages[stage] = Stage(stage, unit, total, now, done)
                self._begin(shown)
            shown.note, shown.later = note, later
            # A stage within another, such as an evaluation, does not slow that one's pace down.
            for outer in self._stages.values():
                if outer.began < shown.began:
                    outer.seen += now - shown.reported
            shown.update(done, total, now)
            if 0 <= total <= done:
                self._remove(stage)
                if now - shown.began >= LONG:
                    self.print(f"{stage}: {shown.ending(now - shown.began)}")
            elif self._bars is not None:
                known = total if total >= 0 else None
                self._bars.update(self._tasks[stage], completed=done, total=known)
            elif shown.unit and now - shown.lined >= LINE_EVERY and shown.seen == now:
                shown.lined = now
                self.print(f"{stage}: {shown}{shown.note and f', {shown.note}'}")

    def remove(self, *stages: str) -> None:
        """Take stages off the screen that ended, or were left, before their total."""
        with self._lock:
            for stage in stages:
                self._remove(stage)

    def print(self, text: str) -> None:
        """Print a line that stays, above the bars."""
        say(self.console, text)

    def _begin(self, stage: Stage) -> None:
        if self._bars is not None:
            total = stage.total if stage.unit and stage.total >= 0 else None
            self._bars.start()  # not before there is something to show: it leaves an empty line
            self._tasks[stage.name] = self._bars.add_task(stage.name, total=total, stage=stage)
        elif not stage.unit and stage.done < stage.total:
            self.print(stage.name)

    def _remove(self, stage: str) -> None:
        if self._stages.pop(stage, None) is not None and self._bars is not None:
            self._bars.remove_task(self._tasks.pop(stage))


@contextlib.contextmanager
def display(
    console: Console | None = None, *, units: Mapping[str, str] | None = None, unit: str = "images"
) -> Iterator[Display]:
    """Show the progress of the block on a console, by default standard error.

    On a terminal each stage has a bar while it lasts; in a log a long stage has a line every
    `LINE_EVERY` seconds if there is something new, and a phase a line when it begins. In both, a
    long stage leaves a line when it ends. `units` has what a stage counts, by its name; all others
    count `unit`. The `print` of the `Progress` that is yielded prints a line above the bars.
    """
    shown = Display(console or make_console(stderr=True), units or {}, unit)
    if shown._bars is None:
        yield shown
        return
    with no_key_echo():
        try:
            yield shown
        finally:
            shown._bars.stop()


@contextlib.contextmanager
def no_key_echo() -> Iterator[None]:
    """Keep the terminal from showing Ctrl-C as ^C: that moves a full line, which then stays."""
    try:
        keyboard = sys.stdin.fileno()
        before = termios.tcgetattr(keyboard)
        # A process in the background would be stopped for changing the terminal.
        in_front = os.tcgetpgrp(keyboard) == os.getpgrp()
    except (OSError, ValueError, termios.error):
        in_front = False  # no terminal
    if not in_front:
        yield
        return
    flags = 3  # of `tcgetattr`: the local modes
    quiet = [*before[:flags], before[flags] & ~termios.ECHOCTL, *before[flags + 1 :]]
    termios.tcsetattr(keyboard, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSANOW, before)


def _bars(console: Console) -> Any:
    """The bars on a terminal, not started."""
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[stage].lines}", style="cyan", markup=False),
        console=console,
        transient=True,
        expand=True,
        # What is printed meanwhile appears above the bars, unless it goes into a file.
        redirect_stdout=sys.stdout.isatty(),
    )
