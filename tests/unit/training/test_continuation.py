"""A run that is interrupted, however often and wherever, is the run that never was."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from processes import run_workers
from safetensors.torch import load_file
from tiny import Recorded, config, make_worker, narrow_resnet18, run, state
from torchvision.models import resnet

from data_shards.dataset import Dataset
from data_shards.loading import loader
from reid_train.config import TrainConfig
from reid_train.training.checkpoint import MODEL, Checkpoint
from reid_train.training.loop import train

# A failing example is short enough as it is; to shrink it would take minutes.
QUICK = {"deadline": None, "phases": [Phase.generate]}
pytestmark = pytest.mark.usefixtures("small_and_quick")

STEPS = 9  # 3 epochs of 3
THREE = 3  # workers
SETTINGS = config(optimizer__epochs=2, checkpoint__every_steps=2, tracking__every_steps=1)
# A large ε keeps Adam from turning rounding into whole steps (see test_loop).
SMOOTH = SETTINGS.replace(
    optimizer__epsilon=1.0, optimizer__learning_rate=0.01, evaluation__every=9
)


class Killed(Exception):
    """Ends a life of a run."""


@dataclass
class Death:
    """When a life ends: after so many steps, before or during what follows the last of them."""

    steps: int
    uploading: bool

    def arm(self, worker, recorded: Recorded) -> None:
        """Make the worker die so."""
        taken = set()

        def log(values: dict[str, float], step: int) -> None:
            if "loss/total" in values:
                taken.add(step)
            recorded.log(values, step)
            if len(taken) >= self.steps and not self.uploading:
                raise Killed

        def report(metrics: dict[str, float], folder: Path | None) -> None:
            if len(taken) >= self.steps:
                raise Killed  # the checkpoint is written, and never arrives
            recorded.report(metrics, folder)

        worker.log, worker.report = log, report


deaths = st.lists(st.builds(Death, st.integers(1, STEPS), st.booleans()), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def quiet(tiny_dataset: Dataset) -> Iterator[Recorded]:
    """The run that nothing happens to."""
    with tempfile.TemporaryDirectory() as folder:
        yield run(tiny_dataset, SETTINGS, Path(folder))


@settings(max_examples=5, **QUICK)
@given(deaths=deaths)
def test_interrupted_run_ends_bitwise_as_the_quiet_one(tiny_dataset, quiet, deaths):
    with tempfile.TemporaryDirectory() as folder:
        recorded = Recorded()
        for death in deaths:
            worker, _ = make_worker(tiny_dataset, Path(folder))
            death.arm(worker, recorded)
            try:
                train(SETTINGS, tiny_dataset, worker, opened(last(recorded)))
            except Killed:
                continue
        after = run(tiny_dataset, SETTINGS, Path(folder), last(recorded))
        recorded.checkpoints += after.checkpoints
        assert state(recorded.checkpoints[-1]) == state(quiet.checkpoints[-1])
        assert (recorded.steps | after.steps).keys() == quiet.steps.keys() == set(range(1, 10))
        for step, values in (recorded.steps | after.steps).items():
            assert without_speed(values) == without_speed(quiet.steps[step]), step


@pytest.mark.parametrize("threads", [2, 3])
def test_run_on_several_cores_resumes_bitwise(tiny_dataset, tmp_path, threads):
    torch.set_num_threads(threads)
    try:
        whole = run(tiny_dataset, SETTINGS, tmp_path)
        resumed = run(tiny_dataset, SETTINGS, tmp_path, whole.checkpoints[1])
    finally:
        torch.set_num_threads(1)
    assert state(resumed.checkpoints[-1]) == state(whole.checkpoints[-1])


def last(recorded: Recorded) -> Path | None:
    return recorded.checkpoints[-1] if recorded.checkpoints else None


def opened(folder: str | Path | None) -> Checkpoint | None:
    return Checkpoint.open(Path(folder)) if folder else None


def without_speed(values: dict[str, float]) -> dict[str, float]:
    speed = {"images_per_second", "step_seconds", "data_wait_seconds"}
    return {name: value for name, value in values.items() if name not in speed}


@dataclass
class Seen:
    """What lives of a run had: rows of each step's global batch, losses, the last checkpoint."""

    rows: dict[int, list[int]] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    checkpoint: str | None = None


