"""Between two looks at the losses, a step never waits for the device: no value reaches the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from tiny import config, make_worker
from torch.utils._python_dispatch import TorchDispatchMode

from data_shards.loading import loader
from data_shards.loading.loader import Batch
from reid_train.training import loop, losses

pytestmark = pytest.mark.usefixtures("small_and_quick")

STEPS = 3
# Operators with a result, or a shape of the result, that the host has to wait for.
WAITING = {
    "_local_scalar_dense",  # item(), float(), bool(), if
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
}


class Looked(Exception):
    """The loop looks at the losses, where it may wait."""


class NoHostSync(TorchDispatchMode):
    """Fail at an operator that would make the host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in WAITING or any(m is not None and m.dtype == torch.bool for m in masks):
            raise AssertionError(f"{func} makes the host wait for the device")
        return func(*args, **(kwargs or {}))


class Unstepped(torch.optim.Adam):
    """Stands in for fused Adam, which has no kernel for tensors without values."""

    def __init__(self, params, *, fused: bool, **options) -> None:
        super().__init__(params, **options)
        # As fused Adam has it: the scaler leaves the decision to skip a step to the optimizer.
        self._step_supports_amp_scaling = True

    def step(self, closure=None) -> None:
        assert any(p.grad is not None for group in self.param_groups for p in group["params"])


@pytest.fixture(params=["heads", "all"])
def settings(request):
    """Everything that a step can do is on, in each phase."""
    return config(
        optimizer__frozen_epochs=int(request.param == "heads"),
        optimizer__clip_norm=1.0,
        optimizer__skip_nonfinite=3,
        batch__accumulate=2,
        batch__steps_per_epoch=STEPS,
        tracking__every_steps=STEPS,
        loader__workers=0,
    )


@pytest.fixture
def train(monkeypatch, tiny_dataset, settings, tmp_path):
    """Return a function that trains until the loop first looks at the losses."""

    def until_looked(device: str, mode: AbstractContextManager) -> None:
        taken = []
        load = loader.train_batches

        def looked() -> None:
            raise Looked

        def loaded(*arguments, **options) -> Iterator[Batch]:
            batches = list(load(*arguments, **options))  # the loader may read what it likes
            with mode:
                for batch in batches:
                    taken.append(batch)
                    yield batch

        worker, _ = make_worker(tiny_dataset, tmp_path, device=device)
        worker.stop_request = looked
        monkeypatch.setattr(loader, "train_batches", loaded)
        with pytest.raises(Looked):
            loop.train(settings, tiny_dataset, worker)
        assert len(taken) == 2 * STEPS

    return until_looked


def test_no_operator_of_a_step_waits(train):
    train("cpu", NoHostSync())


def test_no_value_of_a_step_is_read(monkeypatch, train):
    # A meta tensor has no values: item(), tolist(), cpu() and a bool mask as an index raise.
    monkeypatch.setattr(torch.optim, "Adam", Unstepped)
    train("meta", nullcontext())


def test_a_step_that_waits_is_noticed(monkeypatch, train):
    loss = losses.LOSSES["triplet"]

    def waiting(head, config) -> torch.Tensor:
        value = loss(head, config)
        return value if value.isfinite() else torch.zeros(())

    monkeypatch.setitem(losses.LOSSES, "triplet", waiting)
    with pytest.raises(AssertionError, match="makes the host wait"):
        train("cpu", NoHostSync())
