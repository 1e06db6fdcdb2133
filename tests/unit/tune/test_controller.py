"""The driver's mind: what comes next, what is stopped, and what a killed driver leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.tune.experiment import Trial as RayTrial

from data_shards.errors import ConfigError
from data_shards.storage import open_storage
from reid_train.recipes import recipe
from tune.config import Sweep, default_name
from tune.controller import RETRIES, Controller
from tune.population import Population, exchange, explore
from tune.schedulers import STOPPING, EarlyStopping
from tune.searchers import GridSearcher, OptunaSearcher, Searcher
from tune.space import AMPLITUDE, LEARNING_RATE, apply, build, default, first_points
from tune.store import Store, Trial

BASE = recipe("demo").replace(
    data="d", output="o", name="s", optimizer__epochs=8, evaluation__every=1
)
SPACE = build(default(BASE), BASE)
SETTINGS = Sweep(trials=20, ranges=default(BASE))
TUNE_CONTROLLER: Any = object()
"""Ray Tune's, of which these schedulers ask nothing."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(open_storage(str(tmp_path)))


def first() -> list[Trial]:
    points = first_points(BASE, SETTINGS.constant_factors)
    return [Trial(i, v, label, BASE.seed) for i, (label, v) in enumerate(points.items())]


def report(epoch: int, score: float) -> dict:
    return {"epoch": epoch, "step": epoch * 10, "mAP": score, "checkpoint": f"c{epoch}"}


def quality(trial: Trial) -> float:
    """A smooth mAP with its best at A = 0.01 and a learning rate of 3e-4."""
    config = trial.config(BASE)
    a, lr = np.log10(config.regularization.amplitude), np.log10(config.optimizer.learning_rate)
    return 0.8 - 0.1 * (a + 2) ** 2 - 0.1 * (lr + 3.5) ** 2


def play(controller: Controller, stopping: EarlyStopping | None = None, limit: int = 1000) -> None:
    """Run the trials one at a time, without training anything."""
    for _ in range(limit):
        trial = controller.next()
        if trial is None:
            return
        lags = judge(stopping, trial.number)
        for epoch in range(trial.epoch + 1, (trial.until or BASE.total_epochs) + 1):
            evaluation = report(epoch, quality(trial) * (1 - 0.5**epoch))
            if controller.result(trial.number, [evaluation], lags):
                break
        controller.finish(trial.number)
    raise AssertionError("the sweep does not end")


def judge(stopping: EarlyStopping | None, number: int) -> Callable[[dict], bool]:
    """What Ray Tune's run does with a trial's evaluations."""
    if stopping is None:
        return lambda evaluation: False
    stopping.add(TUNE_CONTROLLER, number, RayTrial("trained", stub=True))
    return lambda evaluation: stopping.lags(TUNE_CONTROLLER, number, evaluation)


def early_stopping(settings: Sweep, trials: Sequence[Trial] = ()) -> EarlyStopping:
    return EarlyStopping(settings, BASE, trials)


def random_searcher(settings: Sweep) -> OptunaSearcher:
    return OptunaSearcher(settings.model_copy(update={"searcher": "random"}), SPACE, BASE)


def searcher(name: str) -> Searcher:
    return {
        "tpe": lambda: OptunaSearcher(SETTINGS, SPACE, BASE),
        "random": lambda: random_searcher(SETTINGS),
        "grid": lambda: GridSearcher(SETTINGS, SPACE, BASE, len(first())),
        "population": lambda: Population(8, 2, SPACE, BASE, len(first())),
    }[name]()


@pytest.mark.parametrize("name", ["tpe", "random", "grid", "population"])
def test_a_search_begins_with_the_first_points_and_ends(store, name):
    controller = Controller(store, BASE, first(), searcher(name))
    play(controller)
    assert controller.over
    labels = [trial.label for trial in controller.trials[:5]]
    assert labels == ["paper", "constant 5e-05", "constant 0.0005", "constant 0.0025", "no L2"]
    expected = {"grid": 5 + 8, "population": 5 + 8}.get(name, SETTINGS.trials)
    assert len(controller.trials) == expected
    assert all(trial.state == "finished" for trial in controller.trials)