def _live(
    rank: int, world: int, url: str, given: str, scratch: str, start: str | None, steps: int
) -> dict[str, object]:
    """One life of one worker."""
    resnet.resnet18 = narrow_resnet18
    dataset = Dataset.open(url)
    worker, recorded = make_worker(dataset, Path(scratch), rank, world)
    rows, batches = [], loader.train_batches

    def note(*arguments, **options):
        for batch in batches(*arguments, **options):
            rows.append(batch.row.tolist())
            yield batch

    def report(metrics: dict[str, float], folder: Path | None) -> None:
        recorded.report(metrics, folder)
        if metrics["step"] >= steps:
            raise Killed

    worker.report = report
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "train_batches", note)
        with contextlib.suppress(Killed):
            train(TrainConfig.from_json(given), dataset, worker, opened(start))
    return {
        "rows": rows,
        "losses": {step: values["loss/total"] for step, values in recorded.steps.items()},
        "checkpoint": str(recorded.checkpoints[-1]) if recorded.checkpoints else "",
        "step": recorded.metrics[-1]["step"],
    }


def lives(url: str, folder: str, ends: list[tuple[int, int]], given: TrainConfig = SMOOTH) -> Seen:
    """Live through a run, by (workers, step whose next checkpoint is the last) of each life."""
    seen, first = Seen(), 1
    for world, steps in ends:
        arguments = (world, url, SMOOTH.to_json(), folder, seen.checkpoint, steps)
        found = [_live(0, *arguments)] if world == 1 else run_workers(_live, world, *arguments)
        for number, parts in enumerate(zip(*(part["rows"] for part in found), strict=True), first):
            seen.rows.setdefault(number, [row for part in parts for row in part])
        seen.losses |= found[0]["losses"]
        seen.checkpoint, first = found[0]["checkpoint"], found[0]["step"] + 1
    return seen


def _whole_and_resumed(rank: int, url: str, given: str, scratch: str) -> list[str]:
    """The last checkpoints of a run, and of one that goes on from its third last."""
    resnet.resnet18 = narrow_resnet18
    dataset, start, ends = Dataset.open(url), None, []
    for _ in range(2):
        worker, recorded = make_worker(dataset, Path(scratch), rank, THREE)
        train(TrainConfig.from_json(given), dataset, worker, opened(start))
        told = [[str(folder) for folder in recorded.checkpoints]]
        dist.broadcast_object_list(told, src=0)
        start = Path(told[0][-3]) if start is None else None
        ends.append(told[0][-1])
    return ends


def test_resumed_run_of_three_workers_ends_bitwise_as_the_whole_one(tiny_dataset, tmp_path):
    # Of three summands and more, a sum depends on their order, and that on where they lie.
    three = SETTINGS.replace(
        batch__identities=THREE, optimizer__epochs=1, checkpoint__every_steps=1
    )
    found = run_workers(_whole_and_resumed, THREE, tiny_dataset.url, three.to_json(), str(tmp_path))
    whole, resumed = (state(Path(folder)) for folder in found[0])
    assert resumed == whole


@settings(max_examples=1, **QUICK)
@given(steps=st.sampled_from([(1, 3), (1, 7), (3, 5), (3, 7)]))
def test_run_continued_by_another_number_of_workers_sees_the_same_batches_and_losses(
    tiny_dataset, steps
):
    with tempfile.TemporaryDirectory() as folder:
        quiet = lives(tiny_dataset.url, folder, [(1, STEPS)])
        moved = lives(tiny_dataset.url, folder, [(1, steps[0]), (2, steps[1]), (1, STEPS)])
        assert len(quiet.rows) == STEPS
        assert moved.rows == quiet.rows
        assert moved.losses == pytest.approx(quiet.losses, rel=1e-3)
        expected, actual = (load_file(Path(s.checkpoint or "") / MODEL) for s in (quiet, moved))
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-2, atol=1e-3, msg=name)
            assert np.isfinite(value).all()
