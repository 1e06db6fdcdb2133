"""Faults of processes and nodes, really caused: what is lost is seconds, and never a step."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

import reid_train.cli
from data_shards.building.build import build
from reid_train.tracking.server import connect
from reid_train.tracking.uris import local_tracking
from reid_train.training.checkpoint import MODEL, SEAL, TRAINING, Checkpoint

STEPS = 30
EVERY = 4  # steps between checkpoints
FAULTY = Path(__file__).with_name("faulty.py")
SMALL = [
    "--recipe", "demo", "--image.height", "32", "--image.width", "16",
    "--batch.identities", "4", "--batch.images", "2", "--batch.steps-per-epoch", str(STEPS // 2),
    "--optimizer.epochs", "2", "--evaluation.every", "9", "--evaluation.no-initial",
    "--checkpoint.every-steps", str(EVERY), "--tracking.every-steps", "2",
    "--tracking.model-name", "off", "--precision", "float32",
    "--optimizer.epsilon", "1000",  # see the test of other numbers of workers
]  # fmt: skip
PATIENCE = 480.0  # seconds, for a busy machine
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@dataclass
class Place:
    """A dataset, runs, an MLflow, and the faults that are due, all in one folder."""

    folder: Path

    @property
    def faults(self) -> Path:
        return self.folder / "faults"

    @property
    def tracking(self) -> str:
        return local_tracking(self.folder)

    def train(self, name: str, *more: str) -> list[str]:
        """Arguments of `train` for a small run of that name."""
        command = ["train", *SMALL, "--data", str(self.folder / "people"), "--name", name]
        command += ["--output", str(self.folder / "runs"), "--tracking.uri", self.tracking]
        return [*command, "--loader.cache", str(self.folder / "cache"), *more]

    def resume(self, name: str, *more: str) -> list[str]:
        """Arguments of `train` for a run that is there."""
        return ["train", "--resume", "--name", name, "--output", str(self.folder / "runs"), *more]

    def steps(self, name: str) -> dict[int, float]:
        """The tracked losses of a run by step; fails if a step is there twice."""
        run = json.loads((self.folder / "runs" / name / "run.json").read_text())["mlflow_run_id"]
        history = connect(self.tracking).get_metric_history(run, "loss/total")
        losses = {point.step: point.value for point in history}
        assert len(losses) == len(history)
        return losses

    def last(self, name: str) -> Checkpoint:
        """The newest whole checkpoint of a run."""
        folders = (self.folder / "runs" / name).glob("checkpoint_*/")
        opened = [Checkpoint.open(f) for f in folders if (f / SEAL).exists()]
        return max(opened, key=lambda c: c.progress.global_step)

    def tensors(self, name: str) -> dict[str, str]:
        """Digests of the last checkpoint's weights, and of Adam's moments and θ."""
        seal = json.loads((self.last(name).folder / SEAL).read_text())
        return {file: seal[file] for file in (MODEL, TRAINING)}


@dataclass
class Driver:
    """The main command in a process of its own."""

    process: subprocess.Popen
    log: Path

    @classmethod
    def start(cls, place: Place, arguments: list[str], **environment: str) -> Driver:
        log = place.folder / f"driver-{time.monotonic_ns()}.log"
        command = [sys.executable, str(FAULTY), str(place.faults), *arguments]
        with log.open("w") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | environment,
            )
        return cls(process, log)

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until something holds while the driver lives."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.1)

    def end(self) -> int:
        """Wait for the driver's end, and return its exit code."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(self.said())

    def said(self) -> str:
        return self.log.read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("faults"))
    place.faults.mkdir()
    options = {"identities": 8, "cameras": 2, "images_per_camera": 4}
    build("synthetic", place.folder / "raw", str(place.folder / "people"), options=options, jobs=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_agent_register_timeout_ms", "300000")  # a busy machine starts slowly
        yield place
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if str(FAULTY) in child.cmdline():
                    child.kill()


@pytest.fixture(scope="module")
def cluster(place: Place) -> Iterator[Cluster]:
    """A head and two nodes of one CPU, all on this machine."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture(scope="module")
def quiet(place: Place, cluster: Cluster) -> Place:
    """The run that nothing happens to."""
    driver = Driver.start(place, place.train("quiet", "--workers", "2"))
    assert driver.end() == 0, driver.said()
    return place


def fault(place: Place, name: str) -> Path:
    """Make a fault due; return what appears when it has happened."""
    (place.faults / name).touch()
    return place.faults / f"done-{name}"


@pytest.fixture(scope="module")
def survivor(quiet: Place) -> dict[str, str]:
    """A run that meets one fault after another: what its drivers said."""
    place, said = quiet, {}
    workers = [
        fault(place, name)
        for name in ("kill-forward-1-3", "kill-reduce-0-7", "kill-upload-0-9", "freeze-1-15")
    ]
    gate, late = fault(place, "gate-0-19"), fault(place, "gate-0-25")
    more = ["--workers", "2", "--checkpoint.max-failures", "5", "--checkpoint.hang-seconds", "60"]
    driver = Driver.start(place, place.train("survivor", *more))
    driver.wait_for(gate.exists)
    assert all(done.exists() for done in workers)
    second = Driver.start(place, place.resume("survivor"))
    said["second"] = f"exit {second.end()}\n{second.said()}"
    driver.process.kill()
    driver.process.wait()
    said["killed"] = driver.said()

    driver = Driver.start(place, place.resume("survivor"))
    driver.wait_for(late.exists)
    driver.process.send_signal(signal.SIGTERM)
    driver.wait_for(lambda: "stopping" in driver.said())
    (place.faults / "open-0-25").touch()
    said["stopped"] = f"exit {driver.end()}\n{driver.said()}"
    said["checkpoint"] = str(place.last("survivor").progress.global_step)

    driver = Driver.start(place, place.resume("survivor"))
    said["ended"] = f"exit {driver.end()}\n{driver.said()}"
    return said


def test_killed_and_frozen_workers_are_named_and_replaced(survivor):
    said = survivor["killed"]
    assert said.count("rank 1 failed") >= 2, said  # killed, and frozen
    assert said.count("rank 0 failed") >= 2, said  # killed twice
    assert "A worker health check has been hanging" in said  # the frozen one
    assert "resuming after step" in said


def test_second_driver_of_a_run_is_refused(survivor):
    assert survivor["second"].startswith("exit 2\n")
    assert "run survivor is being trained by process" in survivor["second"]


def test_stopped_driver_leaves_a_checkpoint_and_prints_how_to_resume(survivor):
    assert survivor["stopped"].startswith("exit 143\n"), survivor["stopped"]
    assert "stopped by SIGTERM with a checkpoint after step 25" in survivor["stopped"]
    assert "--resume --name survivor" in survivor["stopped"]
    assert survivor["checkpoint"] == "25"  # no multiple of `checkpoint.every_steps`


def test_resumed_run_ends_bitwise_as_the_quiet_one(quiet, survivor):
    assert survivor["ended"].startswith("exit 0\n"), survivor["ended"]
    assert quiet.tensors("survivor") == quiet.tensors("quiet")


def test_every_step_is_tracked_once_with_the_quiet_runs_loss(quiet, survivor):
    losses = quiet.steps("quiet")
    assert losses.keys() == set(range(1, STEPS + 1))
    assert quiet.steps("survivor") == losses


def test_ended_run_holds_no_lock(quiet, survivor):
    assert not list((quiet.folder / "runs" / "survivor" / "lease").glob("*.json"))


def test_name_that_is_taken_is_refused_with_a_hint(quiet, survivor, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["reid_train", *quiet.train("survivor", "--workers", "2")])
    assert reid_train.cli.main() == 2
    assert "continue it with --resume" in capsys.readouterr().err


@pytest.fixture(scope="module")
def guest(quiet: Place, survivor: dict[str, str], cluster: Cluster) -> dict[str, str]:
    """A run on a node that Ray is told will be taken away: another comes, and it is taken."""
    place, said = quiet, {}
    (place.faults / "worlds.txt").unlink()
    told, waiting = fault(place, "gate-0-5"), fault(place, "gate-0-7")
    notices = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    driver = Driver.start(place, place.train("guest", "--workers", "2"), **notices)
    driver.wait_for(told.exists)
    spot = cluster.worker_nodes.copy().pop()
    announce(cluster, spot.node_id, seconds=45)
    cluster.add_node(num_cpus=1)
    time.sleep(5)  # ten looks at what Ray has been told
    (place.faults / "open-0-5").touch()
    driver.wait_for(waiting.exists)  # nothing opens this gate: the worker waits to be replaced
    driver.wait_for(lambda: place.last("guest").progress.global_step > EVERY)
    said["checkpoint"] = str(place.last("guest").progress.global_step)
    said["ended"] = f"exit {driver.end()}\n{driver.said()}"
    said["worlds"] = (place.faults / "worlds.txt").read_text()
    cluster.remove_node(spot)
    return said


def announce(cluster: Cluster, node: str, seconds: int) -> None:
    """Tell Ray that a node will be taken away, as a spot machine's handler does."""
    ray = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", cluster.address]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    deadline = ["--deadline-remaining-seconds", str(seconds)]
    command = [*ray, "--node-id", node, *reason, *deadline]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)


