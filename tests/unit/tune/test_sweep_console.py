"""What a running sweep shows: the live table, the summary, and a line for each trial."""

from __future__ import annotations

import io
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions
from rich.console import Console
from trials import BASE, trained

from reid_train.runs.process import Stop
from tune.config import Sweep
from tune.console import Paces, describe, ending, screen, summary, table, watch
from tune.plan import make_plan
from tune.space import AMPLITUDE, THETA_MULTIPLIER
from tune.store import Trial
from tune.sweep import _Stages


def progress(epoch: int, step: int) -> dict[str, float]:
    return {"epoch": epoch, "epochs": 4, "step": step, "steps": 10, "images_per_second": 123.0}


def test_the_live_table_shows_speed_and_time_left():
    running = Trial(0, {AMPLITUDE: 0.01}, state="running")
    trials, paces = [running, trained(1, 0.5)], Paces()
    paces.update(trials, {"trial-000": progress(0, 5)}, now=100.0)
    assert paces.left(0) is None
    paces.update(trials, {"trial-000": progress(0, 10)}, now=110.0)
    assert paces.left(0) == pytest.approx(60.0)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(trials, paces, rows=2))
    text = console.export_text()
    assert "123" in text
    assert "0:01:00" in text
    assert "50.0" in text


def test_the_summary_estimates_the_time_left_before_a_trial_has_ended():
    trials, paces = [Trial(0, {}, state="running"), Trial(1, {})], Paces()
    assert summary(trials, paces, 4, 1) == "0 of 4 trials ended, 1 running; ? left"
    for step, now in ((5, 100.0), (10, 110.0)):
        paces.update(trials, {"trial-000": progress(0, step)}, now)
    # 60 s of this one, and three of 80 s.
    assert summary(trials, paces, 4, 1) == "0 of 4 trials ended, 1 running; 0:05:00 left"
    assert summary(trials, paces, 4, 2).endswith("0:02:30 left")
    assert summary(trials, paces, 4, 9).endswith("0:01:00 left")


def test_the_summary_counts_the_repeats_that_may_follow():
    trials = [trained(0, 0.5), trained(1, 0.4)]
    trials[1].state = "stopped"
    for trial, seconds in zip(trials, (100, 40), strict=True):
        trial.began, trial.ended = 1000.0, 1000.0 + seconds
    line = summary(trials, Paces(), 3, 2, later=4)
    assert line.startswith("2 of up to 7 trials ended (")
    # One of 70 s, and four that no scheduler stops of 100 s, two at a time.
    assert line.endswith("; 0:03:55 left")
    again = [Trial(2 + i, {}, repeats=0, seed=i) for i in range(4)]
    assert summary([*trials, *again], Paces(), 6, 2).endswith("; 0:03:20 left")


@pytest.mark.parametrize(
    ("given", "repeats"),
    [
        ({"trials": 20}, 0),
        ({"trials": 6, "seeds": 2}, 10),  # one is searched
        ({"trials": 20, "seeds": 3}, 18),
        ({"trials": 20, "seeds": 3, "constant_factors": ()}, 15),
    ],
)
def test_as_many_repeats_are_announced_as_may_follow(given, repeats):
    assert make_plan(Sweep(**given), BASE).repeats == repeats


@pytest.mark.parametrize(
    ("searched", "made", "total", "later"),
    [(0, 0, 6, 10), (6, 0, 6, 10), (6, 4, 10, 6), (5, 4, 10, 10), (6, 12, 18, 0)],
)
def test_a_search_that_continues_counts_the_repeats_that_are_there(
    monkeypatch, searched, made, total, later
):
    plan: Any = SimpleNamespace(settings=Sweep(trials=6, seeds=2), repeats=10, searcher=None)
    stages = _Stages(plan, *(None,) * 7)  # type: ignore[arg-type]
    monkeypatch.setattr(_Stages, "_run", lambda self, trials, searcher, *counts: counts)
    trials = [trained(i, 0.5) for i in range(searched)]
    trials += [trained(searched + i, 0.5, repeats=0, seed=i) for i in range(made)]
    assert stages.search(trials) == (total, later)


