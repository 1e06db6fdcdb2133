"""What a sweep found, in words, tables and pictures."""

from __future__ import annotations

import importlib
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

from data_shards.errors import ConfigError
from data_shards.storage import open_storage
from reid_train.cli import Train
from reid_train.config import TrainConfig
from reid_train.recipes import recipe
from reid_train.runs.process import Stop
from reid_train.training.history import History
from tune import plots
from tune.config import Sweep
from tune.console import Paces, describe, ending, screen, summary, table, watch
from tune.plan import make_plan
from tune.results import (
    HEADER,
    command,
    held,
    markdown,
    ranking,
    rows,
    survivors,
    too_few,
    verdict,
)
from tune.space import AMPLITUDE, MODE, THETA_MULTIPLIER, build, default, draw, first_points
from tune.store import HELD, Trial
from tune.sweep import _Stages, common_cause, free

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
    assert lines[0].startswith(
        "Searched configurations that ended: 2, too few to call one the best"
    )
    who = "The highest-ranked adaptive configuration (trial-005, mAP 64.0)"
    assert lines[1].startswith(f"{who} against the paper's")


def test_a_baseline_that_ranks_highest_is_not_called_searched_or_best():
    trials = swept({0: [0.82, 0.83], 2: [0.83, 0.84], 5: [0.53, 0.54]})
    entries = ranking([t for t in trials if t.number != 6], BASE)  # one searched
    assert too_few(entries)
    lines = verdict(entries)
    assert "repeated with fresh seeds rank first" in lines[0]
    assert lines[1].startswith(
        "Searched configurations that ended: 1, too few to call one the best"
    )
    who = "The highest-ranked adaptive configuration (trial-000, the paper's setting, mAP 82.5"
    assert all(line.startswith(who) for line in lines[2:])
    assert "constant L2 (trial-002, 83.5 ± 0.7): −1.0" in lines[2]


def test_few_and_tied_are_both_told():
    trials = swept()
    trials[6].evaluations[-1]["mAP"] = 0.6401
    lines = verdict(ranking(trials, BASE))
    assert lines[0].startswith("Searched configurations that ended: 2")
    assert lines[1].startswith("2 adaptive configurations are tied at 64.0")


def test_the_ranking_tells_repeated_configurations_from_those_trained_once():
    assert not too_few(ranking(searched_more(), BASE))
    assert "rank first" not in verdict(ranking(searched_more(), BASE))[0]
    found = rows(ranking(swept({5: [0.60, 0.58]}), BASE))
    assert [cells[HEADER.index("fresh seeds")] for cells in found] == ["2", *"–" * 6]


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


@pytest.mark.parametrize("own", [True, False])
def test_the_best_is_not_compared_with_held_factors_of_another_configuration(own):
    """The sweep was extended: first trial 5 was the best, now it is trial 6."""
    trials = swept({6: [0.64, 0.66], 5: [0.63, 0.63]})
    for number, score in ((5, 0.635), (6, 0.60))[: 1 + own]:
        values = trials[number].values | {THETA_MULTIPLIER: 0.0}
        trials.append(trained(len(trials), score, values, HELD, repeats=number, seed=1))
    said = [line for line in verdict(ranking(trials, BASE)) if "λ held" in line]
    assert len(said) == own
    assert all("(trial-012, 60.0): +5.0" in line for line in said)


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


@pytest.mark.parametrize(("state", "kept"), [("finished", {"c2", "c4"}), ("stopped", set())])
def test_an_ended_trial_keeps_the_checkpoints_that_its_sweep_needs(tmp_path: Path, state, kept):
    trial = trained(0, 0.5)
    trial.state, trial.evaluations[0]["mAP"] = state, 0.6
    names = {name: f"checkpoint_{name}" for name in ("c2", "c3", "c4")}
    for evaluation in trial.evaluations:
        evaluation["checkpoint"] = names[evaluation["checkpoint"]]
    for run in ("trial-000", "trial-001"):
        for name in names.values():
            open_storage(str(tmp_path / run)).write(f"{name}/model.safetensors", b"x")
    open_storage(str(tmp_path / "trial-000")).write("run.json", b"{}")
    free(trial, str(tmp_path))
    left = {path.name for path in (tmp_path / "trial-000").iterdir()}
    assert left == {"run.json"} | {names[name] for name in kept}
    assert len(list((tmp_path / "trial-001").iterdir())) == 3


def test_of_equal_evaluations_the_newest_is_the_best_as_its_checkpoint_is_kept():
    trial = trained(0, 0.5)
    for evaluation in trial.evaluations:
        evaluation["mAP"] = 0.7
    assert trial.best is trial.evaluations[-1]


def test_an_evaluation_without_its_checkpoint_replaces_none():
    trial = Trial(0, {}, state="running")
    assert trial.add({"epoch": 2, "step": 4, "mAP": 0.5, "checkpoint": "c2"})
    assert not trial.add({"epoch": 2, "step": 4, "mAP": 0.5, "checkpoint": ""})
    assert trial.add({"epoch": 1, "step": 2, "mAP": 0.4, "checkpoint": ""})
    assert [e["checkpoint"] for e in trial.evaluations] == ["", "c2"]


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
        trials[-3].state, trials[-3].reason = "failed", "is not a valid configuration"
        trials[-3].values |= {"optimizer.learning_rate": 1e-9}
        with pytest.raises(ConfigError):
            trials[-3].config(base)
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


def test_the_landscape_names_what_the_ranking_names(tmp_path: Path, monkeypatch):
    base = TrainConfig().replace(**{"optimizer__epochs": 4, "optimizer__frozen_epochs": 0})
    space, said = build(default(base), base), []

    def note(axes, x, y, text, colour, side):
        said.append(text)

    module = importlib.import_module("tune.plots.landscape")  # `plots` has the function there
    monkeypatch.setattr(module, "_point_out", note)
    few, more = swept({0: [0.82, 0.83], 5: [0.53, 0.54]}), searched_more()
    for trials in (few, more):
        entries = ranking(trials, base)
        module.landscape(tmp_path / "a.png", trials, entries, base, space)
    assert said == ["paper 82.5%", "best 64.0%", "paper 60.0%"]


def test_a_few_points_have_no_parallel_coordinates(tmp_path: Path):
    base = TrainConfig().replace(**{"optimizer__epochs": 4, "optimizer__frozen_epochs": 0})
    trials, space = swept(), build(default(base), base)
    storage = open_storage(str(tmp_path / "sweep"))
    missing = plots.draw(tmp_path / "r", trials, ranking(trials, base), base, space, storage)
    assert "No importance.png and parallel.png: they need 4 finished trials" in missing[0]
    assert (tmp_path / "r" / "slice.png").exists()
    assert not (tmp_path / "r" / "parallel.png").exists()
