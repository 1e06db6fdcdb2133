"""The regularizer against the authors' numbers, and the closed form against autograd."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_workers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data_shards.errors import ConfigError, DataError
from reid_train.regularization import AdaptiveL2, ConstantL2

GOLDEN = Path(__file__).parent.parent / "golden" / "adaptive_l2.npz"


def _network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 4, 5, bias=False)
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


def _loss(network: nn.Module, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return network(torch.randn(4, 3, 4, 4, generator=generator)).square().mean()


def _set_theta(regularizer: AdaptiveL2, values: list[float] | Tensor) -> None:
    with torch.no_grad():
        regularizer.theta.copy_(torch.as_tensor(values))


def _gradients(network: nn.Module, regularizer: AdaptiveL2) -> list[Tensor]:
    parameters = [*network.parameters(), regularizer.theta]
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]


class _Tensors(nn.Module):
    def __init__(self, tensors: list[np.ndarray]) -> None:
        super().__init__()
        self.tensors = nn.ParameterList([nn.Parameter(torch.tensor(t)) for t in tensors])


@pytest.mark.parametrize("form", ["closed", "autograd"])
def test_penalty_and_gradients_match_the_authors(form):
    with np.load(GOLDEN, allow_pickle=False) as file:
        golden = dict(file)
    count = len(golden["theta"])
    model = _Tensors([golden[f"weight_{i}"] for i in range(count)])
    regularizer = AdaptiveL2(model, float(golden["amplitude"]))
    _set_theta(regularizer, golden["theta"])
    if form == "closed":
        regularizer.add_gradients()
    else:
        regularizer.penalty().backward()
    assert regularizer.theta.grad is not None
    np.testing.assert_allclose(regularizer.theta.grad, golden["grad_theta"], rtol=1e-5)
    for i, weight in enumerate(model.tensors):
        np.testing.assert_allclose(weight.grad, golden[f"grad_weight_{i}"], rtol=1e-5, atol=1e-12)
    expected = golden["penalty"].sum()
    np.testing.assert_allclose(regularizer.last_penalty.item(), expected, rtol=1e-6)


def test_each_tensors_penalty_matches_the_authors():
    with np.load(GOLDEN, allow_pickle=False) as golden:
        for i, theta in enumerate(golden["theta"]):
            model = _Tensors([golden[f"weight_{i}"]])
            regularizer = AdaptiveL2(model, float(golden["amplitude"]))
            _set_theta(regularizer, [theta])
            expected = golden["penalty"][i]
            np.testing.assert_allclose(regularizer.penalty().item(), expected, rtol=1e-6)


thetas = st.one_of(
    st.floats(-4, 4, width=32), st.sampled_from([-2.5, 2.5, 0.0, float(np.float32(2.4999998))])
)
modules = st.sampled_from(
    [
        nn.Conv2d(3, 4, 3),
        nn.Conv1d(2, 4, 2, bias=False),
        nn.Linear(5, 3),
        nn.BatchNorm1d(4),
        nn.LayerNorm((2, 3)),
        nn.Embedding(7, 2),
        nn.LSTM(3, 2),
        nn.MultiheadAttention(4, 2),
    ]
)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), layers=st.lists(modules, min_size=1, max_size=4, unique=True))
def test_closed_form_equals_autograd(data, layers):
    network = nn.ModuleList(layers)
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    for parameter in network.parameters():
        nn.init.normal_(parameter)
        parameter.requires_grad_(data.draw(st.booleans()))
        start = torch.randn_like(parameter) if parameter.requires_grad else None
        parameter.grad = data.draw(st.sampled_from([None, start]))
    regularizer = AdaptiveL2(
        network,
        data.draw(st.floats(0, 2)),
        amplitudes={"kernel": data.draw(st.floats(0, 2))},
        saturation=2.5,
    )
    _set_theta(regularizer, [data.draw(thetas) for _ in regularizer.names])
    before = _gradients(network, regularizer)

    regularizer.add_gradients()
    closed = _gradients(network, regularizer)
    for parameter, gradient in zip([*network.parameters()], before, strict=False):
        parameter.grad = gradient if parameter.requires_grad else None
    regularizer.theta.grad = None
    penalty = regularizer.penalty()
    if penalty.requires_grad:
        penalty.backward()
    for ours, reference in zip(closed, _gradients(network, regularizer), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(regularizer.last_penalty, penalty.detach())
    for parameter in network.parameters():
        parameter.grad = None


def test_norms_of_large_tensors_are_exact():
    # float32 sums in one go are off by a part in a thousand here.
    weight = torch.rand(1024, 1024, 3, 3)
    expected = 0.0025 * weight.double().square().sum()
    for layout in (torch.contiguous_format, torch.channels_last):
        model = _Tensors([])
        model.tensors.append(nn.Parameter(weight.to(memory_format=layout)))
        regularizer = AdaptiveL2(model)
        regularizer.add_gradients()
        torch.testing.assert_close(regularizer.last_penalty.double(), expected, rtol=1e-6, atol=0.0)


def test_factor_starts_at_half_the_amplitude_and_stays_in_its_range():
    regularizer = AdaptiveL2(_network(), 0.004)
    assert list(regularizer.factors().values()) == pytest.approx([0.002] * 5)
    _set_theta(regularizer, [-3.0, -2.5, 2.5, 3.0, 1.25])
    assert list(regularizer.factors().values()) == pytest.approx([0.0, 0.0, 0.004, 0.004, 0.003])


def test_kinds_follow_the_owning_module():
    network = nn.ModuleDict(
        {
            "conv": nn.Conv2d(1, 1, 1),
            "linear": nn.Linear(1, 1),
            "table": nn.Embedding(2, 2),
            "norm": nn.GroupNorm(1, 2),
            "attention": nn.MultiheadAttention(2, 1),
            "loose": nn.ParameterList([nn.Parameter(torch.ones(2))]),
        }
    )
    regularizer = AdaptiveL2(network, 1.0, amplitudes={"bias": 2.0, "gamma": 4.0, "beta": 6.0})
    assert {name: 2 * factor for name, factor in regularizer.factors().items()} == {
        "conv.weight": 1.0,
        "conv.bias": 2.0,
        "linear.weight": 1.0,
        "linear.bias": 2.0,
        "table.weight": 1.0,
        "norm.weight": 4.0,
        "norm.bias": 6.0,
        "attention.in_proj_weight": 1.0,
        "attention.in_proj_bias": 2.0,
        "attention.out_proj.weight": 1.0,
        "attention.out_proj.bias": 2.0,
        "loose.0": 1.0,
    }


def test_excluded_tensors_are_unchanged():
    network = _network()
    regularizer = AdaptiveL2(network, exclude=["1.*", "*.bias"])
    assert regularizer.names == ("0.weight", "3.weight")
    regularizer.add_gradients()
    assert network[0].bias.grad is None
    assert network[0].weight.grad is not None


def test_a_shared_tensor_counts_once():
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    regularizer = AdaptiveL2(nn.Sequential(first, second), 1.0)
    assert regularizer.names == ("0.weight",)
    regularizer.add_gradients()
    torch.testing.assert_close(first.weight.grad, first.weight.detach())


def test_frozen_tensors_and_their_theta_stay_while_others_move():
    network = _network()
    network[0].requires_grad_(False)
    regularizer = AdaptiveL2(network, 0.1)
    optimizer = torch.optim.Adam(regularizer.parameter_groups(lr=0.1))
    before = [p.detach().clone() for p in network.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        regularizer.add_gradients()
        optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True)]
    assert moved == [False, False, True, True, True]
    assert (regularizer.theta != 0).tolist() == moved
    network[0].requires_grad_(True)
    regularizer.add_gradients()
    assert network[0].weight.grad is not None


def test_theta_only_falls_about_a_learning_rate_a_step():
    network = _network()
    regularizer = AdaptiveL2(network)
    optimizer = torch.optim.Adam(regularizer.parameter_groups(1e-2), eps=1e-7)
    for _ in range(5):
        optimizer.zero_grad()
        _loss(network).backward()
        regularizer.add_gradients()
        optimizer.step()
    theta = regularizer.theta.detach()
    torch.testing.assert_close(theta, torch.full_like(theta, -5e-2), rtol=0.05, atol=0.0)


def test_adding_gradients_equals_the_penalty_in_the_loss():
    def train(closed: bool) -> list[Tensor]:
        network = _network()
        regularizer = AdaptiveL2(network, 0.05)
        optimizer = torch.optim.Adam(regularizer.parameter_groups(1e-2))
        for step in range(4):
            optimizer.zero_grad()
            loss = _loss(network, step)
            (loss if closed else loss + regularizer.penalty()).backward()
            if closed:
                regularizer.add_gradients()
            nn.utils.clip_grad_norm_([*network.parameters(), regularizer.theta], 0.5)
            optimizer.step()
        return [*network.parameters(), regularizer.theta]

    for ours, reference in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


def test_once_a_step_whatever_the_accumulation():
    network = _network()
    regularizer = AdaptiveL2(network, 0.05)
    losses = [_loss(network, seed) for seed in range(3)]
    for loss in losses:
        (loss / 3).backward()
    regularizer.add_gradients()
    accumulated = _gradients(network, regularizer)
    network.zero_grad()
    regularizer.zero_grad()
    mean = sum(_loss(network, seed) for seed in range(3)) / 3
    (mean + regularizer.penalty()).backward()
    for ours, reference in zip(accumulated, _gradients(network, regularizer), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


def test_autocast_changes_nothing():
    network = _network()
    regularizer = AdaptiveL2(network, 0.05)
    regularizer.add_gradients()
    expected, penalty = _gradients(network, regularizer), regularizer.penalty()
    network.zero_grad()
    regularizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        regularizer.add_gradients()
        assert torch.equal(regularizer.penalty(), penalty)
    for a, b in zip(expected, _gradients(network, regularizer), strict=True):
        assert torch.equal(a, b)


def test_bfloat16_weights_have_float32_norms():
    network = _network().to(torch.bfloat16)
    regularizer = AdaptiveL2(network, 0.05)
    regularizer.add_gradients()
    expected = 0.025 * sum(p.double().square().sum() for p in network.parameters())
    torch.testing.assert_close(regularizer.last_penalty.double(), expected, rtol=1e-5, atol=0.0)


def test_off_the_cpu_nothing_waits_for_the_device():
    # A meta tensor has no values: reading one to the host, as a wait would, raises.
    network = _network().to("meta")
    regularizer = AdaptiveL2(network)
    regularizer.add_gradients()
    network[0].requires_grad_(False)
    regularizer.add_gradients()
    assert regularizer.theta.grad is not None
    assert regularizer.last_penalty.shape == ()


def test_a_compiled_model_keeps_its_names():
    network = _network()
    compiled = torch.compile(network, backend="eager")
    regularizer = AdaptiveL2(compiled)  # type: ignore[arg-type]
    assert regularizer.names == AdaptiveL2(network).names
    regularizer.add_gradients()
    assert network[0].weight.grad is not None


def test_state_dict_holds_theta_and_nothing_of_the_model():
    regularizer = AdaptiveL2(_network())
    assert list(regularizer.state_dict()) == ["theta"]
    assert [name for name, _ in regularizer.named_parameters()] == ["theta"]


def test_theta_travels_by_name():
    regularizer = AdaptiveL2(_network())
    _set_theta(regularizer, torch.randn(5))
    other = AdaptiveL2(_network())
    other.load_theta(dict(reversed(regularizer.theta_by_name().items())))
    assert torch.equal(other.theta, regularizer.theta)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda t: t.pop("0.bias"), "none saved for 0.bias"), (lambda t: t.update(x=1.0), "for x")],
)
def test_theta_of_another_model_is_refused(change, message):
    regularizer = AdaptiveL2(_network())
    theta = regularizer.theta_by_name()
    change(theta)
    with pytest.raises(DataError, match=message):
        regularizer.load_theta(theta)
    assert not regularizer.theta.any()


def test_parameter_groups_hold_everything_once():
    network = _network()
    regularizer = AdaptiveL2(network, exclude=["1.*"])
    weights, theta = regularizer.parameter_groups(lr=0.1, theta_lr_multiplier=3.0)
    assert {id(p) for p in weights["params"]} == {id(p) for p in network.parameters()}
    assert theta["params"] == [regularizer.theta]
    assert (weights["lr"], theta["lr"], theta["name"]) == (0.1, pytest.approx(0.3), "theta")
    assert weights["weight_decay"] == theta["weight_decay"] == 0.0


def test_constant_mode_is_adaptive_mode_with_fixed_factors():
    network, same = _network(), _network()
    constant, adaptive = ConstantL2(network, 0.0025), AdaptiveL2(same, 0.005)
    constant.add_gradients()
    adaptive.add_gradients()
    for a, b in zip(network.parameters(), same.parameters(), strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(constant.last_penalty, adaptive.last_penalty)
    assert constant.factors() == pytest.approx(adaptive.factors())
    assert not list(constant.parameters())
    assert len(constant.parameter_groups(0.1)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"amplitude": -0.1}, "amplitude of kernel"),
        ({"amplitude": math.nan}, "amplitude"),
        ({"amplitudes": {"beta": math.inf}}, "amplitude of beta"),
        ({"amplitudes": {"weight": 0.1}}, "no kind 'weight'"),
        ({"saturation": 0.0}, "saturation"),
        ({"exclude": ["0.*", "head.*"]}, "'head.*' matches no parameter"),
        ({"exclude": ["*"]}, "no parameter left"),
    ],
)
def test_senseless_settings_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        AdaptiveL2(_network(), **arguments)


def _worker(rank: int) -> dict[str, Tensor]:
    network = _network()
    parallel = DistributedDataParallel(network)
    regularizer = AdaptiveL2(parallel, 0.05)
    optimizer = torch.optim.Adam(regularizer.parameter_groups(1e-2))
    for step in range(3):
        optimizer.zero_grad()
        _loss(parallel, 10 * step + rank).backward()
        regularizer.add_gradients()
        optimizer.step()
    weights = {name: p.detach() for name, p in network.named_parameters()}
    return {"names": torch.tensor(len(regularizer.names)), **regularizer.state_dict(), **weights}


def test_ranks_stay_equal_without_an_all_reduce():
    first, second = run_workers(_worker, 2)
    assert first["theta"].all()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