def test_announced_loss_of_a_node_is_answered_by_a_checkpoint(guest):
    assert guest["checkpoint"] == "6", guest["ended"]  # no multiple of `checkpoint.every_steps`


def test_run_moves_off_the_node_in_time_and_ends_bitwise_as_the_quiet_one(quiet, guest):
    assert guest["ended"].startswith("exit 0\n"), guest["ended"]
    assert guest["worlds"].split() == ["2", "2"], guest["ended"]
    assert quiet.tensors("guest") == quiet.tensors("quiet")
    assert quiet.steps("guest") == quiet.steps("quiet")


@pytest.fixture(scope="module")
def wanderer(quiet: Place, guest: dict[str, str], cluster: Cluster) -> dict[str, str]:
    """A run between one and two workers, whose nodes leave and come, and whose head ends."""
    place, said = quiet, {}
    (place.faults / "worlds.txt").unlink()
    both, alone, head = (fault(place, f"gate-0-{step}") for step in (6, 11, 20))
    more = ["--workers", "2", "--min-workers", "1", "--checkpoint.max-failures", "5"]
    driver = Driver.start(place, place.train("wanderer", *more))
    driver.wait_for(both.exists)
    cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
    (place.faults / "open-0-6").touch()
    driver.wait_for(alone.exists)
    cluster.add_node(num_cpus=1)  # nothing opens the gate: the worker waits to be replaced
    driver.wait_for(head.exists)
    cluster.shutdown()
    said["head"] = f"exit {driver.end()}\n{driver.said()}"
    driver = Driver.start(place, place.resume("wanderer"), RAY_ADDRESS="")
    said["ended"] = f"exit {driver.end()}\n{driver.said()}"
    said["worlds"] = (place.faults / "worlds.txt").read_text()
    return said


