"""Any module: types of weights, and parameters that are replaced, renamed, moved or copied."""

from __future__ import annotations

import logging
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations

from data_shards.errors import ConfigError
from reid_train.model import weight_gradients
from reid_train.regularization import AdaptiveL2, ConstantL2

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex64, torch.complex128)


def _parameters(**tensors: Tensor) -> nn.ParameterDict:
    return nn.ParameterDict({name: nn.Parameter(value) for name, value in tensors.items()})


def _assert_right(model: nn.Module, regularizer: AdaptiveL2, given: dict[str, Tensor]) -> None:
    """Compare gradients with 2 λ w and A ‖w‖² / 2c, computed in float64."""
    penalty, thetas = 0.0, []
    for name, weight in model.named_parameters():
        w = weight.detach().to(torch.complex128 if weight.is_complex() else torch.float64)
        square = (w.conj() * w).real.sum()
        assert weight.grad is not None
        expected = 0.0025 * 2 * w + given.get(name, torch.zeros(())).to_dense()
        # The sum and 2 λ w are both rounded to the weight's type.
        rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(weight.dtype, 1e-5)
        bound = rounding * (expected.abs() + 0.005 * w.abs()) + 1e-8
        assert ((weight.grad.to(w.dtype) - expected).abs() <= bound).all()
        thetas.append(0.005 * square / 5)
        penalty = penalty + 0.0025 * square
    assert regularizer.theta.grad is not None
    found = regularizer.theta.grad.double()
    torch.testing.assert_close(found, torch.stack(thetas), rtol=1e-5, atol=1e-12)
    assert regularizer.last_penalty.item() == pytest.approx(float(penalty), rel=1e-5)
    assert regularizer.penalty().item() == pytest.approx(float(penalty), rel=1e-5)


@pytest.fixture(params=["tensor by tensor", "by lists"])
def way(request, monkeypatch) -> None:
    """Both ways of adding: the CPU's, and the one of other devices, here on the CPU, too."""
    if request.param == "by lists":

        def add(weights, scales: list[float]) -> list[Tensor]:
            return weight_gradients._add_lists(weights, torch.tensor(scales).unbind())

        monkeypatch.setattr(weight_gradients, "_add_each", add)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [*TYPES, *COMPLEX], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["no gradient yet", "a gradient"])
def test_weights_of_any_type(dtype, given):
    torch.manual_seed(0)
    shapes = {"scalar": (), "vector": (17,), "matrix": (5, 7), "kernel": (4, 3, 3, 3)}
    model = _parameters(**{name: torch.randn(shape).to(dtype) for name, shape in shapes.items()})
    gradients = {}
    for name, weight in model.named_parameters():
        if given:
            weight.grad = torch.randn_like(weight)
            gradients[name] = weight.grad.clone()
    regularizer = AdaptiveL2(model)
    regularizer.add_gradients()
    _assert_right(model, regularizer, gradients)


@pytest.mark.usefixtures("way")
def test_types_may_be_mixed_and_weights_empty_or_of_any_layout():
    torch.manual_seed(0)
    model = _parameters(
        wide=torch.randn(3, 4, dtype=torch.float64),
        narrow=torch.randn(3).to(torch.bfloat16),
        complex=torch.randn(6, dtype=torch.complex64),
        transposed=torch.randn(4, 5).t(),
        strided=torch.randn(12)[::2],
        last=torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    )
    regularizer = AdaptiveL2(model)
    regularizer.add_gradients()
    _assert_right(model, regularizer, {})
    empty = _parameters(none=torch.zeros(0, 3), rows=torch.zeros(3, 0), some=torch.ones(2))
    regularizer = AdaptiveL2(empty, 1.0)
    regularizer.add_gradients()
    assert regularizer.theta.grad is not None
    assert regularizer.theta.grad.tolist() == pytest.approx([0.0, 0.0, 0.4])


@pytest.mark.usefixtures("way")
def test_a_sparse_gradient_becomes_dense_as_in_autograd():
    table = nn.Embedding(6, 3, sparse=True)
    table(torch.tensor([1, 1, 4])).sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad.is_sparse
    given = {"weight": table.weight.grad.clone()}
    regularizer = AdaptiveL2(table)
    regularizer.add_gradients()
    _assert_right(table, regularizer, given)


@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_complex_closed_form_equals_autograd(dtype):
    torch.manual_seed(0)
    model = _parameters(vector=torch.randn(5, dtype=dtype), matrix=torch.randn(2, 3, dtype=dtype))
    regularizer = AdaptiveL2(model)
    regularizer.penalty().backward()
    expected = [weight.grad for weight in [*model.parameters(), regularizer.theta]]
    model.zero_grad()
    regularizer.zero_grad()
    regularizer.add_gradients()
    for weight, gradient in zip([*model.parameters(), regularizer.theta], expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)


def test_weights_on_several_devices():
    with FakeTensorMode():  # tensors that have a device, and no values
        model = _parameters(
            first=torch.ones(3, device="cuda:0"),
            second=torch.ones(2, 2, device="cuda:1"),
            third=torch.ones(4, device="cuda:0"),
        )
        regularizer = AdaptiveL2(model)
        regularizer.add_gradients()
        devices = [weight.grad.device.index for weight in [*model.values(), regularizer.theta]]
        assert devices == [0, 1, 0, 0]
        assert regularizer.penalty().device.index == 0