def test_no_time_is_left_only_when_nothing_runs():
    trials = [trained(0, 0.5), Trial(1, {}, state="running", began=time.time() - 600)]
    trials[0].began, trials[0].ended = 1000.0, 1060.0
    assert summary(trials, Paces(), 2, 1).endswith("; ? left")
    assert summary(trials[:1], Paces(), 1, 1).endswith("; 0:00:00 left")


def test_the_live_table_fits_the_terminal():
    values = {AMPLITUDE: 0.001417, "optimizer.learning_rate": 0.0001606, THETA_MULTIPLIER: 0.1862}
    trials = [trained(number, 0.5, values) for number in range(30)]
    trials[0].state, trials[0].reason = "failed", "the loss is not finite at step 12"
    trials += [Trial(30, values), Trial(31, values, state="running", images_per_second=1234.0)]
    console = Console(width=80, height=24, record=True, file=io.StringIO())
    console.print(screen(trials, Paces(), "7 of 30 trials ended", console.height))
    lines = console.export_text().splitlines()
    assert len(lines) <= 23
    assert lines[0] == "7 of 30 trials ended"
    rows = [line for line in lines if "trial-" in line]
    assert len(rows) > 14
    assert rows[0].startswith("trial-031"), "running ones are always seen"
    assert "A 0.0014, lr 0.00016, θ× 0.19" in rows[0]


def test_the_time_left_falls_while_the_pace_of_a_trial_is_not_known():
    began = time.time() - 45
    trials = [trained(0, 0.5), Trial(1, {}, state="running", began=began)]
    trials[0].began, trials[0].ended = 1000.0, 1060.0
    assert summary(trials, Paces(), 2, 1).endswith("; 0:00:15 left")


def test_the_summary_counts_trials_and_names_the_best():
    trials = [trained(0, 0.5), Trial(1, {}, state="failed", reason="x"), Trial(2, {})]
    line = summary(trials, Paces(), total=4, slots=2)
    assert line.startswith(
        "2 of 4 trials ended (1 finished, 1 failed), 0 running, best mAP 50.0 (trial-000); "
    )


def test_a_trial_that_ended_is_printed_with_its_rank():
    trials = [trained(0, 0.5, label="[b]paper[/b]"), trained(1, 0.7), trained(2, 0.6)]
    assert ending(trials[2], trials) == "trial-002 finished, mAP 60.0, rank 2 of 3 (A 0.01)"
    assert "rank 3 of 3 ([b]paper[/b])" in ending(trials[0], trials)
    failed = Trial(3, {AMPLITUDE: 0.1}, state="failed", reason="the loss is not finite")
    assert ending(failed, [*trials, failed]) == "trial-003 failed (A 0.1): the loss is not finite"


class SlowBoard:
    """A board that does not answer in time, as while many processes start."""

    class states:
        @staticmethod
        def remote():
            raise ray.exceptions.GetTimeoutError


def test_log_has_a_line_for_each_finished_trial_and_for_a_stop():
    sweep: Any = SimpleNamespace(trials=[Trial(0, {}, state="running")])
    text = io.StringIO()
    console = Console(file=text, width=60, soft_wrap=True, markup=False)
    stop = Stop()
    with watch(sweep, SlowBoard, console, 2, 1, stop):
        time.sleep(1.2)
        stop.ask(signal.SIGINT, None)
        sweep.trials = [trained(0, 0.5, label="paper")]
    assert (
        "trial-000 finished, mAP 50.0, rank 1 of 1 (paper); 1 of 2 trials ended" in text.getvalue()
    )
    assert text.getvalue().count("trial-000 finished") == 1
    assert text.getvalue().count("stopping: the same command resumes") == 1


def test_settings_are_described_shortly():
    assert describe({AMPLITUDE: 0.01, "batch.images": 4}) == "A 0.01, images 4"
