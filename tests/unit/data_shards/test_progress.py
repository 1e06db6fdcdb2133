"""What a person sees of long work, on a terminal and in a log."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from data_shards import progress
from data_shards.progress import display, duration, phase, silent, wrap


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def log() -> Console:
    return Console(file=io.StringIO(), width=80)


def lines(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def run(clock: Clock, console: Console, counts: list[int], total: int, seconds: float) -> None:
    with display(console) as report:
        for count in counts:
            report("embedding gallery", count, total)
            clock.now += seconds


def test_a_long_stage_has_a_line_every_half_minute_and_one_at_its_end(clock):
    console = log()
    run(clock, console, list(range(0, 20001, 200)), 20000, 1.0)
    assert lines(console) == [
        "embedding gallery: 6,000 of 20,000 images, 200/s, 0:01:10 left",
        "embedding gallery: 12,000 of 20,000 images, 200/s, 0:00:40 left",
        "embedding gallery: 18,000 of 20,000 images, 200/s, 0:00:10 left",
        "embedding gallery: 20,000 images in 0:01:40, 200/s",
    ]


def test_no_time_left_is_made_up_where_the_total_is_not_known(clock):
    console = log()
    with display(console, units={"listing": "keys"}) as report:
        for done in range(0, 100_000, 1000):
            report("listing", done, -1)
            clock.now += 1.0
        report("listing", 99_500, 99_500)
    assert lines(console) == [
        "listing: 30,000 keys, 1,000/s",
        "listing: 60,000 keys, 1,000/s",
        "listing: 90,000 keys, 1,000/s",
        "listing: 99,500 keys in 0:01:40, 995/s",
    ]


def test_the_end_of_a_resumed_stage_counts_what_was_done_since(clock):
    console = log()
    run(clock, console, list(range(110, 201)), 200, 1.0)
    assert lines(console)[-1] == "embedding gallery: 90 of 200 images in 0:01:30, 1/s"


def test_a_short_stage_has_no_line(clock):
    console = log()
    run(clock, console, [0, 50, 100], 100, 1.0)
    assert lines(console) == []


def test_no_line_is_printed_twice(clock):
    console = log()
    run(clock, console, [0, 10] + [10] * 200, 100, 1.0)
    assert lines(console) == []  # at the only new figure the stage was 1 s old


def test_the_time_left_never_grows_while_the_pace_holds(clock):
    console = log()
    run(clock, console, list(range(0, 1001)), 1000, 1.0)
    left = [
        int(h) * 3600 + int(m) * 60 + int(s)
        for h, m, s in re.findall(r"(\d):(\d\d):(\d\d) left", "\n".join(lines(console)))
    ]
    assert left == sorted(left, reverse=True)
    assert left == [1000 - 30 * (k + 1) for k in range(len(left))]


def test_the_time_left_moves_gently_when_one_step_takes_long(clock):
    stage = progress.Stage("training", "steps", 1000, clock.now)
    for done in range(1, 121):
        clock.now += 1.0
        stage.update(done, 1000, clock.now)
    before = stage.left(clock.now)
    clock.now += 20.0
    stage.update(121, 1000, clock.now)
    after = stage.left(clock.now)
    assert before == pytest.approx(880)
    assert after is not None
    assert after < 1.5 * before  # by that step only it would be 17,580 s


def test_a_stage_that_begins_anew_is_timed_anew(clock):
    console = log()
    with display(console, unit="steps") as report:
        for first, pace in ((50, 5), (0, 1)):
            for k in range(32):
                report("training", first + pace * k, 1000)
                clock.now += 1.0
    assert lines(console) == [
        "training: 200 of 1,000 steps, 5/s, 0:02:40 left",
        "training: 30 of 1,000 steps, 1/s, 0:16:10 left",
    ]


def test_a_phase_is_named_as_it_begins(clock):
    console = log()
    with display(console) as report, phase(report, "starting Ray"):
        assert lines(console) == ["starting Ray"]
        clock.now += 12.0
    assert lines(console) == ["starting Ray", "starting Ray: done in 0:00:12"]


def test_units_belong_to_stages_and_notes_follow_the_figures(clock):
    console = log()
    with display(console, units={"ranking": "pairs"}) as report:
        report("ranking", 0, 100)
        clock.now += 40.0
        report("ranking", 40, 100, note="loss [b]")
    assert lines(console) == ["ranking: 40 of 100 pairs, 1/s, 0:01:00 left, loss [b]"]


def test_a_log_has_no_colour_codes_and_long_lines_are_whole(clock):
    console = log()
    with display(console) as report:
        report.print("x" * 200 + " [bold]y[/bold] [/b]")
    assert lines(console) == ["x" * 200 + " [bold]y[/bold] [/b]"]


def test_a_terminal_has_a_bar_while_a_stage_lasts_and_keeps_its_last_line(clock):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with display(console) as report:
        report("decoding [x]", 0, 100)
        clock.now += 20.0
        report("decoding [x]", 50, 100)
        clock.now += 20.0
        report("decoding [x]", 100, 100)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())  # type: ignore[attr-defined]
    assert "decoding [x] ━" in shown
    assert "decoding [x]: 100 images in 0:00:40, 2.5/s" in shown


INTERRUPTED = """
import time
from data_shards.progress import display, make_console
try:
    with display(make_console()) as report:
        for number in range(1000):
            report("training", number, 1000)
            time.sleep(0.05)
except KeyboardInterrupt:
    print("ended")
"""


def take_terminal() -> None:
    """Make standard input the process's terminal, and Ctrl-C a signal that is not ignored."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it


