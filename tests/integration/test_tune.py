"""Sweeps on a real Ray cluster: what is stopped, what is lost, what is continued.

Two sweeps share one cluster of a head and two nodes of one CPU each. The first has a trial that is
stopped and a population; of the second the driver, a trial's process and a node are killed.
"""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from mlflow import MlflowClient
from PIL import Image
from ray.cluster_utils import Cluster
from ray.tune.execution.tune_controller import TrialRunnerWrapper
from ray.tune.experiment import Trial as RayTrial
from rich.console import Console
from safetensors.torch import load_file

from data_shards.building.build import build
from data_shards.cache import ShardCache
from data_shards.dataset import Dataset
from data_shards.errors import ConfigError
from data_shards.storage import open_storage
from reid_train.config import TrainConfig
from reid_train.recipes import recipe
from reid_train.runs.console import Board
from reid_train.training.checkpoint import MODEL, Checkpoint
from reid_train.training.context import WorkerContext
from reid_train.training.loop import train
from tune import controller as controllers
from tune import runner
from tune.config import Sweep
from tune.controller import Controller
from tune.plan import make_plan
from tune.population import Population
from tune.searchers import Searcher
from tune.space import AMPLITUDE, LEARNING_RATE
from tune.space import build as build_space
from tune.store import Store, Trial
from tune.sweep import Outcome, sweep

pytestmark = pytest.mark.slow

