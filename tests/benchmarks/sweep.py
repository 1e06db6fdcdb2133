"""What a sweep costs over the same trainings run one by one.

    python tests/benchmarks/sweep.py DATA OUTPUT [TRAININGS] [--overrides of the recipe csv_small]

The same configurations are trained (1) one by one by Ray Train in one session, (2) by a sweep one
at a time, (3) by a sweep as many at a time as fit this machine with one worker each. Tracking,
reports and registration are left out of all three. Prints a table in Markdown.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import tyro

from data_shards.dataset import Dataset
from data_shards.storage import open_storage
from reid_train.config import TrainConfig
from reid_train.recipes import recipe
from reid_train.runs.console import Board
from reid_train.runs.ray_trainer import run_workers
from reid_train.runs.run_dir import prepare
from tune import runner
from tune.controller import Controller
from tune.searchers import Searcher
from tune.store import Store, Trial

AMPLITUDES = (5e-3, 1e-3, 1e-2, 2e-3, 2e-2, 5e-4)


def trials(count: int) -> list[Trial]:
    """The trainings: one for each amplitude, over and over."""
    values = [AMPLITUDES[i % len(AMPLITUDES)] for i in range(count)]
    return [Trial(i, {"regularization.amplitude": value}) for i, value in enumerate(values)]


def one_by_one(config: TrainConfig, count: int) -> float:
    """Seconds of the trainings in a row."""
    dataset = Dataset.open(config.data)
    start = time.perf_counter()
    for trial in trials(count):
        run_workers(trial.config(config), dataset, None)
    return time.perf_counter() - start


def swept(config: TrainConfig, count: int, at_a_time: int) -> float:
    """Seconds of the same trainings in a sweep."""
    controller = Controller(Store(open_storage(config.output)), config, trials(count), Searcher())
    start = time.perf_counter()
    runner.run(controller, Board.remote(), at_a_time)  # type: ignore[attr-defined]
    seconds = time.perf_counter() - start
    failed = [trial.reason for trial in controller.trials if trial.state != "finished"]
    if failed:
        raise SystemExit(f"not all trials finished: {failed}")
    return seconds


def main(data: str, output: str, count: int, overrides: list[str]) -> None:
    """Measure and print."""
    base = recipe("csv_small").replace(data=data, output=output, tracking__uri="off")
    base = tyro.cli(TrainConfig, default=base, args=overrides, config=(tyro.conf.AvoidSubcommands,))
    config = prepare(base.replace(evaluation__initial=False))
    config = runner.connect(config)
    slots = runner.slots(config, None)
    # What is started and cached once is not counted against the first.
    one_by_one(config.replace(output=f"{output}/warm-up"), 1)
    seconds = {"one by one": one_by_one(config.replace(output=f"{output}/one-by-one"), count)}
    for at_a_time in sorted({1, slots}):
        folder = f"{output}/sweep-{at_a_time}"
        name = f"sweep, {at_a_time} at a time"
        seconds[name] = swept(config.replace(output=folder), count, at_a_time)
    print(f"| {count} trainings | seconds | seconds a training | of one by one |")
    print("| --- | --- | --- | --- |")
    for name, took in seconds.items():
        share = took / seconds["one by one"]
        print(f"| {name} | {took:.0f} | {took / count:.1f} | {share:.2f} |")


if __name__ == "__main__":
    words = sys.argv[1:]
    number = int(words.pop(2)) if len(words) > 2 and words[2].isdigit() else 4
    main(words[0], str(Path(words[1]).absolute()), number, words[2:])