def test_ctrl_c_does_not_move_the_bar():
    keyboard, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], cwd=Path(__file__).parents[3],
        start_new_session=True, stdin=terminal, stdout=terminal, stderr=terminal,
        preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    while "of 1,000" not in shown.decode(errors="ignore"):
        shown += os.read(keyboard, 4096)
    assert not termios.tcgetattr(keyboard)[3] & termios.ECHOCTL
    os.write(keyboard, b"\x03")
    while b"ended" not in shown:
        shown += os.read(keyboard, 4096)
    assert b"^C" not in shown
    assert termios.tcgetattr(keyboard)[3] & termios.ECHOCTL
    assert process.wait(30) == 0
    os.close(keyboard)


def test_the_bar_of_a_training_fits_80_columns(clock):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    note = "epoch 118 of 220, loss 12.345, 1,246 images/s"
    with display(console, units={"training": "steps"}) as report:
        report("training", 0, 44_000)
        clock.now += 20.0
        report("training", 23_456, 44_000, note=note)
        time.sleep(0.3)  # for the next frame
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())  # type: ignore[attr-defined]
    assert "23,456 of 44,000 steps, 1,173/s, 0:00:18 left" in shown
    assert note in shown


@pytest.mark.parametrize(
    ("seconds", "words"), [(None, "?"), (0.4, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_the_module_does_not_import_rich():
    silent("x", 0, 1)
    code = "import sys, data_shards.progress; print('rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_square_brackets_are_text_and_lines_stay_whole():
    console = progress.make_console()
    console.file = io.StringIO()
    console.width = 40
    line = "model r50[bf16] [/b] [red] at :smile: " + "x" * 80
    console.print(line)
    assert lines(console) == [line]


NOTE = "models:/reid-people@champion was measured on few: give `a --b c` more, or nothing at all"


def test_a_note_breaks_between_words_on_a_terminal_and_commands_stay_whole():
    console = Console(file=io.StringIO(), force_terminal=True, width=36)
    progress.say(console, f"{NOTE}\n\n  x")
    said = lines(console)
    assert said == [
        "models:/reid-people@champion was",
        "measured on few: give `a --b c`",
        "more, or nothing at all",
        "",
        "  x",
    ]
    made = Console(file=io.StringIO(), force_terminal=True, width=8)
    progress.say(made, "see `a --b c` s3://long/address")
    assert lines(made) == ["see", "`a --b c`", "s3://long/address"]


def test_a_note_is_one_line_in_a_log():
    console = log()
    progress.say(console, NOTE)
    with display(console) as report:
        report.print(NOTE)
    assert lines(console) == [NOTE, NOTE]


@pytest.mark.parametrize("kind", ["error: ", ""])
def test_errors_and_warnings_break_like_a_note(kind):
    """In a process of its own: pytest takes over what is logged."""
    act = "raise ReidError(NOTE)" if kind else "logging.getLogger('data_shards').warning(NOTE)"
    code = (
        "import io, logging, sys\n"
        "from data_shards.command_line import run_command\n"
        "from data_shards.errors import ReidError\n"
        f"NOTE = {NOTE!r}\n"
        "sys.stderr.isatty = lambda: True\n"
        f"def main():\n    {act}\n"
        "run_command(main)"
    )
    env = os.environ | {"COLUMNS": "36"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert done.stderr.splitlines() == wrap(f"{kind}{NOTE}", 36).splitlines()
    assert len(done.stderr.splitlines()) > 1


def test_a_line_above_the_bars_breaks_between_words():
    console = Console(file=io.StringIO(), force_terminal=True, width=36)
    with display(console) as report:
        report.print(NOTE)
    assert lines(console)[0] == "models:/reid-people@champion was"


def test_a_table_never_shortens_or_wraps_a_name():
    console = progress.make_console()
    console.file = io.StringIO()
    console.width = 40
    table = Table("model", "run")
    name, run_name = "reid-r50[bf16]-" + "x" * 80, "[/b] a name"
    table.add_row(name, run_name)
    progress.print_table(console, table)
    assert any(name in line and run_name in line for line in lines(console))
    assert console.width == 40


@pytest.mark.parametrize(
    ("width", "terminal", "last"), [(30, True, "day"), (60, True, "run"), (30, False, "run")]
)
def test_a_table_leaves_its_last_columns_out_where_a_terminal_is_too_narrow(width, terminal, last):
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    table = Table("model", "day", "run", box=SIMPLE_HEAD)
    table.add_row("reid-people-b9b461ca", "2026-05", "a-run-with-a-name")
    progress.print_table(console, table, less=2)
    words = " ".join(lines(console)).split()
    assert [name for name in ("model", "day", "run") if name in words][-1] == last
    assert all(len(line) <= width or not terminal for line in lines(console))


def test_columns_of_a_table_that_is_too_wide_move_together():
    console = Console(file=io.StringIO(), width=30, soft_wrap=True)
    table = Table("model", "dataset", "run", box=SIMPLE_HEAD)
    table.add_row("reid-people", "people", "first")  # 35 columns with all margins
    progress.print_table(console, table)
    printed = lines(console)
    assert max(map(len, printed)) <= 30
    assert any(line.split() == ["reid-people", "people", "first"] for line in printed)


def test_every_console_is_made_in_one_place():
    """Another one would take square brackets in names for markup."""
    root = Path(progress.__file__).parents[1]
    for package in ("data_shards", "reid_train", "tune", "cluster"):
        for file in (root / package).rglob("*.py"):
            text = file.read_text()
            if file != Path(progress.__file__):
                assert not re.search(r"\bConsole\(", text), file
            assert not re.search(r"\[/?(bold|dim|red|green|yellow|cyan)\]", text), file
            assert "markup=True" not in text, file
