"""What a person sees while a run trains: its progress on the console, and a line per evaluation."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data_shards.progress import Display, Progress
from reid_train.config import TrainConfig
from reid_train.runs.process import Stop

REPORT_EVERY = 0.5  # seconds between reports of a stage from a worker, and looks of the driver

State = dict[str, Any]
Stages = dict[str, tuple[int, int]]


def beside_driver(actor: Any) -> Any:
    """The actor's class, to start on this process's node: Ray would take any, and nodes leave."""
    here = ray.get_runtime_context().get_node_id()
    return actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False))


@ray.remote(num_cpus=0)
class Board:
    """Holds the newest state of a run, or of a sweep's trials by name: written by rank 0."""

    def __init__(self):
        self._states: dict[str, State] = {}
        self._stages: Stages = {}
        self._evaluations: list[State] = []
        self._stop = False

    def show(self, state: State, trial: str = "") -> None:
        """Take a state; evaluations of a run are kept in order until they are read."""
        if "metrics" not in state:
            self._states[trial] = state
        elif not trial:
            self._evaluations.append(state)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Take the progress of a stage, such as embedding."""
        self._stages[stage] = (done, total)

    def read(self, seen: int, stop: bool = False) -> tuple[State, Stages, list[State]]:
        """The state, the stages, and the evaluations after `seen` of them; `stop` asks to end."""
        self._stop |= stop
        return self._states.get("", {}), self._stages, self._evaluations[seen:]

    def states(self) -> dict[str, State]:
        """The newest states of a sweep's trials, by name."""
        return self._states

    def stopping(self) -> bool:
        """Whether the driver asked the run to end."""
        return self._stop


def reporter(board: Any) -> Progress:
    """A `Progress` for a worker: passes reports on to a board, at most two a second per stage."""
    sent: dict[str, float] = {}

    def report(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if 0 < done < total and now - sent.get(stage, 0.0) < REPORT_EVERY:
            return
        sent[stage] = now
        board.progress.remote(stage, done, total)

    return report


@contextlib.contextmanager
def watch(board: Any, display: Display, config: TrainConfig, stop: Stop) -> Iterator[None]:
    """Show a run while the block lasts, and tell the board when the run is asked to stop."""
    ended = threading.Event()
    follower = Follower(display, config.evaluation.every)

    def follow() -> None:
        told = finished = False
        while not finished:
            finished = ended.wait(REPORT_EVERY)
            stopping = stop.signal is not None
            try:
                read = ray.get(board.read.remote(follower.evaluated, stopping), timeout=5)
            except RayError:
                continue  # Ray may answer late, and a stop has to be passed on when it does again
            if stopping and not told:
                told = True
                display.print("stopping: a checkpoint is written first")
            follower.look(*read)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=10)


class Follower:
    """Shows what a board holds. There are `every` epochs between evaluations."""

    def __init__(self, display: Display, every: int) -> None:
        self.evaluated = 0
        self._display, self._every = display, every
        self._stages: Stages = {}
        self._shown: State = {}
        self._newest: State = {}
        self._started = False
        self._evaluation_seconds = 0.0
        display("starting the workers", 0, 1)

    def look(self, state: State, stages: Stages, evaluations: list[State]) -> None:
        """Show what is new."""
        if not self._started and (state or stages):
            self._started = True
            self._display("starting the workers", 1, 1)
        new = {stage for stage in stages if self._stages.get(stage) != stages[stage]}
        for stage in sorted(new):
            self._display(stage, *stages[stage])
        self._stages = stages
        passed = [e for e in evaluations if state and e["epoch"] <= state["epoch"]]
        self._print(passed)
        if state and state != self._shown:
            self._display.remove(*stages.keys() - new)  # a worker was lost within an evaluation
            self._shown = state
            self._newest |= state  # at the start of a phase there is no loss
            self._step(self._newest)
        self._print(evaluations[len(passed) :])

    def _step(self, state: State) -> None:
        epoch, epochs, steps = state["epoch"], state["epochs"], state["steps"]
        evaluations = epochs // self._every - epoch // self._every + (epochs % self._every > 0)
        note = f"epoch {epoch + 1} of {epochs}"
        if "loss" in state:  # not before the first steps
            note += f", loss {state['loss']:.3f}, {state['images_per_second']:,.0f} images/s"
        later = evaluations * self._evaluation_seconds
        self._display("training", epoch * steps + state["step"], epochs * steps, note, later)

    def _print(self, evaluations: list[State]) -> None:
        for evaluation in evaluations:
            self.evaluated += 1
            self._evaluation_seconds = evaluation["seconds"]
            self._display.remove(*self._stages)
            metrics = evaluation["metrics"]
            shown = ("mAP", "rank-1", "mINP")
            figures = ", ".join(f"{name} {100 * metrics[name]:.2f} %" for name in shown)
            epoch = evaluation["epoch"]
            when = f"after {epoch} epoch{'s' * (epoch > 1)}" if epoch else "before training"
            on = ", on validation" if evaluation.get("split") == "validation" else ""
            self._display.print(f"{when}{on}: {figures}")