PATIENCE = 240.0
"""Seconds that a busy machine may take for what takes a few."""
STEPS = 2
EPOCHS = 6


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of one CPU each, beside a head without any."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        for _ in range(2):
            started.add_node(num_cpus=1)
        ray.init(address=started.address, log_to_driver=False, logging_level="ERROR")
        yield started
        ray.shutdown()
        started.shutdown()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Trains in seconds on random pictures."""
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
        model__backbone="timm:test_resnet",
        batch__identities=2,
        batch__images=2,
        batch__steps_per_epoch=STEPS,
        model__stripes=0,
        optimizer__epochs=EPOCHS,
        evaluation__every=1,
        evaluation__initial=False,
        evaluation__mirror=False,
        loader__cache=folder / "cache",
        tracking__every_steps=1,
        device="cpu",
    )


def processes(title: str, folder: str) -> list[psutil.Process]:
    """Ray's processes of that title which work in a folder whose name begins so."""
    found = []
    for process in psutil.process_iter():
        try:
            words = " ".join(process.cmdline())
            if words.startswith(title) and Path(process.cwd()).name.startswith(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(condition: Callable[[], Any]) -> Any:
    """Wait until something holds; return it."""
    start = time.monotonic()
    while not (found := condition()):
        assert time.monotonic() - start < PATIENCE, "waited in vain"
        time.sleep(0.05)
    return found


def steps_of(trial: Trial, folder: str) -> list[int]:
    """Steps in the curve that a trial's last checkpoint holds."""
    last = trial.evaluations[-1]
    history = Checkpoint.open(Path(folder, last["run"], last["checkpoint"])).history()
    return history.steps["step"]


# --- a trial that is stopped, and a population after it ------------------------------------------


class _StopsTheFirst:
    """In place of a scheduler: stops trial 0 at its first evaluation."""

    def __init__(self) -> None:
        self.freed_after = float("nan")
        self.seen: list[tuple[Any, Any]] = []
        self.watch = threading.Thread(target=self._look)

    def add(self, controller: Any, number: int, trial: RayTrial) -> None:
        self.seen.append((controller, trial))

    def lags(self, controller: Any, number: int, evaluation: dict) -> bool:
        if number == 0:
            self._worker = processes("ray::RayTrainWorker", "trial-000")
            self.watch.start()
        return number == 0

    def _look(self) -> None:
        start = time.monotonic()
        wait_for(lambda: not any(worker.is_running() for worker in self._worker))
        self.freed_after = time.monotonic() - start


@dataclass
class Evolved:
    """A trial of endless length that was stopped, and a population of two in two rounds."""

    trials: list[Trial]
    config: TrainConfig
    stopping: _StopsTheFirst


@pytest.fixture(scope="module")
def evolved(cluster: Cluster, base: TrainConfig) -> Evolved:
    config = base.replace(output=f"{base.output}/evolved", tracking__uri="off", optimizer__epochs=2)
    endless = Trial(0, {"optimizer.epochs": 100_000})
    population = Population(
        2, 1, build_space({AMPLITUDE: "uniform(0.01, 0.02)"}, config), config, 1
    )
    stopping = _StopsTheFirst()
    store = Store(open_storage(config.output))
    evolving = Controller(store, config, [endless], population)
    runner.run(evolving, Board.remote(), 2, stopping)  # type: ignore[attr-defined, arg-type]
    stopping.watch.join(PATIENCE)
    return Evolved(evolving.trials, config, stopping)


def test_a_stopped_trial_frees_its_workers_at_once(evolved: Evolved):
    assert evolved.trials[0].state == "stopped"
    assert evolved.trials[0].epoch < 20
    assert len(evolved.stopping._worker) == 1
    assert evolved.stopping.freed_after < 20


def test_the_scheduler_gets_ray_tunes_own_controller_and_trials(evolved: Evolved):
    assert len(evolved.stopping.seen) == 5  # one, and two members with two parts each
    for controller, trial in evolved.stopping.seen:
        assert isinstance(controller, TrialRunnerWrapper)  # what Ray gives to its schedulers
        assert isinstance(trial, RayTrial)
        assert trial in controller.get_trials()


def test_a_population_continues_from_checkpoints_exactly(evolved: Evolved, tmp_path: Path):
    """A donor's next round is bit for bit the training that was never cut in two."""
    members = evolved.trials[1:]
    assert [trial.state for trial in members] == ["finished", "finished"]
    loser = next(trial for trial in members if trial.changes[1]["from"] is not None)
    donor = evolved.trials[loser.changes[1]["from"]]
    assert donor.changes[1]["from"] is None
    assert loser.changes[1]["values"] != donor.values

    def checkpoint(trial: Trial, epoch: int) -> Path:
        made = next(e for e in trial.evaluations if e["epoch"] == epoch)
        return Path(evolved.config.output, made["run"], made["checkpoint"])

    # The loser's curves begin with the donor's, λ and all.
    took = Checkpoint.open(checkpoint(loser, 2)).history()
    gave = Checkpoint.open(checkpoint(donor, 1)).history()
    assert took.steps["loss/total"][:STEPS] == gave.steps["loss/total"]
    assert took.evaluations["mAP"][0] == gave.evaluations["mAP"][0]
    np.testing.assert_array_equal(took.factors()[1][: len(gave.factor_rows)], gave.factors()[1])

    whole = uncut(donor.config(evolved.config), tmp_path)
    part = load_file(checkpoint(donor, 2) / MODEL)
    for name, tensor in load_file(whole / MODEL).items():
        assert torch.equal(part[name], tensor), name


def uncut(config: TrainConfig, scratch: Path) -> Path:
    """Train in this process from the first step to the last; the last checkpoint."""
    dataset, folders = Dataset.open(config.data), []

    def report(metrics: dict[str, float], folder: Path | None) -> None:
        folders.append(folder)

    cache = ShardCache(dataset.storage, config.loader.cache, 10**9)
    worker = WorkerContext(0, 1, torch.device("cpu"), cache, report=report, scratch=scratch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(config, dataset, worker)
    torch.set_num_threads(threads)
    return folders[-1]


# --- a sweep whose driver, trial and node are killed ---------------------------------------------

SETTINGS = Sweep(
    trials=4,
    searcher="random",
    scheduler="none",
    constant_factors=(),
    ranges={AMPLITUDE: "loguniform(1e-4, 5e-2)", LEARNING_RATE: "choice(0.0005, 1e30)"},
)
SEED = 0
"""With it the first trial that is drawn has the learning rate which diverges, the next has not."""
DRIVER = """
import sys
from reid_train.config import TrainConfig
from tune.config import Sweep
from tune.plan import make_plan
from tune.sweep import sweep
sweep(make_plan(Sweep.model_validate_json(sys.argv[1]), TrainConfig.from_json(sys.argv[2])))
"""


@dataclass
class Survived:
    """A sweep whose driver was killed and whose command was given again, and once more."""

    folder: str
    before: list[Trial]
    outcome: Outcome
    again: Outcome
    text: str
    uri: str


@pytest.fixture(scope="module")
def survived(cluster: Cluster, base: TrainConfig) -> Survived:
    config = base.replace(name="sweep", seed=SEED)
    folder = f"{config.output}/{config.name}"
    store = Store(open_storage(folder))

    def trial(number: int) -> Trial | None:
        return next((t for t in store.trials() if t.number == number), None)

    def evaluated(number: int) -> bool:
        found = trial(number)
        return found is not None and bool(found.evaluations)

    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, SETTINGS.model_dump_json(), config.to_json()],
        env=os.environ | {"RAY_ADDRESS": cluster.address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as driver:

        def finished() -> bool:
            assert driver.poll() is None, driver.communicate()[1].decode()
            return any(t.state == "finished" for t in store.trials())

        wait_for(finished)
        driver.kill()
    before = store.trials()
    wait_for(lambda: not processes("ray::RayTrainWorker", "trial-"))

    killed: list[int] = []

    def kill() -> None:
        """The process of trial 3 after its first evaluation, then the node of its worker."""
        wait_for(lambda: evaluated(3))
        for process in processes("ray::ImplicitFunc", "003-"):
            process.kill()
            killed.append(process.pid)
        (worker,) = wait_for(lambda: processes("ray::RayTrainWorker", "trial-003"))
        raylet = worker.parent()
        assert raylet is not None
        (node,) = (
            node
            for node in cluster.worker_nodes
            if node.all_processes["raylet"][0].process.pid == raylet.pid
        )
        cluster.remove_node(node, allow_graceful=False)
        killed.append(raylet.pid)
        cluster.add_node(num_cpus=1)

    text = io.StringIO()
    console = Console(file=text, width=200, soft_wrap=True)
    with ThreadPoolExecutor(1) as pool:  # nodes can be added in the main thread only
        going_on = pool.submit(sweep, make_plan(SETTINGS, config), console=console)
        kill()
        outcome = going_on.result()
    assert len(killed) == 2
    again = sweep(make_plan(SETTINGS, config), console=Console(file=io.StringIO()))
    uri = f"sqlite:///{base.output}/mlflow.db"
    return Survived(folder, before, outcome, again, text.getvalue(), uri)


def test_a_killed_driver_is_continued_and_nothing_is_run_twice(survived: Survived):
    trials = survived.outcome.trials
    assert [t.label for t in trials] == ["paper", "no L2", "", ""]
    assert 1 <= len(survived.before) < 4
    assert "finished" in {trial.state for trial in survived.before}
    for was, now in zip(survived.before, trials, strict=False):
        assert was.began == now.began
        assert was.mlflow_run_id == now.mlflow_run_id
        if was.state == "finished":
            assert was == now
    for trial in trials:
        if trial.state == "finished":
            assert steps_of(trial, survived.folder) == list(range(1, EPOCHS * STEPS + 1))


def test_a_diverging_trial_is_marked_with_the_reason_and_the_sweep_continues(survived: Survived):
    assert [t.state for t in survived.outcome.trials] == [
        "finished",
        "finished",
        "failed",
        "finished",
    ]
    trial = survived.outcome.trials[2]
    assert "the loss is not finite at step" in trial.reason
    assert "--resume" not in trial.reason
    assert not trial.evaluations


def test_a_trial_whose_process_and_node_were_lost_resumes_from_its_checkpoint(survived: Survived):
    trial = survived.outcome.trials[3]
    assert trial.state == "finished"
    # One curve without a gap or a step seen twice: what came before the kills is in it.
    assert steps_of(trial, survived.folder) == list(range(1, EPOCHS * STEPS + 1))


def test_a_finished_sweep_given_again_trains_nothing(survived: Survived):
    assert survived.again.trials == survived.outcome.trials
    assert survived.again.model == survived.outcome.model


def test_the_ranking_and_where_to_look_are_shown(survived: Survived):
    for word in ("ranking", "trial-003", "no L2", "too few to call one", "mlflow ui"):
        assert word in survived.text
    assert not survived.outcome.command


def test_mlflow_has_a_parent_with_pictures_and_a_child_a_trial(survived: Survived):
    client = MlflowClient(survived.uri)
    parent_id = json.loads(Path(survived.folder, "mlflow.json").read_text())["run_id"]
    parent = client.get_run(parent_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["best"] in {t.name for t in survived.outcome.trials}
    names = {Path(item.path).stem for item in client.list_artifacts(parent_id, "report")}
    # Two adaptive trials came to their end: too few for pictures of importance and of parallel
    # coordinates. One range and a choice have no landscape. If both have the same mAP, there is a
    # sentence in place of slices.
    assert {"factors", "timeline", "ranking"} <= names
    assert ("slice" in names) != any("No slice.png" in s for s in survived.outcome.verdict)
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent_id}'"
    )
    assert len(children) == 4
    for child in children:
        trial = survived.outcome.trials[int(child.data.tags["trial"])]
        assert child.info.status == ("FAILED" if trial.number == 2 else "FINISHED")
        assert child.data.tags["state"] == trial.state
        assert child.data.tags.get("reason", "") == trial.reason
        amplitude = trial.values.get(AMPLITUDE, 0.005)
        assert child.data.params["regularization.amplitude"] == str(amplitude)
        measured = client.get_metric_history(child.info.run_id, "mAP")
        assert [(m.step, m.value) for m in sorted(measured, key=lambda m: m.step)] == [
            (e["step"], pytest.approx(e["mAP"])) for e in trial.evaluations
        ]
    adaptive = next(c for c in children if c.data.tags["trial"] == "3")
    assert len(client.get_metric_history(adaptive.info.run_id, "factor/median")) >= EPOCHS


def test_the_best_model_is_registered_once_and_is_the_champion(survived: Survived):
    client = MlflowClient(survived.uri)
    (version,) = client.search_model_versions("name = 'reid-table'")
    best = survived.outcome.entries[0].trial
    assert version.run_id == best.mlflow_run_id
    assert float(version.tags["mAP"]) == pytest.approx(best.score)
    assert survived.outcome.champion
    assert client.get_model_version_by_alias("reid-table", "champion").version == version.version


# --- what is not retried for ever, and resources --------------------------------------------------


def test_a_trial_lost_too_often_is_given_up_with_the_reason(cluster, base, monkeypatch):
    monkeypatch.setattr(controllers, "RETRIES", 0)
    config = base.replace(output=f"{base.output}/lost", tracking__uri="off")
    lost = Controller(Store(open_storage(config.output)), config, [Trial(0, {})], Searcher())

    def kill() -> None:
        (process,) = wait_for(lambda: processes("ray::ImplicitFunc", "000-"))
        process.kill()

    assassin = threading.Thread(target=kill)
    assassin.start()
    runner.run(lost, Board.remote(), 1)  # type: ignore[attr-defined]
    assassin.join(PATIENCE)
    assert lost.trials[0].state == "failed"
    assert lost.trials[0].reason.startswith("given up after 1 tries: ")
    assert Store(open_storage(config.output)).trials() == lost.trials


def test_workers_that_cannot_fit_are_an_error_before_anything_starts(cluster, base):
    too_many = base.replace(workers=4, name="too-many")
    with pytest.raises(ConfigError, match=r"needs 4 CPUs and the cluster has 2"):
        sweep(make_plan(SETTINGS, too_many), console=Console(file=io.StringIO()))
    assert not Path(base.output, "too-many").exists()


def test_as_many_trials_run_together_as_fit(cluster, base):
    assert runner.slots(base, None) == 2
    assert runner.slots(base, 1) == 1
    assert runner.slots(base.replace(workers=2), None) == 1
