"""What is not finite: no step, no checkpoint and no run is poisoned by it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import config, make_worker, run, state

from data_shards.errors import DataError
from reid_train.training import loop, losses
from reid_train.training.checkpoint import MODEL, TRAINING, Checkpoint
from reid_train.training.data import epoch_plan
from reid_train.training.loop import train

pytestmark = pytest.mark.usefixtures("small_and_quick")

SETTINGS = config(
    optimizer__frozen_epochs=0,
    optimizer__epochs=2,
    checkpoint__every_steps=2,
    tracking__every_steps=100,
)
BAD = 4  # the first step of the second epoch


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int, forward: bool = False) -> None:
    """Make the loss, or its gradient alone, infinite at these steps."""
    cross_entropy = losses.LOSSES["cross_entropy"]

    class Infinite(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, *gradients):
            return gradients[0] * float("inf")

    taken = 0
    step = loop.TrainLoop.train_step

    def count(self, batches) -> None:
        nonlocal taken
        taken = self.progress.global_step + 1
        step(self, batches)

    def spoilt(*arguments):
        loss = cross_entropy(*arguments)
        if taken not in steps:
            return loss
        return loss * float("inf") if forward else Infinite.apply(loss)

    monkeypatch.setattr(loop.TrainLoop, "train_step", count)
    monkeypatch.setitem(losses.LOSSES, "cross_entropy", spoilt)


@pytest.mark.parametrize("forward", [False, True], ids=["gradient", "loss"])
def test_run_stops_with_the_step_its_images_and_the_last_good_checkpoint(
    tiny_dataset, tmp_path, monkeypatch, forward
):
    spoil(monkeypatch, BAD, forward=forward)
    worker, recorded = make_worker(tiny_dataset, tmp_path)
    with pytest.raises(DataError) as raised:
        train(SETTINGS, tiny_dataset, worker)
    said = str(raised.value)
    assert f"{'loss' if forward else 'gradient'} is not finite at step {BAD} " in said
    assert "last good checkpoint: after step 3." in said
    index = tiny_dataset.index("train")
    names = ", ".join(index.path[epoch_plan(SETTINGS, tiny_dataset, 1)[0]])
    assert f"images {names})" in said
    assert [Checkpoint.open(folder).progress.global_step for folder in recorded.checkpoints] == [
        2,
        3,
    ]
    for folder in recorded.checkpoints:
        for name, tensor in (load_file(folder / MODEL) | load_file(folder / TRAINING)).items():
            assert torch.isfinite(tensor).all(), name


def test_last_good_checkpoint_continues_when_skipping_is_allowed(
    tiny_dataset, tmp_path, monkeypatch, caplog
):
    spoil(monkeypatch, BAD, BAD + 1, forward=True)
    worker, recorded = make_worker(tiny_dataset, tmp_path)
    with pytest.raises(DataError, match=r"resume with --optimizer.skip-nonfinite 10"):
        train(SETTINGS, tiny_dataset, worker)
    skipping = SETTINGS.replace(optimizer__skip_nonfinite=2)
    with caplog.at_level(logging.WARNING):
        after = run(tiny_dataset, skipping, tmp_path, recorded.checkpoints[-1])
    assert "at step 4 " in caplog.text
    assert "skipped, 2 of at most 2" in caplog.text
    end = Checkpoint.open(after.checkpoints[-1])
    assert end.progress.skipped == 2
    assert end.progress.global_step == 6
    for name, tensor in load_file(end.folder / MODEL).items():
        assert torch.isfinite(tensor).all(), name


def test_loss_that_overflows_in_float16_is_skipped_and_counted(tiny_dataset, tmp_path, monkeypatch):
    # At any scale of the loss above 1, where a gradient that overflows is not counted.
    spoil(monkeypatch, BAD, forward=True)
    half = SETTINGS.replace(precision="fp16", optimizer__skip_nonfinite=1)
    end = Checkpoint.open(run(tiny_dataset, half, tmp_path).checkpoints[-1])
    assert end.progress.skipped == 1
    worker, _ = make_worker(tiny_dataset, tmp_path)
    with pytest.raises(DataError, match=rf"the loss is not finite at step {BAD} "):
        train(SETTINGS.replace(precision="fp16"), tiny_dataset, worker)


def test_skipping_is_bounded(tiny_dataset, tmp_path, monkeypatch):
    spoil(monkeypatch, BAD, BAD + 1)
    worker, recorded = make_worker(tiny_dataset, tmp_path)
    with pytest.raises(DataError, match=r"not finite at step 5 .* 10$"):
        train(SETTINGS.replace(optimizer__skip_nonfinite=1), tiny_dataset, worker)
    assert Checkpoint.open(recorded.checkpoints[-1]).progress.global_step == BAD


def test_skipped_step_leaves_weights_and_moments_as_they_were(tiny_dataset, tmp_path, monkeypatch):
    settings = SETTINGS.replace(optimizer__skip_nonfinite=1, checkpoint__every_steps=1)
    spoil(monkeypatch, 2, forward=True)
    folders = run(tiny_dataset, settings, tmp_path).checkpoints
    before, after = (load_file(folder / MODEL) for folder in folders[:2])
    moments = [load_file(folder / TRAINING) for folder in folders[:2]]
    for name, value in (before | moments[0]).items():
        if name.endswith("num_batches_tracked") or name == "global_step":
            continue
        assert torch.equal((after | moments[1])[name], value), name
    assert state(folders[1])["files"] != state(folders[2])["files"]


def test_weights_that_are_not_finite_are_never_written(tiny_dataset, tmp_path, monkeypatch):
    worker, recorded = make_worker(tiny_dataset, tmp_path)
    step = loop.TrainLoop.train_step

    def broken_memory(self, batches) -> None:
        step(self, batches)
        if self.progress.global_step == 4:
            with torch.no_grad():
                next(self.model.parameters())[0, 0, 0, 0] = float("nan")

    monkeypatch.setattr(loop.TrainLoop, "train_step", broken_memory)
    with pytest.raises(DataError, match=r"no checkpoint written: .* not finite"):
        train(SETTINGS, tiny_dataset, worker)
    assert Checkpoint.open(recorded.checkpoints[-1]).progress.global_step == 3
    assert not [
        f for f in Path(tmp_path).glob("checkpoint-*/*") if f.parent not in (recorded.checkpoints)
    ]


def test_saturated_factors_are_reported_once_for_each_end(tiny_dataset, tmp_path, caplog):
    settings = SETTINGS.replace(
        regularization__theta_lr_multiplier=1e4,
        optimizer__schedule="constant",
        tracking__every_steps=1,
    )
    with caplog.at_level(logging.WARNING):
        run(tiny_dataset, settings, tmp_path)
    said = [record.message for record in caplog.records if "θ is saturated" in record.message]
    assert len(said) == len({line.split(" for ")[0] for line in said}) >= 1
    assert "λ = 0 for" in said[0]