def test_run_continues_between_its_least_and_most_workers(wanderer):
    assert wanderer["worlds"].split() == ["2", "1", "2", "2"], wanderer["head"]


def test_run_without_a_head_ends_and_is_resumed_elsewhere(wanderer):
    assert not wanderer["head"].startswith("exit 0")
    assert wanderer["ended"].startswith("exit 0\n"), wanderer["ended"]


def test_run_on_other_numbers_of_workers_has_the_quiet_runs_losses(quiet, wanderer):
    # With other workers sums are grouped otherwise, so losses differ by 1e-7. Feature maps of a few
    # pixels amplify that: where a ReLU or the clip of a feature flips, a gradient changes by 1e-2,
    # and with Adam's usual ε the losses differ by 1e-3 some steps later. A large ε makes small
    # steps in proportion to the gradient: flips change losses by 1e-7, training itself by 5e-5.
    assert quiet.steps("wanderer") == pytest.approx(quiet.steps("quiet"), rel=1e-6)


@pytest.fixture
def no_init_process(tmp_path: Path) -> Iterator[None]:
    """Let orphans become children of this process, which does not reap them.

    So it is in a container without an init process. A killed raylet then looks alive to its
    workers, and they train for up to a minute longer.
    """
    libc, set_child_subreaper = ctypes.CDLL(None), 36
    libc.prctl(set_child_subreaper, 1, 0, 0, 0)
    try:
        yield
    finally:
        for orphan in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                orphan.kill()
        libc.prctl(set_child_subreaper, 0, 0, 0, 0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def test_workers_that_outlive_a_killed_driver_track_no_step_again(place, no_init_process):
    lease = place.folder / "runs" / "orphans" / "lease"
    here = {"RAY_ADDRESS": ""}  # Ray starts with the driver, and dies with it
    patient = here | {"RAY_gcs_rpc_server_reconnect_timeout_s": "900"}  # for a busy machine
    gate = fault(place, "gate-0-9")
    driver = Driver.start(place, place.train("orphans", "--workers", "1"), **patient)
    driver.wait_for(gate.exists)
    children = psutil.Process(driver.process.pid).children(recursive=True)
    (worker,) = [child for child in children if "RayTrainWorker" in child.name()]
    before = set(lease.iterdir())
    driver.process.kill()

    ahead = fault(place, "gate-0-11")
    second = Driver.start(place, place.resume("orphans"), **here)
    second.wait_for(lambda: ahead.exists() and max(place.steps("orphans")) == 10)
    assert before.isdisjoint(lease.iterdir())
    assert worker.status() != psutil.STATUS_ZOMBIE
    behind = fault(place, "gate-0-10")
    (place.faults / "open-0-9").touch()
    second.wait_for(behind.exists)  # the old worker took a step that the new one had taken
    (place.faults / "open-0-10").touch()
    time.sleep(10)  # it reads the losses of two steps, and its tracker sends every 3 s
    (place.faults / "open-0-11").touch()
    assert second.end() == 0, second.said()
    assert place.steps("orphans").keys() == set(range(1, STEPS + 1))