@pytest.mark.parametrize("name", ["tpe", "random", "grid", "population"])
def test_a_killed_driver_continues_and_runs_nothing_twice(store, name):
    whole = Controller(Store(store.storage.child("whole")), BASE, first(), searcher(name))
    play(whole)
    begun: list[tuple[int, int]] = []

    def note(trial: Trial) -> None:
        begun.append((trial.number, trial.part))

    controller = Controller(store, BASE, first(), searcher(name), on_begin=note)
    with pytest.raises(AssertionError, match="does not end"):
        play(controller, limit=7)
    open_trial = controller.next()
    assert open_trial is not None
    controller.result(open_trial.number, [report(open_trial.epoch + 1, 0.3)])

    trials = store.trials()
    again = Controller(
        store, BASE, [*trials, *first()[len(trials) :]], searcher(name), on_begin=note
    )
    play(again)
    assert again.over
    last = begun.pop(7)  # what was cut off is begun again, and first
    assert begun[7] == last
    assert len(set(begun)) == len(begun)
    assert len(again.trials) == len(whole.trials)
    assert len({tuple(t.values.items()) for t in again.trials}) == len(again.trials)
    if name != "tpe":  # the cut one was learnt of in another order
        assert [t.values for t in again.trials] == [t.values for t in whole.trials]


@pytest.mark.parametrize("scheduler", STOPPING)
def test_what_lags_behind_is_stopped_but_no_first_point(store, scheduler):
    settings = Sweep(trials=40, ranges=default(BASE), reduction=2, scheduler=scheduler)
    controller = Controller(store, BASE, first(), random_searcher(settings))
    play(controller, early_stopping(settings))
    states = [trial.state for trial in controller.trials]
    assert set(states[:5]) == {"finished"}
    assert states.count("stopped") > 8
    finished = [quality(t) for t in controller.trials[5:] if t.state == "finished"]
    stopped = [t for t in controller.trials if t.state == "stopped"]
    assert np.mean(finished) > np.mean([quality(t) for t in stopped])
    assert all("behind others after" in trial.reason for trial in stopped)


@pytest.mark.parametrize("name", ["tpe", "cmaes", "gp"])
def test_a_searcher_learns_from_trials_that_were_stopped(store, name):
    settings = Sweep(trials=16, ranges=default(BASE), searcher=name)
    controller = Controller(store, BASE, first(), OptunaSearcher(settings, SPACE, BASE))
    play(controller, early_stopping(settings))
    assert controller.over
    assert {"finished", "stopped"} == {trial.state for trial in controller.trials}


@pytest.mark.parametrize("scheduler", STOPPING)
def test_another_driver_stops_the_same_trials(store, scheduler):
    settings = Sweep(trials=24, ranges=default(BASE), reduction=2, scheduler=scheduler)
    whole = Controller(
        Store(store.storage.child("whole")), BASE, first(), random_searcher(settings)
    )
    play(whole, early_stopping(settings))
    cut = Controller(store, BASE, first(), random_searcher(settings))
    with pytest.raises(AssertionError, match="does not end"):
        play(cut, early_stopping(settings), limit=11)
    trials = store.trials()
    again = Controller(store, BASE, trials, random_searcher(settings))
    play(again, early_stopping(settings, trials))
    outcomes = [[(t.state, t.epoch) for t in c.trials] for c in (whole, again)]
    assert outcomes[0] == outcomes[1]


def test_a_trial_that_is_run_again_stays_one_trial_to_the_scheduler():
    stopping = early_stopping(Sweep(reduction=2))
    for number, score in enumerate((0.5, 0.6)):
        assert not judge(stopping, number)(report(1, score))
    assert not judge(stopping, 1)(report(2, 0.1)), "it alone reached the rung"
    assert judge(stopping, 2)(report(1, 0.4))


def test_a_failed_trial_has_its_reason_and_is_not_run_again(store):
    ended = []
    controller = Controller(store, BASE, first()[:2], Searcher(), on_end=ended.append)
    trial = controller.next()
    assert trial is not None
    controller.result(trial.number, [report(1, 0.2)])
    controller.fail(trial.number, "the loss is not finite at step 12")
    controller.finish(trial.number)
    assert (trial.state, trial.reason) == ("failed", "the loss is not finite at step 12")
    assert ended == [trial]
    following = controller.next()
    assert following is not None
    assert following.number == 1
    controller.fail(1, "another reason")
    assert controller.over
    assert [t.state for t in store.trials()] == ["failed", "failed"]
    assert Controller(store, BASE, store.trials(), Searcher()).next() is None


