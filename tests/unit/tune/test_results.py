"""What a sweep found, in words, tables and pictures."""

from __future__ import annotations

import io
import shlex
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray.exceptions
import tyro
from matplotlib.image import imread
from rich.console import Console

from data_shards.storage import open_storage
from reid_train.cli import Train
from reid_train.config import TrainConfig
from reid_train.recipes import recipe
from reid_train.runs.process import Stop
from reid_train.training.history import History
from tune import plots
from tune.console import Paces, describe, ending, summary, table, watch
from tune.results import command, held, markdown, ranking, survivors, verdict
from tune.space import AMPLITUDE, MODE, THETA_MULTIPLIER, build, default, draw, first_points
from tune.store import HELD, Trial
from tune.sweep import common_cause

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


def test_the_best_come_first():
    assert [e.trial.number for e in ranking(swept(), BASE)] == [5, 6, 0, 2, 3, 1, 4]


def test_repeated_configurations_come_first_and_count_by_their_fresh_seeds():
    entries = ranking(swept({6: [0.62, 0.62], 5: [0.60, 0.58]}), BASE)
    assert [e.trial.number for e in entries][:3] == [6, 5, 0]
    assert entries[1].mean == pytest.approx(0.59)
    assert entries[1].measured() == "59.0 ± 1.4"
    assert entries[1].best.number == 5


def test_survivors_are_the_best_and_one_of_each_yardstick():
    assert [t.number for t in survivors(swept(), BASE, 1)] == [5, 0, 2, 4]
    assert [t.number for t in survivors(swept(), BASE, 3)] == [5, 6, 0, 2, 4]


def searched_more() -> list[Trial]:
    """A sweep in which enough is searched to name a best."""
    return [*swept(), trained(7, 0.58, {AMPLITUDE: 0.03}), trained(8, 0.57, {AMPLITUDE: 0.04})]


def test_without_repeats_the_verdict_says_that_nothing_is_known_of_the_spread():
    lines = verdict(ranking(searched_more(), BASE))
    assert len(lines) == 3
    best = "The best adaptive configuration (trial-005, mAP 64.0) against"
    assert lines[0].startswith(f"{best} the paper's setting (trial-000, 60.0): +4.0")
    assert "constant L2 (trial-002, 59.0): +5.0" in lines[1]
    assert "no L2 (trial-004, 50.0): +14.0" in lines[2]
    assert all("shows nothing of the spread" in line for line in lines)


def test_of_few_searched_configurations_none_is_called_the_best():
    lines = verdict(ranking(swept(), BASE))
    assert lines[0].startswith("Only 2 searched configurations ended: too few to call one the best")
    assert lines[1].startswith("The highest of few (trial-005, mAP 64.0) against the paper's")


def test_a_tie_is_called_a_tie():
    trials = [*searched_more(), trained(9, 0.6401, {AMPLITUDE: 0.001})]
    lines = verdict(ranking(trials, BASE))
    assert lines[0] == "2 adaptive configurations are tied at 64.0: trial-009, trial-005."
    assert lines[1].startswith("The first of the tied (trial-009, mAP 64.0) against the paper's")


@pytest.mark.parametrize(
    ("adaptive", "constant", "words"),
    [
        ([0.60, 0.64], [0.59, 0.61], "+2.0, within the spread of the difference (± 3.2)"),
        ([0.64, 0.641], [0.59, 0.591], "+5.0, beyond the spread of the difference (± 0.1)"),
        ([0.58, 0.581], [0.59, 0.591], "−1.0, beyond the spread of the difference (± 0.1)"),
    ],
)
def test_the_verdict_compares_the_difference_with_its_spread(adaptive, constant, words):
    said = verdict(ranking(swept({5: adaptive, 2: constant}), BASE))
    assert words in next(line for line in said if "constant L2" in line)


def test_the_best_adaptive_configuration_is_compared_with_itself_with_no_factor_learnt():
    trials = swept({6: [0.64, 0.66], 5: [0.60, 0.58]})
    (wanted,) = held(trials, BASE)
    assert wanted.repeats == 6
    assert wanted.values == {AMPLITUDE: 0.01, THETA_MULTIPLIER: 0.0}
    assert wanted.config(BASE).regularization.mode == "adaptive"
    chosen = [t.number for t in survivors(trials, BASE, 1)]
    trials += [
        trained(len(trials) + i, score, wanted.values, HELD, repeats=6, seed=i)
        for i, score in enumerate((0.62, 0.64), 1)
    ]
    entries = ranking(trials, BASE)
    assert [e.title for e in entries][:2] == [describe({AMPLITUDE: 0.01}), "trial-006, λ held"]
    assert entries[0].mean == pytest.approx(0.65), "held ones do not count for it"
    (said,) = (line for line in verdict(entries) if "λ held where it starts" in line)
    assert "63.0 ± 1.4): +2.0" in said
    assert [t.number for t in survivors(trials, BASE, 1)] == chosen


