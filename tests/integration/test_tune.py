"""A sweep on a real Ray cluster: what is stopped, what is lost, what is continued."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch
from mlflow import MlflowClient
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from data_shards.build import build
from data_shards.cache import ShardCache
from data_shards.dataset import Dataset
from data_shards.errors import ConfigError
from data_shards.storage import open_storage
from reid_train.checkpoint import MODEL, Checkpoint
from reid_train.config import TrainConfig
from reid_train.loop import train
from reid_train.recipes import recipe
from reid_train.trainer import start_ray
from reid_train.worker import Worker
from tune import runner
from tune.board import TrialBoard
from tune.book import Book, Trial
from tune.population import Population
from tune.proposals import Listed
from tune.settings import Sweep
from tune.space import AMPLITUDE, LEARNING_RATE
from tune.space import build as build_space
from tune.study import Study
from tune.sweep import Outcome, sweep

EPOCHS = 2


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray cluster of two CPUs; its address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(os, "cpu_count", lambda: 2)
        start_ray(2, logs=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Trains in a second on random pictures."""
    folder, rng, rows = tmp_path_factory.mktemp("tune"), np.random.default_rng(0), []
    for pid in range(10):
        for camid in range(4):
            name = f"{pid}-{camid}.png"
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / name)
            split = "train" if pid < 4 else "query" if camid == 0 else "gallery"
            rows.append((name, pid, camid, split))
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "pid", "camid", "split"), *rows])
    build("csv", folder / "table.csv", str(folder / "shards"), jobs=1)
    return recipe("demo").replace(
        data=str(folder / "shards"),
        output=str(folder / "runs"),
        image__height=32,
        image__width=32,
        batch__identities=2,
        batch__images=2,
        batch__steps_per_epoch=2,
        model__stripes=0,
        optimizer__epochs=EPOCHS,
        evaluation__every=1,
        evaluation__initial=False,
        evaluation__mirror=False,
        loader__cache=folder / "cache",
        tracking__every_steps=1,
        device="cpu",
    )