def test_a_lost_trial_is_run_again_and_given_up_when_it_gets_no_further(store):
    controller = Controller(store, BASE, first()[:1], Searcher())
    trial = controller.next()
    for _ in range(RETRIES):
        controller.lost(0, "its node was lost")
        assert controller.next() is trial
    controller.result(0, [report(1, 0.2)])
    for _ in range(RETRIES):
        controller.lost(0, "its node was lost")
        assert controller.next() is trial
    controller.lost(0, "its node was lost")
    assert controller.over
    (saved,) = store.trials()
    assert saved.state == "failed"
    assert saved.reason == f"given up after {RETRIES + 1} tries: its node was lost"


def test_a_configuration_that_cannot_run_fails_and_the_next_is_taken(store):
    trials = [Trial(0, {LEARNING_RATE: 1e-9}), Trial(1, {LEARNING_RATE: 1e-3})]
    controller = Controller(store, BASE, trials, Searcher())
    trial = controller.next()
    assert trial is not None
    assert trial.number == 1
    assert trials[0].state == "failed"
    assert "minimum-learning-rate" in trials[0].reason


def test_an_evaluation_keeps_the_time_at_which_it_first_came(store):
    controller = Controller(store, BASE, [Trial(0, {})], Searcher())
    assert controller.next() is not None
    controller.result(0, [report(1, 0.2)])
    (before,) = controller.trials[0].evaluations
    controller.result(0, [report(1, 0.3)])
    (after,) = controller.trials[0].evaluations
    assert (after["mAP"], after["time"]) == (0.3, before["time"])


def test_a_report_that_the_last_driver_missed_is_taken_from_the_kept_checkpoints(store):
    controller = Controller(store, BASE, [Trial(0, {})], Searcher())
    assert controller.next() is not None
    controller.result(0, [report(1, 0.2)])
    controller.result(0, [report(8, 0.6), report(7, 0.65)], lags=lambda e: e["epoch"] == 7)
    controller.finish(0)
    assert [e["epoch"] for e in controller.trials[0].evaluations] == [1, 7, 8]
    assert controller.trials[0].score == 0.65
    assert controller.trials[0].state == "finished"


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
        apply(moved, BASE)
        for name, dimension in SPACE.items():
            assert dimension.low * 0.999 <= moved[name] <= dimension.high * 1.001  # type: ignore
        assert moved != values


def test_a_member_continues_from_its_own_or_its_donors_checkpoint(store):
    population = Population(4, 2, SPACE, BASE, 0)
    controller = Controller(store, BASE, [], population)
    for _ in range(4):
        trial = controller.next()
        assert trial is not None
        assert (trial.part, trial.start, trial.until) == (0, None, 2)
        controller.result(trial.number, [report(1, quality(trial) / 2)])
        controller.result(trial.number, [report(2, quality(trial))])
        controller.finish(trial.number)
    ranked = sorted(controller.trials, key=quality)
    before = {t.number: dict(t.values) for t in ranked}
    worst, best = ranked[0].number, ranked[-1].number
    trial = controller.next()
    assert trial is not None
    parts = {t.number: t for t in controller.trials}
    assert parts[worst].start == f"trial-{best:03d}/c2"
    assert parts[worst].values != before[best]
    assert parts[worst].changes[-1]["from"] == best
    for number in before.keys() - {worst}:
        assert parts[number].start == f"trial-{number:03d}/c2"
        assert parts[number].values == before[number]
    assert {t.run_name for t in controller.trials} == {f"trial-{i:03d}-1" for i in range(4)}
    assert {t.until for t in controller.trials} == {4}


class Cut(Exception):
    """In place of a kill."""


class Kept(Store):
    """A store in memory, whose driver is killed in place of write number `cut`, or after it."""

    def __init__(self, cut: int = -1, *, after: bool = False) -> None:
        object.__setattr__(self, "saved", {})
        object.__setattr__(self, "left", [cut, after])

    def save(self, trial: Trial) -> None:
        self.left[0] -= 1
        if self.left[0] != 0 or self.left[1]:
            self.saved[trial.number] = json.dumps(asdict(trial))
        if self.left[0] == 0:
            raise Cut

    def trials(self) -> list[Trial]:
        return [Trial(**json.loads(self.saved[number])) for number in sorted(self.saved)]


def evolve(store: Store, trials: list[Trial], slots: int = 2) -> list[Trial]:
    """A population of five with two slots: who began first ends first."""
    controller = Controller(store, BASE, trials, Population(5, 2, SPACE, BASE, 0))
    running: list[Trial] = []
    while not controller.over:
        while len(running) < slots and (trial := controller.next()):
            running.append(trial)
        assert running, "the sweep waits for ever"
        trial = running.pop(0)
        for epoch in range(trial.epoch + 1, (trial.until or BASE.total_epochs) + 1):
            controller.result(trial.number, [report(epoch, quality(trial) * (1 - 0.5**epoch))])
        if trial.number == 3 and trial.part == 1:
            controller.fail(trial.number, "the loss is not finite")
        controller.finish(trial.number)
    return controller.trials


