"""The driver's mind: what comes next, what is stopped, and what a killed driver leaves behind."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from data_shards.errors import ConfigError
from data_shards.storage import open_storage
from reid_train.recipes import recipe
from tune.asha import Halving
from tune.config import Sweep, default_name
from tune.controller import RETRIES, Study
from tune.population import Population, exchange, explore
from tune.searchers import Chance, Grid, Listed, Proposer, Tpe, importance
from tune.space import AMPLITUDE, LEARNING_RATE, Point, build, default, first_points
from tune.store import Book, Trial

BASE = recipe("demo").replace(
    data="d", output="o", name="s", optimizer__epochs=8, evaluation__every=1
)
SPACE = build(default(BASE), BASE)
SETTINGS = Sweep(trials=20, ranges=default(BASE))


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(open_storage(str(tmp_path)))


def first() -> list[Trial]:
    points = first_points(BASE, SETTINGS.constant_factors)
    return [Trial(i, p.values, p.label, BASE.seed) for i, p in enumerate(points)]


def report(epoch: int, score: float) -> dict:
    return {"epoch": epoch, "step": epoch * 10, "mAP": score, "checkpoint": f"c{epoch}"}


def quality(trial: Trial) -> float:
    """A smooth mAP with its best at A = 0.01 and a learning rate of 3e-4."""
    config = trial.config(BASE)
    a, lr = np.log10(config.regularization.amplitude), np.log10(config.optimizer.learning_rate)
    return 0.8 - 0.1 * (a + 2) ** 2 - 0.1 * (lr + 3.5) ** 2


def play(study: Study, limit: int = 1000) -> None:
    """Run the study's trials one at a time, without training anything."""
    for _ in range(limit):
        trial = study.next()
        if trial is None:
            return
        for epoch in range(trial.epoch + 1, (trial.until or BASE.total_epochs) + 1):
            if study.result(trial.number, report(epoch, quality(trial) * (1 - 0.5**epoch))):
                break
        study.finish(trial.number)
    raise AssertionError("the study does not end")


def proposer(name: str) -> Proposer:
    return {
        "tpe": lambda: Tpe(SETTINGS, SPACE, BASE),
        "random": lambda: Chance(SETTINGS, SPACE, BASE),
        "grid": lambda: Grid(SETTINGS, SPACE, BASE, len(first())),
        "population": lambda: Population(8, 2, SPACE, BASE, len(first())),
    }[name]()


@pytest.mark.parametrize("name", ["tpe", "random", "grid", "population"])
def test_a_search_begins_with_the_first_points_and_ends(book, name):
    study = Study(book, BASE, first(), proposer(name))
    play(study)
    assert study.over
    labels = [trial.label for trial in study.trials[:5]]
    assert labels == ["paper", "constant 5e-05", "constant 0.0005", "constant 0.0025", "no L2"]
    expected = {"grid": 5 + 8, "population": 5 + 8}.get(name, SETTINGS.trials)
    assert len(study.trials) == expected
    assert all(trial.state == "finished" for trial in study.trials)


def test_tpe_looks_where_it_was_good(book):
    study = Study(book, BASE, [], Tpe(Sweep(trials=60, ranges=default(BASE)), SPACE, BASE))
    play(study)
    scores = [quality(trial) for trial in study.trials]
    assert np.mean(scores[-20:]) > np.mean(scores[:15]) + 0.03


@pytest.mark.parametrize("name", ["tpe", "random", "grid", "population"])
def test_a_killed_driver_goes_on_and_runs_nothing_twice(book, name):
    whole = Study(Book(book.storage.child("whole")), BASE, first(), proposer(name))
    play(whole)
    begun: list[tuple[int, int]] = []

    def note(trial: Trial) -> None:
        begun.append((trial.number, trial.part))

    study = Study(book, BASE, first(), proposer(name), on_begin=note)
    with pytest.raises(AssertionError, match="does not end"):
        play(study, limit=7)
    open_trial = study.next()
    assert open_trial is not None
    study.result(open_trial.number, report(open_trial.epoch + 1, 0.3))

    trials = book.trials()
    again = Study(book, BASE, [*trials, *first()[len(trials) :]], proposer(name), on_begin=note)
    play(again)
    assert again.over
    last = begun.pop(7)  # what was cut off is begun again, and first
    assert begun[7] == last
    assert len(set(begun)) == len(begun)
    assert len(again.trials) == len(whole.trials)
    assert len({tuple(t.values.items()) for t in again.trials}) == len(again.trials)
    if name != "tpe":  # the cut one was learnt of in another order
        assert [t.values for t in again.trials] == [t.values for t in whole.trials]


