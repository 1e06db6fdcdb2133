"""Models that FSDP shards, on two gloo processes, against one process with the whole model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from processes import run_workers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard

from data_shards.errors import ConfigError
from reid_train.regularization import AdaptiveL2

WORLD = 2
STEPS = 3


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    # Sizes that two ranks cannot share equally, and a tensor of one element.
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))


def _loss(model: nn.Module, step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return model(torch.randn(4, 7, generator=generator)).square().mean()


def _fsdp1(model: nn.Module, **options) -> nn.Module:
    options = {"use_orig_params": True} | options
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


def _fsdp2(model: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(model[2], mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "fsdp1": _fsdp1,
    "fsdp1 inside fsdp1": lambda m: _fsdp1(nn.Sequential(m[0], m[1], _fsdp1(m[2]), m[3], m[4])),
    "fsdp1 that shards nothing": lambda m: _fsdp1(m, sharding_strategy=ShardingStrategy.NO_SHARD),
    "fsdp2": _fsdp2,
}


def _trained(model: nn.Module, regularizer: AdaptiveL2, rank: int) -> dict[str, Tensor]:
    optimizer = torch.optim.Adam(regularizer.parameter_groups(0.1), eps=1.0)
    penalties = []
    for step in range(STEPS):
        optimizer.zero_grad()
        _loss(model, step, rank).backward()
        regularizer.add_gradients()
        optimizer.step()
        penalties.append(regularizer.last_penalty)
    return {
        "theta": regularizer.theta.detach(),
        "penalties": torch.stack(penalties),
        "losses": torch.stack([_loss(model, step, rank).detach() for step in range(STEPS)]),
    }


def _wrapped(rank: int, name: str) -> dict[str, Tensor]:
    model = WRAPPERS[name](_model())
    regularizer = AdaptiveL2(model, 0.5)
    assert regularizer.names == AdaptiveL2(_model()).names
    first = {"first penalty": regularizer.last_penalty}
    return first | _trained(model, regularizer, rank)


def _sharded_afterwards(rank: int) -> dict[str, Tensor]:
    model = _model()
    regularizer = AdaptiveL2(model, 0.5)
    first = {"first penalty": regularizer.last_penalty}
    return first | _trained(_fsdp2(model), regularizer, rank)


def _by_autograd(rank: int) -> dict[str, Tensor]:
    """Gradients of `penalty()` and of the closed form, through FSDP2."""
    model = _fsdp2(_model())
    regularizer = AdaptiveL2(model, 0.5)
    regularizer.penalty().backward()
    found = {}
    for form in ("autograd", "closed"):
        for name, weight in model.named_parameters():
            found[f"{form} {name}"] = weight.grad.full_tensor()  # type: ignore[union-attr]
        found[f"{form} theta"] = regularizer.theta.grad.clone()  # type: ignore[union-attr]
        if form == "autograd":
            model.zero_grad()
            regularizer.zero_grad()
            regularizer.add_gradients()
    return found


def _partly(rank: int) -> dict[str, Tensor]:
    """θ's gradient where some parameters are sharded and others are not."""
    found = {}
    for name in ("fsdp1", "fsdp2"):
        model = _model()
        if name == "fsdp1":
            model = _fsdp1(model, ignored_modules=[model[2]])
        else:
            fully_shard(model[0], mesh=init_device_mesh("cpu", (WORLD,)))
        regularizer = AdaptiveL2(model)
        regularizer.add_gradients()
        assert regularizer.theta.grad is not None
        found[name] = regularizer.theta.grad
    return found