def story(trials: list[Trial]) -> list[tuple]:
    return [(t.state, t.part, t.start, t.until, t.values, t.changes, t.epoch) for t in trials]


@pytest.mark.parametrize("after", [False, True])
def test_a_population_that_is_cut_at_any_write_ends_as_if_it_was_not(after):
    whole = Kept()
    expected = story(evolve(whole, []))
    writes = -1 - whole.left[0]
    assert [state for state, *_ in expected].count("failed") == 1
    assert writes > 4 * 4 * 4  # members, parts, writes of each
    for cut in range(1, writes + 1):
        store = Kept(cut, after=after)
        with pytest.raises(Cut):
            evolve(store, [])
        assert story(evolve(store, store.trials())) == expected, cut


# --- the store ---------------------------------------------------------------------------------


def test_a_trial_reads_as_it_was_written(store):
    trial = Trial(0, {AMPLITUDE: 0.01}, seed=3, repeats=2, evaluations=[report(1, 0.5)])
    store.save(trial)
    assert store.trials() == [trial]
    assert json.loads(store.storage.read("trials/trial-000.json")) == asdict(trial)


def test_a_damaged_trial_is_named(store):
    store.storage.write("trials/trial-001.json", b'{"number": 1}')
    with pytest.raises(ConfigError, match=r"trial-001\.json is damaged"):
        store.trials()


def test_a_missing_trial_is_named(store):
    for number in (0, 2):
        store.save(Trial(number, {}))
    with pytest.raises(ConfigError, match=r"trial-001\.json is missing.*another --name"):
        store.trials()


def test_a_setting_that_an_older_version_did_not_know_counts_as_its_default(tmp_path):
    config = BASE.replace(output=str(tmp_path))
    Store.open(SETTINGS, config, "digest")
    path = tmp_path / "s" / "sweep.json"
    saved = json.loads(path.read_text())
    del saved["sweep"]["interval"], saved["config"]["loss"]["label_smoothing"]
    path.write_text(json.dumps(saved))
    Store.open(SETTINGS, config, "digest")
    with pytest.raises(ConfigError, match=r"other settings of loss\.label_smoothing"):
        Store.open(SETTINGS, config.replace(loss__label_smoothing=0.05), "digest")


def test_a_sweep_may_grow_but_not_change(tmp_path):
    config = BASE.replace(output=str(tmp_path))
    Store.open(SETTINGS, config, "digest")
    Store.open(SETTINGS.model_copy(update={"trials": 99, "seeds": 3}), config, "digest")
    for settings, changed, digest, name in (
        (SETTINGS.model_copy(update={"searcher": "random"}), config, "digest", "searcher"),
        (SETTINGS, config.replace(optimizer__epochs=3), "digest", "optimizer.epochs"),
        (SETTINGS, config, "other", "data"),
    ):
        with pytest.raises(ConfigError, match=f"other settings of {name}"):
            Store.open(settings, changed, digest)


def test_a_population_does_not_grow(tmp_path):
    config = BASE.replace(output=str(tmp_path))
    settings = SETTINGS.model_copy(update={"scheduler": "population"})
    Store.open(settings, config, "digest")
    Store.open(settings.model_copy(update={"concurrent": 2}), config, "digest")
    with pytest.raises(ConfigError, match=r"population of fixed size.*another --name"):
        Store.open(settings.model_copy(update={"trials": 99}), config, "digest")


def test_a_sweep_is_checked_without_taking_its_name(tmp_path):
    config = BASE.replace(output=str(tmp_path))
    Store.open(SETTINGS, config, "digest", create=False)
    assert not (tmp_path / "s").exists()
    Store.open(SETTINGS, config, "digest")
    with pytest.raises(ConfigError, match="other settings"):
        Store.open(SETTINGS, config, "other", create=False)


def test_a_run_of_that_name_is_not_touched(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a training run"):
        Store.open(SETTINGS, BASE.replace(output=str(tmp_path)), "digest")


def test_the_same_command_has_the_same_name():
    name = default_name(SETTINGS, BASE)
    assert default_name(SETTINGS.model_copy(update={"trials": 50}), BASE) == name
    assert default_name(SETTINGS, BASE.replace(seed=1)) != name
