"""What a sweep found: the ranking, the verdict, and tables."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import tyro
from trials import BASE, searched_more, swept, trained

from data_shards.storage import open_storage
from reid_train.cli import Train
from reid_train.recipes import recipe
from tune.console import describe
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
from tune.space import AMPLITUDE, MODE, THETA_MULTIPLIER
from tune.store import HELD, Trial
from tune.sweep import common_cause, free


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