def _refusals(rank: int) -> dict[str, str]:
    messages = {}

    def refused(name: str, call: Callable[[], object]) -> None:
        with pytest.raises(ConfigError) as error:
            call()
        messages[name] = str(error.value)

    refused("flat", lambda: AdaptiveL2(_fsdp1(_model(), use_orig_params=False)))
    model = _model()
    regularizer = AdaptiveL2(model)
    _fsdp1(model)
    refused("fsdp1 afterwards", regularizer.add_gradients)
    refused("autograd through fsdp1", AdaptiveL2(_fsdp1(_model())).penalty)
    model = _model()
    regularizer = AdaptiveL2(model)
    regularizer.parameter_groups(0.1)
    _fsdp2(model)
    refused("fsdp2 after the optimizer", regularizer.add_gradients)
    return messages


def _exchanges(rank: int) -> dict[str, Tensor]:
    """Sizes of what a call exchanges."""
    sizes, all_reduce = [], dist.all_reduce

    def note(tensor: Tensor, *arguments, **options) -> None:
        sizes.append(tensor.numel())
        all_reduce(tensor, *arguments, **options)

    regularizer = AdaptiveL2(_fsdp2(_model()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", note)
        regularizer.add_gradients()
    return {"sizes": torch.tensor(sizes)}


def _worker(rank: int) -> dict[str, dict]:
    return {
        **{name: _wrapped(rank, name) for name in WRAPPERS},
        "fsdp2 afterwards": _sharded_afterwards(rank),
        "autograd": _by_autograd(rank),
        "partly": _partly(rank),
        "refusals": _refusals(rank),
        "exchanges": _exchanges(rank),
    }


@pytest.fixture(scope="module")
def workers() -> list[dict[str, dict]]:
    return run_workers(_worker, WORLD)


@pytest.fixture(scope="module")
def whole() -> list[dict[str, Tensor]]:
    """The same training in one process, which sees both ranks' batches; by rank, its losses."""
    model = _model()
    regularizer = AdaptiveL2(model, 0.5)
    first = regularizer.last_penalty
    optimizer = torch.optim.Adam(regularizer.parameter_groups(0.1), eps=1.0)
    penalties = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(WORLD):
            (_loss(model, step, rank) / WORLD).backward()
        regularizer.add_gradients()
        optimizer.step()
        penalties.append(regularizer.last_penalty)
    return [
        {
            "first penalty": first,
            "theta": regularizer.theta.detach(),
            "penalties": torch.stack(penalties),
            "losses": torch.stack([_loss(model, step, rank).detach() for step in range(STEPS)]),
        }
        for rank in range(WORLD)
    ]


@pytest.mark.parametrize("name", [*WRAPPERS, "fsdp2 afterwards"])
def test_a_sharded_model_trains_as_the_whole_one(workers, whole, name):
    for worker, expected in zip(workers, whole, strict=True):
        for what, value in expected.items():
            torch.testing.assert_close(worker[name][what], value, rtol=1e-5, atol=1e-6)
    assert torch.equal(workers[0][name]["theta"], workers[1][name]["theta"])


def test_closed_form_equals_autograd_through_fsdp2(workers):
    for worker in workers:
        found = worker["autograd"]
        names = [name.removeprefix("closed ") for name in found if name.startswith("closed")]
        assert len(names) == 7
        for name in names:
            torch.testing.assert_close(found[f"closed {name}"], found[f"autograd {name}"])


def test_unsharded_parameters_are_counted_once(workers):
    squares = [w.detach().square().sum() for w in _model().parameters()]
    expected = 0.005 * torch.stack(squares) / 5
    for worker in workers:
        for name in ("fsdp1", "fsdp2"):
            torch.testing.assert_close(worker["partly"][name], expected)


def test_what_cannot_be_right_is_refused(workers):
    for worker in workers:
        messages = worker["refusals"]
        assert "use_orig_params=True" in messages["flat"]
        assert "0.weight was (5, 7)" in messages["fsdp1 afterwards"]
        assert "add_gradients()" in messages["autograd through fsdp1"]
        assert "make the optimizer again" in messages["fsdp2 after the optimizer"]


def test_one_small_exchange_a_step(workers):
    assert [worker["exchanges"]["sizes"].tolist() for worker in workers] == [[6], [6]]
