"""A checkpoint of a tiny network, for the tests that read checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import config, narrow_resnet18
from torchvision.models import resnet

from reid_train.model.pretrained import build_model
from reid_train.training.checkpoint import Origin, Position, save
from reid_train.training.history import History
from reid_train.training.optimizer import build_optimizer, build_regularizer

ORIGIN = Origin("m" * 64, "e" * 64, identities=5)
PROGRESS = Position(epoch=1, step=2, global_step=5, phase="all")
SETTINGS = config(optimizer__frozen_epochs=0)


def trained(seed: int, steps: int = 1):
    """A network, its regularizer and its optimizer after a step or more."""
    torch.manual_seed(seed)
    model = build_model(SETTINGS.replace(seed=seed), ORIGIN.identities)
    model = model.to(memory_format=torch.channels_last)
    regularizer = build_regularizer(SETTINGS, model)
    optimizer = build_optimizer(SETTINGS, model, regularizer)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(torch.randn(4, 3, 32, 32)).logits
        torch.stack(logits).square().sum().backward()
        regularizer.add_gradients()
        optimizer.step()
    return model, regularizer, optimizer


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet, "resnet18", narrow_resnet18)
        model, regularizer, optimizer = trained(0)
    history = History(tensor_names=list(regularizer.names), tensor_kinds=list(regularizer.kinds))
    history.add_step(1, {"loss/total": 2.5})
    history.add_evaluation(1, {"mAP": 0.25}, 1)
    history.add_factors(1, regularizer.factor_vector().detach().numpy())
    folder = tmp_path_factory.mktemp("checkpoint") / "original"
    save(
        folder,
        config=SETTINGS,
        origin=ORIGIN,
        progress=PROGRESS,
        history=history,
        model=model,
        regularizer=regularizer,
        optimizer=optimizer,
        rank_list={"query": np.arange(3)},
    )
    return folder, (model, regularizer, optimizer)
