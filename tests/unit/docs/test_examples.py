"""The examples in docs/examples: the same training by a plain loop, Lightning and the Trainer."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from reid_train.regularization import AdaptiveL2

EXAMPLES = "docs.examples"
CPU = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
Result = tuple[nn.Module, AdaptiveL2, list[list[Tensor]]]


def run(train: Callable[..., tuple[nn.Module, AdaptiveL2]], *args, **options) -> Result:
    """Train; also return the gradients at each optimizer step: of the weights, then of θ."""
    steps: list[list[Tensor]] = []

    def record(optimizer: torch.optim.Optimizer, *_) -> None:
        groups = optimizer.param_groups
        steps.append([p.grad.clone() for group in groups for p in group["params"]])

    hook = register_optimizer_step_post_hook(record)
    try:
        return *train(*args, **options), steps
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def plain() -> Result:
    return run(importlib.import_module(f"{EXAMPLES}.plain_loop").train)


def assert_same(found: Result, plain: Result) -> None:
    """λ, the weights, and all gradients, the penalty's among them, are those of the plain loop."""
    (model, regularizer, steps), (expected, its_regularizer, its_steps) = found, plain
    factors = regularizer.factors()
    assert factors == pytest.approx(its_regularizer.factors(), rel=1e-4)
    assert max(factors.values()) < 0.0025, "λ has decayed from A / 2"
    assert len(steps) == len(its_steps) == 4
    torch.testing.assert_close(steps, its_steps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        dict(model.named_parameters()), dict(expected.named_parameters()), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("accumulated", [{}, {"batch": 16, "accumulate_grad_batches": 4}])
def test_lightning_trains_as_the_plain_loop(accumulated, plain):
    pytest.importorskip("pytorch_lightning")
    train = importlib.import_module(f"{EXAMPLES}.with_lightning").train
    assert_same(run(train, **accumulated, **CPU), plain)


def test_lightnings_checkpoints_keep_theta(plain, tmp_path):
    pl = pytest.importorskip("pytorch_lightning")
    example = importlib.import_module(f"{EXAMPLES}.with_lightning")
    data = torch.utils.data.DataLoader(example.make_data(), 64)
    for epochs in (2, 4):  # the second continues the first
        module = example.Regularized(example.make_model(), lr=1e-2)
        trainer = pl.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False, **CPU)
        path = tmp_path / "half.ckpt"
        trainer.fit(module, data, ckpt_path=path if epochs == 4 else None)
        trainer.save_checkpoint(path)
    factors = module.regularizer.factors()
    assert factors == pytest.approx(plain[1].factors(), rel=1e-4)


@pytest.fixture
def make_trainer(tmp_path):
    """A function that makes the example's Trainer, quiet and on the CPU."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    make = importlib.import_module(f"{EXAMPLES}.with_transformers").make_trainer
    quiet = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return lambda epochs, **options: make(str(tmp_path), epochs, **quiet | options)


@pytest.mark.parametrize("accumulated", [{}, {"batch": 16, "gradient_accumulation_steps": 4}])
def test_the_trainer_trains_as_the_plain_loop(accumulated, plain, make_trainer):
    def train() -> tuple[nn.Module, AdaptiveL2]:
        trainer = make_trainer(4, **accumulated)
        trainer.train()
        return trainer.model, trainer.regularizer

    assert_same(run(train), plain)


def test_the_trainers_checkpoints_keep_theta(plain, make_trainer, tmp_path):
    make_trainer(2, save_strategy="epoch").train()
    checkpoint = tmp_path / "checkpoint-2"
    trainer = make_trainer(4)
    trainer.regularizer.load_theta(json.loads((checkpoint / "theta.json").read_text()))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.regularizer.factors() == pytest.approx(plain[1].factors(), rel=1e-4)


def test_the_tracker_keeps_the_numbers_of_people(monkeypatch):
    tracker = importlib.import_module(f"{EXAMPLES}.tracker")

    class Session:
        """Stands for a model: an embedding is the mean colour of a crop."""

        def run(self, _outputs, inputs):
            return [inputs["images"].mean((1, 2)).astype(np.float32)]

    monkeypatch.setattr(tracker.onnxruntime, "InferenceSession", lambda model: Session())
    red, green, blue = (np.full((8, 4, 3), c, np.uint8) for c in np.eye(3, dtype=np.uint8) * 200)
    follow = tracker.Tracker("reid.onnx", least_similarity=0.9)
    assert follow([red, green]) == [0, 1]
    assert follow([]) == []
    assert follow([green, blue, red]) == [1, 2, 0]
    assert follow([blue]) == [2]