def test_halving_stops_what_lags_behind_but_no_first_point(book):
    settings = Sweep(trials=30, ranges=default(BASE), reduction=2)
    halving = Halving(settings, BASE, [])
    study = Study(book, BASE, first(), Chance(settings, SPACE, BASE), halving)
    play(study)
    states = [trial.state for trial in study.trials]
    assert set(states[:5]) == {"finished"}
    assert states.count("stopped") > 10
    finished = [quality(t) for t in study.trials[5:] if t.state == "finished"]
    stopped = [t for t in study.trials if t.state == "stopped"]
    assert np.mean(finished) > np.mean([quality(t) for t in stopped])
    assert all("behind others after" in trial.reason for trial in stopped)


def test_tpe_learns_from_trials_that_halving_stopped(book):
    halving = Halving(SETTINGS, BASE, [])
    study = Study(book, BASE, first(), Tpe(SETTINGS, SPACE, BASE), halving)
    play(study)
    assert study.over
    assert {"finished", "stopped"} == {trial.state for trial in study.trials}


def test_halving_remembers_what_the_book_holds(book):
    settings = Sweep(trials=30, ranges=default(BASE), reduction=2)
    halving = Halving(settings, BASE, [])
    study = Study(book, BASE, first(), Chance(settings, SPACE, BASE), halving)
    play(study)
    again = Halving(settings, BASE, book.trials())
    for epoch, score in ((1, 0.2), (1, 0.5), (2, 0.4), (4, 0.7)):
        newcomer = Trial(100 + epoch, {})
        verdicts = [h.stops(newcomer, report(epoch, score)) for h in (halving, again)]
        assert verdicts[0] == verdicts[1]


def test_a_failed_trial_has_its_reason_and_is_not_run_again(book):
    ended = []
    study = Study(book, BASE, first()[:2], Listed(), on_end=ended.append)
    trial = study.next()
    assert trial is not None
    study.result(trial.number, report(1, 0.2))
    study.result(trial.number, {"failure": "the loss is not finite at step 12"})
    study.finish(trial.number)
    assert (trial.state, trial.reason) == ("failed", "the loss is not finite at step 12")
    assert ended == [trial]
    following = study.next()
    assert following is not None
    assert following.number == 1
    study.result(1, {"failure": "another reason"})
    assert study.over
    assert [t.state for t in book.trials()] == ["failed", "failed"]
    assert Study(book, BASE, book.trials(), Listed()).next() is None


def test_a_lost_trial_is_run_again_and_given_up_when_it_gets_no_further(book):
    study = Study(book, BASE, first()[:1], Listed())
    trial = study.next()
    for _ in range(RETRIES):
        study.lost(0, "its node was lost")
        assert study.next() is trial
    study.result(0, report(1, 0.2))
    for _ in range(RETRIES):
        study.lost(0, "its node was lost")
        assert study.next() is trial
    study.lost(0, "its node was lost")
    assert study.over
    (saved,) = book.trials()
    assert saved.state == "failed"
    assert saved.reason == f"given up after {RETRIES + 1} tries: its node was lost"


def test_a_configuration_that_cannot_run_fails_and_the_next_is_taken(book):
    trials = [Trial(0, {LEARNING_RATE: 1e-9}), Trial(1, {LEARNING_RATE: 1e-3})]
    study = Study(book, BASE, trials, Listed())
    trial = study.next()
    assert trial is not None
    assert trial.number == 1
    assert trials[0].state == "failed"
    assert "minimum-learning-rate" in trials[0].reason


def test_a_report_that_the_last_driver_missed_is_taken_from_the_kept_checkpoints(book):
    study = Study(book, BASE, [Trial(0, {})], Listed())
    assert study.next() is not None
    study.result(0, report(1, 0.2))
    study.result(0, {"kept": [report(8, 0.6), report(7, 0.65)]})
    study.finish(0)
    assert [e["epoch"] for e in study.trials[0].evaluations] == [1, 7, 8]
    assert study.trials[0].score == 0.65
    assert study.trials[0].state == "finished"


# --- population -------------------------------------------------------------------------------


def test_the_worst_quarter_takes_checkpoints_of_the_best_quarter():
    members = [Trial(i, {}, evaluations=[report(2, i / 10)]) for i in range(8)]
    taken = exchange(members, np.random.default_rng(0))
    assert set(taken) == {0, 1}
    assert set(taken.values()) <= {6, 7}
    assert exchange(members[:1], np.random.default_rng(0)) == {}