def processes(words: str, folder: str = "") -> list[psutil.Process]:
    """Ray's processes whose title holds `words` and that work in a folder of that name."""
    found = []
    for process in psutil.process_iter():
        try:
            title = " ".join(process.cmdline())
            if words in title and Path(process.cwd()).name.startswith(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(condition: Callable[[], object], seconds: float = 60) -> float:
    """Wait until something holds; return how long it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "waited in vain"
        time.sleep(0.05)
    return time.monotonic() - start


# --- trials that end in every way -------------------------------------------------------------


@dataclass
class Fates:
    """Trials that were stopped, diverged, or whose processes were killed, run together."""

    trials: list[Trial]
    began: list[tuple[int, float]]
    freed_after: float
    storage: object


class _StopEndless:
    """In place of successive halving: stops trial 0 at its first evaluation."""

    def __init__(self) -> None:
        self.freed_after = float("nan")
        self.watch: threading.Thread | None = None

    def stops(self, trial: Trial, evaluation: dict) -> bool:
        if trial.number != 0:
            return False
        (worker,) = processes("ray::RayTrainWorker", "trial-000")

        def look() -> None:
            self.freed_after = wait_for(lambda: not worker.is_running())

        self.watch = threading.Thread(target=look)
        self.watch.start()
        return True


@pytest.fixture(scope="module")
def fates(cluster: str, base: TrainConfig) -> Fates:
    folder = f"{base.output}/fates"
    config = base.replace(output=folder, tracking__uri="off", optimizer__epochs=4)
    book = Book(open_storage(folder))
    trials = [
        Trial(0, {"optimizer.epochs": 100_000}),
        Trial(1, {LEARNING_RATE: 1e30}),
        Trial(2, {"optimizer.epochs": 40}),
        Trial(3, {"optimizer.epochs": 40}),
    ]
    began: list[tuple[int, float]] = []
    halving = _StopEndless()
    study = Study(
        book,
        config,
        trials,
        Listed(),
        halving,  # type: ignore[arg-type]
        on_begin=lambda trial: began.append((trial.number, time.time())),
    )

    def assassin() -> None:
        wait_for(lambda: trials[2].evaluations, 200)
        for worker in processes("ray::RayTrainWorker", "trial-002"):
            worker.kill()
        wait_for(lambda: trials[3].evaluations, 200)
        (trial,) = [p for p in processes("ray::ImplicitFunc") if p.is_running()][-1:]
        trial.kill()

    thread = threading.Thread(target=assassin, daemon=True)
    thread.start()
    runner.run(study, TrialBoard.remote(), 2)  # type: ignore[attr-defined]
    thread.join(timeout=5)
    assert not thread.is_alive()
    assert halving.watch is not None
    halving.watch.join()
    return Fates(study.trials, began, halving.freed_after, book.storage)


def test_a_stopped_trial_frees_its_workers_at_once(fates: Fates):
    assert fates.trials[0].state == "stopped"
    assert fates.trials[0].epoch < 10
    assert fates.freed_after < 10


def test_a_diverging_trial_is_marked_with_the_reason_and_not_retried(fates: Fates):
    trial = fates.trials[1]
    assert trial.state == "failed"
    assert "not finite" in trial.reason
    assert [number for number, _ in fates.began].count(1) == 1


@pytest.mark.parametrize("number", [2, 3])
def test_a_trial_whose_process_was_killed_goes_on_from_its_checkpoint(fates: Fates, number: int):
    trial = fates.trials[number]
    assert trial.state == "finished"
    assert trial.epoch == 40
    last = trial.evaluations[-1]
    path = Path(fates.storage.root) / last["run"] / last["checkpoint"]  # type: ignore[attr-defined]
    history = Checkpoint.open(path).history()
    # One curve without a gap or a step seen twice: what came before the kill is in it.
    assert history.steps["step"] == list(range(1, 2 * 40 + 1))


# --- a whole sweep, its driver killed ----------------------------------------------------------


@dataclass
class Killed:
    """A sweep whose driver was killed and whose command was given again."""

    before: list[dict]
    outcome: Outcome
    again: Outcome
    text: str
    uri: str


SETTINGS = Sweep(
    trials=4,
    searcher="tpe",
    constant_factors=(5e-4,),
    ranges={AMPLITUDE: "loguniform(1e-4, 5e-2)", LEARNING_RATE: "loguniform(1e-4, 1e-3)"},
)
DRIVER = """
import json, sys
from reid_train.config import TrainConfig
from tune.settings import Sweep
from tune.sweep import sweep
sweep(Sweep.model_validate_json(sys.argv[1]), TrainConfig.from_json(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def killed(cluster: str, base: TrainConfig, tmp_path_factory) -> Killed:
    config = base.replace(name="killed")
    folder = Path(config.output, "killed")
    environment = os.environ | {"RAY_ADDRESS": cluster, "OMP_NUM_THREADS": "1"}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, SETTINGS.model_dump_json(), config.to_json()],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )

    def states() -> list[str]:
        return [t.state for t in Book(open_storage(str(folder))).trials()]

    def ready() -> bool:
        assert driver.poll() is None, driver.communicate()[1].decode()
        return "finished" in states()

    wait_for(ready, 200)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = [vars(t).copy() for t in Book(open_storage(str(folder))).trials()]
    wait_for(lambda: not processes("ray::RayTrainWorker", "trial-"), 60)

    text = io.StringIO()
    console = Console(file=text, width=200)
    outcome = sweep(SETTINGS, config, console=console)
    again = sweep(SETTINGS, config, console=Console(file=io.StringIO()))
    run_json = json.loads((folder / "mlflow.json").read_text())
    assert run_json["run_id"]
    return Killed(before, outcome, again, text.getvalue(), f"sqlite:///{base.output}/mlflow.db")


def test_a_killed_driver_is_continued_and_nothing_is_run_twice(killed: Killed):
    assert [t.state for t in killed.outcome.trials] == ["finished"] * 4
    assert [t.label for t in killed.outcome.trials] == ["paper", "constant 0.0005", "no L2", ""]
    assert len(killed.before) < 4
    for was, now in zip(killed.before, killed.outcome.trials, strict=False):
        assert was["began"] == now.began
        assert was["mlflow_run_id"] == now.mlflow_run_id
        if was["state"] == "finished":
            assert was == vars(now)
    assert "finished" in {trial["state"] for trial in killed.before}


def test_a_finished_sweep_given_again_trains_nothing(killed: Killed):
    assert [vars(t) for t in killed.again.trials] == [vars(t) for t in killed.outcome.trials]
    assert killed.again.model == killed.outcome.model


def test_the_ranking_the_command_and_where_to_look_are_shown(killed: Killed):
    for word in ("ranking", "trial-003", "constant 0.0005", killed.outcome.command, "mlflow ui"):
        assert word in killed.text


def test_mlflow_has_a_parent_with_pictures_and_a_child_a_trial(killed: Killed, base: TrainConfig):
    client = MlflowClient(killed.uri)
    parent_id = json.loads(Path(base.output, "killed", "mlflow.json").read_text())["run_id"]
    parent = client.get_run(parent_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["best"] in {t.name for t in killed.outcome.trials}
    names = {Path(item.path).stem for item in client.list_artifacts(parent_id, "report")}
    assert {"landscape", "parallel", "importance", "factors", "timeline", "ranking"} <= names
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent_id}'"
    )
    assert len(children) == 4
    for child in children:
        trial = killed.outcome.trials[int(child.data.tags["trial"])]
        assert child.info.status == "FINISHED"
        assert child.data.params["regularization.amplitude"] == str(
            trial.values.get(AMPLITUDE, 0.005)
        )
        measured = client.get_metric_history(child.info.run_id, "mAP")
        assert [(m.step, m.value) for m in sorted(measured, key=lambda m: m.step)] == [
            (e["step"], pytest.approx(e["mAP"])) for e in trial.evaluations
        ]


