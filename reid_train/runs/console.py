"""What a person sees while a run trains: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from reid_train.runs.process import Stop

LINE_EVERY = 15.0
"""Seconds between lines where there is no terminal."""


def beside_driver(actor: Any) -> Any:
    """The actor's class, to start on this process's node: Ray would take any, and nodes leave."""
    here = ray.get_runtime_context().get_node_id()
    return actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False))


@ray.remote(num_cpus=0)
class Board:
    """Holds the newest state of a run, written by rank 0 and read by the driver."""

    def __init__(self):
        self._state: dict[str, object] = {}
        self._evaluations: list[dict[str, object]] = []
        self._stop = False

    def show(self, state: dict[str, object]) -> None:
        """Take a state; evaluations are kept in order until they are read."""
        if "metrics" in state:
            self._evaluations.append(state)
        else:
            self._state = state

    def read(
        self, seen: int, stop: bool = False
    ) -> tuple[dict[str, object], list[dict[str, object]]]:
        """The newest state, and the evaluations after the first `seen`; `stop` asks to end."""
        self._stop |= stop
        return self._state, self._evaluations[seen:]

    def stopping(self) -> bool:
        """Whether the driver asked the run to end."""
        return self._stop


@contextlib.contextmanager
def watch(board, console: Console, asked: Stop) -> Iterator[None]:
    """Show a board's state on the console until the block ends, and pass on that it shall."""
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(board, console, asked, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)


def _follow(board, console: Console, asked: Stop, stop: threading.Event) -> None:
    bar = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task("starting", total=None, figures="")
    clock = _Clock()
    seen, told, last_line = 0, False, time.monotonic()
    with bar:
        while True:
            finished = stop.wait(0.5)
            try:
                ending = asked.signal is not None
                state, evaluations = ray.get(board.read.remote(seen, ending), timeout=5)
            except ray.exceptions.RayError:
                # Ray may answer late, and a stop has to be passed on whenever it does again.
                if finished:
                    return
                continue
            if ending and not told:
                told = True
                console.print("stopping: a checkpoint first", highlight=False)
            for evaluation in evaluations:
                seen += 1
                console.print(_evaluation_line(evaluation), highlight=False)
            if state:
                done, total = _steps(state)
                figures = f"loss {state['loss']:.3f}  {state['images_per_second']:,.0f} images/s"
                epoch = f"epoch {int(state['epoch']) + 1}/{state['epochs']}"  # type: ignore[call-overload]
                bar.update(task, description=epoch, completed=done, total=total, figures=figures)
                if not console.is_terminal and time.monotonic() - last_line > LINE_EVERY:
                    last_line = time.monotonic()
                    step = f"step {state['step']}/{state['steps']}"
                    left = clock.left(done, total)
                    console.print(f"{epoch}  {step}  {figures}  {left} left", highlight=False)
            if finished:
                return


class _Clock:
    """Time left by the pace since the first look, as `TimeRemainingColumn` does on a terminal."""

    def __init__(self):
        self._start: tuple[float, int] | None = None

    def left(self, done: int, total: int) -> str:
        now = time.monotonic()
        if self._start is None or done <= self._start[1]:
            self._start = (now, done)
            return "?"
        seconds = (total - done) * (now - self._start[0]) / (done - self._start[1])
        return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def _steps(state: dict) -> tuple[int, int]:
    steps = state["steps"]
    return state["epoch"] * steps + state["step"], state["epochs"] * steps


def _evaluation_line(state: dict) -> str:
    metrics = state["metrics"]
    figures = "  ".join(f"{name} {metrics[name]:.4f}" for name in ("mAP", "rank-1", "mINP"))
    when = f"after {state['epoch']} epochs" if state["epoch"] else "untrained"
    return f"{when}: {figures}"