def test_explored_settings_stay_near_or_inside():
    rng = np.random.default_rng(0)
    values = {AMPLITUDE: 0.04, LEARNING_RATE: 3e-4, "regularization.theta_lr_multiplier": 1.0}
    for _ in range(200):
        moved = explore(values, SPACE, rng)
        Point(moved).apply(BASE)
        for name, dimension in SPACE.items():
            assert dimension.low * 0.999 <= moved[name] <= dimension.high * 1.001  # type: ignore
        assert moved != values


def test_a_member_goes_on_from_its_own_or_its_donors_checkpoint(book):
    population = Population(4, 2, SPACE, BASE, 0)
    study = Study(book, BASE, [], population)
    for _ in range(4):
        trial = study.next()
        assert trial is not None
        assert (trial.part, trial.start, trial.until) == (0, None, 2)
        study.result(trial.number, report(1, quality(trial) / 2))
        study.result(trial.number, report(2, quality(trial)))
        study.finish(trial.number)
    ranked = sorted(study.trials, key=quality)
    before = {t.number: dict(t.values) for t in ranked}
    worst, best = ranked[0].number, ranked[-1].number
    trial = study.next()
    assert trial is not None
    parts = {t.number: t for t in study.trials}
    assert parts[worst].start == f"trial-{best:03d}/c2"
    assert parts[worst].values != before[best]
    assert parts[worst].changes[-1]["from"] == best
    for number in before.keys() - {worst}:
        assert parts[number].start == f"trial-{number:03d}/c2"
        assert parts[number].values == before[number]
    assert {t.run_name for t in study.trials} == {f"trial-{i:03d}-1" for i in range(4)}
    assert {t.until for t in study.trials} == {4}


# --- the book ---------------------------------------------------------------------------------


def test_a_trial_reads_as_it_was_written(book):
    trial = Trial(7, {AMPLITUDE: 0.01}, seed=3, repeats=2, evaluations=[report(1, 0.5)])
    book.save(trial)
    assert book.trials() == [trial]
    assert json.loads(book.storage.read("trials/trial-007.json")) == asdict(trial)


def test_a_damaged_trial_is_named(book):
    book.storage.write("trials/trial-001.json", b'{"number": 1}')
    with pytest.raises(ConfigError, match=r"trial-001\.json is damaged"):
        book.trials()


def test_a_sweep_may_grow_but_not_change(tmp_path):
    config = BASE.replace(output=str(tmp_path))
    Book.open(SETTINGS, config, "digest")
    Book.open(SETTINGS.model_copy(update={"trials": 99, "seeds": 3}), config, "digest")
    for settings, changed, digest, name in (
        (SETTINGS.model_copy(update={"searcher": "random"}), config, "digest", "searcher"),
        (SETTINGS, config.replace(optimizer__epochs=3), "digest", "optimizer.epochs"),
        (SETTINGS, config, "other", "data"),
    ):
        with pytest.raises(ConfigError, match=f"other settings of {name}"):
            Book.open(settings, changed, digest)


def test_a_population_does_not_grow(tmp_path):
    config = BASE.replace(output=str(tmp_path))
    settings = SETTINGS.model_copy(update={"scheduler": "population"})
    Book.open(settings, config, "digest")
    Book.open(settings.model_copy(update={"concurrent": 2}), config, "digest")
    with pytest.raises(ConfigError, match=r"population of fixed size.*another --name"):
        Book.open(settings.model_copy(update={"trials": 99}), config, "digest")


def test_a_run_of_that_name_is_not_touched(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a training run"):
        Book.open(SETTINGS, BASE.replace(output=str(tmp_path)), "digest")


def test_the_same_command_has_the_same_name():
    name = default_name(SETTINGS, BASE)
    assert default_name(SETTINGS.model_copy(update={"trials": 50}), BASE) == name
    assert default_name(SETTINGS, BASE.replace(seed=1)) != name


def test_importance_finds_the_setting_that_matters():
    rng = np.random.default_rng(0)
    trials = []
    for number in range(40):
        values = Chance(SETTINGS, SPACE, BASE)._values(number, number)
        score = 0.5 + 0.1 * np.log10(values[AMPLITUDE]) + 0.001 * rng.normal()
        trials.append(Trial(number, values, state="finished", evaluations=[report(8, score)]))
    shares = importance(SPACE, BASE, trials)
    assert next(iter(shares)) == AMPLITUDE
    assert shares[AMPLITUDE] > 0.8
    assert importance(SPACE, BASE, [replace(trials[0])]) == {}