def test_the_best_model_is_registered_once_and_is_the_champion(killed: Killed):
    client = MlflowClient(killed.uri)
    (version,) = client.search_model_versions("name = 'reid-csv'")
    best = killed.outcome.entries[0].trial
    assert version.run_id == best.mlflow_run_id
    assert float(version.tags["mAP"]) == pytest.approx(best.score)
    assert killed.outcome.champion
    assert client.get_model_version_by_alias("reid-csv", "champion").version == version.version


# --- a population ------------------------------------------------------------------------------


def test_a_population_continues_from_checkpoints_exactly(cluster, base, tmp_path):
    """A donor's next round is bit for bit the training that was never cut in two."""
    config = base.replace(output=str(tmp_path), tracking__uri="off")
    space = build_space({AMPLITUDE: "loguniform(1e-4, 5e-2)"}, config)
    book = Book(open_storage(str(tmp_path)))
    study = Study(book, config, [], Population(2, 1, space, config, 0))
    runner.run(study, TrialBoard.remote(), 2)  # type: ignore[attr-defined]
    assert [t.state for t in study.trials] == ["finished", "finished"]
    loser = next(t for t in study.trials if t.changes[1]["from"] is not None)
    donor = study.trials[loser.changes[1]["from"]]
    assert donor.changes[1]["from"] is None
    assert loser.changes[1]["values"] != donor.values

    def checkpoint(trial: Trial, epoch: int) -> Path:
        made = next(e for e in trial.evaluations if e["epoch"] == epoch)
        return tmp_path / made["run"] / made["checkpoint"]

    # The loser's curves begin with the donor's, λ and all.
    took = Checkpoint.open(checkpoint(loser, 2)).history()
    gave = Checkpoint.open(checkpoint(donor, 1)).history()
    assert took.steps["loss/total"][:2] == gave.steps["loss/total"]
    assert took.evaluations["mAP"][0] == gave.evaluations["mAP"][0]
    np.testing.assert_array_equal(took.factors()[1][: len(gave.factor_rows)], gave.factors()[1])

    whole = uncut(donor.config(config), tmp_path / "whole")
    part = load_file(checkpoint(donor, 2) / MODEL)
    for name, tensor in load_file(whole / MODEL).items():
        assert torch.equal(part[name], tensor), name


def uncut(config: TrainConfig, scratch: Path) -> Path:
    """Train in this process from the first step to the last; the last checkpoint."""
    scratch.mkdir()
    dataset, folders = Dataset.open(config.data), []

    def report(metrics: dict[str, float], folder: Path | None) -> None:
        folders.append(folder)

    cache = ShardCache(dataset.storage, config.loader.cache, 10**9)
    worker = Worker(0, 1, torch.device("cpu"), cache, report=report, scratch=scratch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(config, dataset, worker)
    torch.set_num_threads(threads)
    return folders[-1]


# --- resources ----------------------------------------------------------------------------------


def test_workers_that_cannot_fit_are_an_error_before_anything_starts(cluster, base):
    too_many = base.replace(workers=4, name="too-many")
    with pytest.raises(ConfigError, match=r"needs 4 CPUs and the cluster has 2"):
        sweep(SETTINGS, too_many, console=Console(file=io.StringIO()))
    assert not Path(base.output, "too-many").exists()


def test_as_many_trials_run_together_as_fit(cluster, base):
    assert runner.slots(base, None) == 2
    assert runner.slots(base, 1) == 1
    assert runner.slots(base.replace(workers=2), None) == 1
