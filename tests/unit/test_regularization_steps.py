"""The order of a training step: what is cleared, scaled, clipped and accumulated, and mistakes."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from data_shards.errors import ConfigError
from reid_train.model.step_order import STUCK_CALLS
from reid_train.regularization import AdaptiveL2, ConstantL2

SCALE = 1024.0


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))


def _loss(model: nn.Module, step: int) -> Tensor:
    return model(torch.full((2, 3), 0.1 * (step + 1))).square().mean()


def _warnings(caplog) -> list[str]:
    return [r.message for r in caplog.records if r.levelno >= logging.WARNING]


def _reference(steps: int = 4, parts: int = 1) -> list[Tensor]:
    """Weights and θ after some steps with the penalty in the loss."""
    model = _model()
    regularizer = AdaptiveL2(model, 0.5)
    optimizer = torch.optim.SGD(regularizer.parameter_groups(0.1))
    parameters = [*model.parameters(), regularizer.theta]
    for step in range(steps):
        optimizer.zero_grad()
        loss = sum(_loss(model, step + part) for part in range(parts)) / parts
        (loss + regularizer.penalty()).backward()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("cleared", ["optimizer", "model"])
@pytest.mark.parametrize("to_none", [True, False])
def test_either_zero_grad_is_right(caplog, cleared, to_none):
    model = _model()
    regularizer = AdaptiveL2(model, 0.5)
    optimizer = torch.optim.SGD(regularizer.parameter_groups(0.1))
    parameters = [*model.parameters(), regularizer.theta]
    for step in range(4):
        (optimizer if cleared == "optimizer" else model).zero_grad(set_to_none=to_none)
        _loss(model, step).backward()
        regularizer.add_gradients()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
    for ours, reference in zip(parameters, _reference(), strict=True):
        torch.testing.assert_close(ours, reference)
    assert not _warnings(caplog)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("cleared", ["optimizer", "model"])
def test_a_gradient_scaler_by_the_book_changes_nothing(caplog, kind, fused, cleared):
    def train(scaled: bool) -> list[Tensor]:
        model = _model()
        regularizer = AdaptiveL2(model, 0.5)
        optimizer = kind(regularizer.parameter_groups(0.1), fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=scaled)
        parameters = [*model.parameters(), regularizer.theta]
        for step in range(4):
            (optimizer if cleared == "optimizer" else model).zero_grad()
            for part in range(2):
                scaler.scale(_loss(model, step + part) / 2).backward()
            scaler.unscale_(optimizer)
            regularizer.add_gradients()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            scaler.step(optimizer)
            scaler.update()
        return [p.detach() for p in parameters]

    for ours, reference in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(ours, reference)
    if kind is torch.optim.SGD:
        for ours, reference in zip(train(True), _reference(parts=2), strict=True):
            torch.testing.assert_close(ours, reference)
    assert not _warnings(caplog)


def test_a_step_that_the_scaler_skips_leaves_theta(caplog):
    model = _model()
    regularizer = AdaptiveL2(model, 0.5)
    optimizer = torch.optim.SGD(regularizer.parameter_groups(0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(_loss(model, step) * (float("inf") if step == 0 else 1.0)).backward()
        scaler.unscale_(optimizer)
        regularizer.add_gradients()
        scaler.step(optimizer)
        scaler.update()
        assert bool(regularizer.theta.any()) == (step > 0)
    assert not _warnings(caplog)


@pytest.mark.parametrize("make", [AdaptiveL2, ConstantL2])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("cleared", ["optimizer", "model"])
@pytest.mark.parametrize("clipped", [False, True])
def test_a_gradient_scaler_without_unscale_is_an_error(make, fused, cleared, clipped):
    model = nn.Linear(4, 5)
    regularizer = make(model, 0.5)
    optimizer = torch.optim.Adam(regularizer.parameter_groups(0.1), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)

    def step(factor: float) -> None:
        (optimizer if cleared == "optimizer" else model).zero_grad()
        scaler.scale(model(torch.ones(1, 4)).mean() * factor).backward()
        regularizer.add_gradients()
        if clipped:
            nn.utils.clip_grad_norm_([*model.parameters(), *regularizer.parameters()], 1e9)
        scaler.step(optimizer)
        scaler.update()

    step(1.0)
    with pytest.raises(ConfigError, match=r"divided by 1024 .*scaler\.unscale_\(optimizer\)"):
        step(2.0)


def test_dividing_the_gradients_by_hand_after_the_penalty_is_an_error():
    model = _model()
    regularizer = AdaptiveL2(model)
    optimizer = torch.optim.SGD(regularizer.parameter_groups(0.1))

    def step(number: int) -> None:
        optimizer.zero_grad()
        _loss(model, number).backward()
        regularizer.add_gradients()
        for parameter in [*model.parameters(), regularizer.theta]:
            assert parameter.grad is not None
            parameter.grad /= 4
        optimizer.step()

    step(0)
    with pytest.raises(ConfigError, match="divided by 4 "):
        step(1)


def test_adding_for_each_micro_batch_is_noticed(caplog):
    model = _model()
    regularizer = AdaptiveL2(model)
    optimizer = torch.optim.SGD(regularizer.parameter_groups(0.1))
    optimizer.zero_grad()
    for part in range(2):
        _loss(model, part).backward()
        regularizer.add_gradients()
    assert len(found := _warnings(caplog)) == 1
    assert "once per optimizer step" in found[0]


@pytest.mark.parametrize("mistake", ["not in the optimizer", "after the step"])
def test_theta_that_never_moves_is_noticed(caplog, mistake):
    model = _model()
    regularizer = AdaptiveL2(model)
    late = mistake == "after the step"
    groups = regularizer.parameter_groups(0.1) if late else model.parameters()
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for step in range(STUCK_CALLS):
        optimizer.zero_grad()
        regularizer.zero_grad()
        _loss(model, step).backward()
        if late:
            optimizer.step()
        regularizer.add_gradients()
        if not late:
            optimizer.step()
    assert len(found := _warnings(caplog)) == 1
    assert "parameter_groups()" in found[0]


def test_theta_that_is_held_is_no_mistake(caplog):
    model = _model()
    regularizer = AdaptiveL2(model)
    optimizer = torch.optim.SGD(regularizer.parameter_groups(0.1, theta_lr_multiplier=0.0))
    for step in range(STUCK_CALLS):
        model.zero_grad()
        _loss(model, step).backward()
        regularizer.add_gradients()
        optimizer.step()
    assert not regularizer.theta.any()
    assert not _warnings(caplog)
