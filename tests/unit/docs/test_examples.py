"""The examples in docs/examples: the same training by a plain loop, Lightning and the Trainer."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reid_train.regularization import AdaptiveL2

EXAMPLES = "docs.examples"
CPU = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(scope="module")
def plain() -> tuple[nn.Module, AdaptiveL2]:
    return importlib.import_module(f"{EXAMPLES}.plain_loop").train()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def gradients(model: nn.Module, regularizer: AdaptiveL2) -> list[Tensor | None]:
    return [parameter.grad for parameter in (*model.parameters(), regularizer.theta)]


def assert_same(found: tuple[nn.Module, AdaptiveL2], plain: tuple[nn.Module, AdaptiveL2]) -> None:
    """λ, weights and the last gradients, the penalty's among them, are those of the plain loop."""
    factors = found[1].factors()
    assert factors == pytest.approx(plain[1].factors(), rel=1e-4)
    assert max(factors.values()) < 0.0025, "λ has decayed from A / 2"
    torch.testing.assert_close(tensors(found[0]), tensors(plain[0]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(*found), gradients(*plain), rtol=1e-4, atol=1e-5)


def test_lightning_trains_as_the_plain_loop(plain):
    pytest.importorskip("pytorch_lightning")
    train = importlib.import_module(f"{EXAMPLES}.with_lightning").train
    assert_same(train(**CPU), plain)


def test_lightning_adds_the_penalty_once_for_a_step(plain):
    pytest.importorskip("pytorch_lightning")
    train = importlib.import_module(f"{EXAMPLES}.with_lightning").train
    assert_same(train(batch=16, accumulate_grad_batches=4, **CPU), plain)


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
    assert_same((module.model, module.regularizer), plain)


@pytest.fixture
def trainer_example():
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    return importlib.import_module(f"{EXAMPLES}.with_transformers")


QUIET = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}


def test_the_trainer_trains_as_the_plain_loop(plain, trainer_example, tmp_path):
    assert_same(trainer_example.train(str(tmp_path), **QUIET), plain)


def test_the_trainer_adds_the_penalty_once_for_accumulated_gradients(
    plain, trainer_example, tmp_path
):
    found = trainer_example.train(str(tmp_path), batch=16, gradient_accumulation_steps=4, **QUIET)
    assert_same(found, plain)


def test_the_trainers_checkpoints_keep_theta(trainer_example, tmp_path):
    settings = QUIET | {"save_strategy": "epoch"}
    _, regularizer = trainer_example.train(str(tmp_path), epochs=1, **settings)
    saved = tmp_path / "checkpoint-1" / "theta.json"
    assert saved.read_text() == json.dumps(regularizer.theta_by_name())


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