def test_a_sweep_without_baselines_has_no_verdict():
    assert verdict(ranking([trained(0, 0.5)], BASE))[-1] == "There is no baseline to compare with."
    assert "No adaptive" in verdict(ranking([trained(0, 0.5, {MODE: "none"})], BASE))[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"regularization__amplitude": 0.01234, "optimizer__learning_rate": 3.21e-4},
        {"compile": True, "evaluation__mirror": False, "optimizer__clip_norm": 5.0},
        {"regularization__exclude": ("*.bias", "head*"), "batch__steps_per_epoch": None},
        {"regularization__amplitudes__kernel": 0.1, "model__weights": "a b.safetensors"},
    ],
)
def test_the_command_line_trains_the_same_configuration(changes):
    config = BASE.replace(**changes)
    words = shlex.split(command(config, "s3://b/runs"))
    assert words[:4] == ["python", "-m", "reid_train", "train"]
    parsed = tyro.cli(
        Train,
        default=Train(recipe("demo")),
        args=words[4:],
        config=(tyro.conf.AvoidSubcommands,),
    ).config
    assert parsed == config.replace(output="s3://b/runs", name=None)


def test_trials_that_all_failed_are_one_line_with_the_common_cause():
    def failed(number: int, reason: str) -> Trial:
        return Trial(number, {}, state="failed", reason=reason)

    trials = [failed(n, f"the loss is not finite at step {n + 3}") for n in range(4)]
    assert common_cause(trials) == (
        "none of 4 trials was trained to its end; 4 failed, all as trial-000: "
        "the loss is not finite at step 3"
    )
    trials += [failed(4, "memory ran out"), Trial(5, {}, state="stopped", reason="behind others")]
    text = common_cause(trials)
    assert text.startswith(
        "none of 6 trials was trained to its end; 5 failed, 4 of them as trial-0"
    )
    assert "memory" not in text


def test_tables_name_every_trial():
    trials = swept()
    trials.append(Trial(7, {AMPLITUDE: 0.5}, state="failed", reason="the loss is not finite"))
    text = markdown(ranking(trials, BASE), trials)
    assert all(trial.name in text for trial in trials)
    assert "failed: the loss is not finite" in text


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
    console.print(table(trials, paces))
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


@pytest.mark.parametrize("count", [0, 1, 12])
def test_a_sweep_of_any_size_is_drawn(tmp_path: Path, count: int):
    base = TrainConfig().replace(**{"optimizer__epochs": 4, "optimizer__frozen_epochs": 0})
    extra = {"batch.images": "choice(2, 4)", "loss.label_smoothing": "uniform(0, 0.3)"}
    space = build(default(base) | extra, base)
    rng = np.random.default_rng(0)
    trials = swept() if count else [trained(0, 0.5, {MODE: "none"})]
    storage = open_storage(str(tmp_path / "sweep"))
    history = History()
    history.tensor_names, history.tensor_kinds = ["a", "b"], ["kernel", "bias"]
    for step in range(5):
        history.add_factors(step, np.array([0.002, 0.001 * (4 - step)], np.float32))
    for number in range(len(trials), len(trials) + count):
        trials.append(trained(number, 0.5 + 0.1 * rng.random(), draw(space, rng)))
        folder = tmp_path / "sweep" / f"trial-{number:03d}" / "c4"
        folder.mkdir(parents=True)
        history.save(folder / "history.safetensors")
    if count > 1:
        trials[-1].state, trials[-1].reason = "stopped", "behind others"
        trials[-2].state, trials[-2].reason = "failed", "the loss is not finite"
    out = tmp_path / "report"
    missing = plots.draw(out, trials, ranking(trials, base), base, space, storage)
    names = {"landscape", "parallel", "slice", "importance", "timeline", "factors"}
    drawn = {path.stem for path in out.iterdir()}
    assert drawn >= {"landscape", "timeline"}
    assert drawn == names if count else drawn < names
    assert {name for name in names if f"{name}.png" in " ".join(missing)} == names - drawn
    for path in out.iterdir():
        height, width, _ = imread(path).shape
        assert width > 900
        assert height > 200