def test_constant_l2_has_the_same_arithmetic():
    model = _parameters(complex=torch.randn(4, dtype=torch.complex64), wide=torch.ones(2).double())
    regularizer = ConstantL2(model, 0.5)
    regularizer.add_gradients()
    for weight in model.parameters():
        torch.testing.assert_close(weight.grad, weight.detach())


# --- parameters that change -------------------------------------------------------------------


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def _assert_follows(regularizer: AdaptiveL2, model: nn.Module) -> None:
    for weight in model.parameters():
        weight.grad = None
    regularizer.add_gradients()
    _assert_right(model, regularizer, {})


def _assign(model: nn.Module) -> None:
    state = {name: value + 1.0 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _overwrite(model: nn.Module) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def _new_object(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(torch.ones(4, 3))  # type: ignore[index]


@pytest.mark.parametrize("replace", [_assign, _overwrite, _new_object])
def test_replaced_parameters_are_looked_up_by_name(replace):
    model = _model()
    regularizer = AdaptiveL2(model)
    replace(model)
    _assert_follows(regularizer, model)
    assert regularizer.parameter_groups(0.1)[0]["params"] == list(model.parameters())


@pytest.mark.parametrize("replace", [_assign, _overwrite, _new_object])
def test_parameters_replaced_behind_the_optimizer_are_an_error_until_it_is_made_again(replace):
    model = _model()
    regularizer = AdaptiveL2(model)
    torch.optim.Adam(regularizer.parameter_groups(0.1))
    replace(model)
    with pytest.raises(ConfigError, match=r"first 0\.weight.* make the optimizer again"):
        regularizer.add_gradients()
    torch.optim.Adam(regularizer.parameter_groups(0.1))
    _assert_follows(regularizer, model)


def test_a_model_without_values_gets_them_later():
    with torch.device("meta"):
        model = _model()
    regularizer = AdaptiveL2(model, amplitudes={"bias": 0.005})
    model.to_empty(device="cpu")
    for weight in model.parameters():
        nn.init.normal_(weight)
    _assert_follows(regularizer, model)
    assert regularizer.factors() == pytest.approx(dict.fromkeys(regularizer.names, 0.0025))


def _weight_norm(model: nn.Sequential) -> None:
    parametrizations.weight_norm(model[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_weight_norm, r"0\.weight is gone; 0\.parametrizations\.weight\.original0 is new"),
        (lambda m: m.append(nn.Linear(2, 2)), r"2\.weight is new"),
        (lambda m: m.pop(1), r"1\.weight is gone"),
        (lambda m: m.register_parameter("extra", nn.Parameter(torch.ones(1))), "extra is new"),
        (lambda m: setattr(m[0].bias, "data", torch.ones(5)), r"0\.bias was \(4,\) and is \(5,\)"),
    ],
)
@pytest.mark.parametrize("call", ["add_gradients", "penalty", "parameter_groups"])
def test_a_model_with_other_parameters_needs_a_new_regularizer(change, message, call):
    model = _model()
    regularizer = AdaptiveL2(model)
    change(model)
    arguments = (0.1,) if call == "parameter_groups" else ()
    with pytest.raises(ConfigError, match=message):
        getattr(regularizer, call)(*arguments)


def test_a_copy_of_model_and_regularizer_belongs_together():
    model = _model()
    regularizer = AdaptiveL2(model)
    copied, copied_regularizer = deepcopy((model, regularizer))
    _assert_follows(copied_regularizer, copied)
    assert all(weight.grad is None for weight in model.parameters())


def _train(model: nn.Module, regularizer: AdaptiveL2, steps: int) -> None:
    optimizer = torch.optim.Adam(regularizer.parameter_groups(0.1))
    for _ in range(steps):
        optimizer.zero_grad()
        model.zero_grad()
        model(torch.ones(2, 3)).square().mean().backward()
        regularizer.add_gradients()
        optimizer.step()


def test_a_regularizer_of_another_copy_of_the_model_is_noticed(caplog):
    model = _model()
    regularizer = AdaptiveL2(model)
    _train(deepcopy(model), regularizer, 3)
    assert [record.message for record in caplog.records if "not of a copy" in record.message]


def test_a_regularizer_of_the_trained_model_says_nothing(caplog):
    model = _model()
    _train(model, AdaptiveL2(model), 3)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_shared_parameters_stay_one_when_replaced():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    regularizer = AdaptiveL2(model)
    shared = nn.Parameter(torch.full((3, 3), 2.0))
    model[0].weight = model[1].weight = shared
    regularizer.add_gradients()
    assert regularizer.names == ("0.weight", "0.bias", "1.bias")
    torch.testing.assert_close(shared.grad, 0.005 * shared.detach())


def test_wrappers_inside_a_model_do_not_change_names():
    model = _model()
    names = AdaptiveL2(model).names
    regularizer = AdaptiveL2(model)
    model[0] = torch.compile(model[0], backend="eager")  # type: ignore[assignment]
    assert AdaptiveL2(model).names == names
    assert "0._orig_mod.weight" in dict(model.named_parameters())
    regularizer.add_gradients()
    assert AdaptiveL2(nn.DataParallel(_model())).names == names
