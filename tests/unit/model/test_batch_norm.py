"""Batch norm over the global batch: gloo processes against one process in float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from processes import run_workers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reid_train.model import batch_norm
from reid_train.model.batch_norm import GlobalBatchNorm

CASES = {
    "equal": (torch.float64, [4, 4]),
    "unequal": (torch.float64, [7, 1]),
    "float32": (torch.float32, [4, 4]),
}


class _Plain(nn.BatchNorm2d):
    """One process's batch norm, for inputs of any number of dimensions."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def _network(norm: type[nn.BatchNorm2d], dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        norm(8, momentum=0.3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 6 * 4, 5),
        norm(5, eps=2e-5),
    )
    for module in network:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias)
    return network.to(dtype, memory_format=torch.channels_last)


def _batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    # Far from zero and different in the halves, so that no rank's own statistics would do.
    image = torch.randn(8, 3, 8, 6, generator=generator) + 20.0
    image[4:] = 3.0 * image[4:] + 5.0
    target = torch.randn(8, 5, generator=generator)
    return image.to(dtype), target.to(dtype)


def _train(network: nn.Module, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs of two training steps, (2, B, 5), and the gradient at the input."""
    image = image.clone().requires_grad_()
    outputs = []
    for _ in range(2):
        outputs.append(network(image))
        (outputs[-1] * target).square().sum(dim=1).mean().backward()
    assert image.grad is not None
    return torch.stack(outputs).detach(), image.grad


def _seen(network: nn.Module, output: Tensor, at_input: Tensor) -> dict[str, Tensor]:
    gradients = {f"grad {n}": p.grad for n, p in network.named_parameters() if p.grad is not None}
    buffers = {f"buffer {n}": b for n, b in network.named_buffers()}
    return {"output": output, "input": at_input, **gradients, **buffers}


def _trained(rank: int, dtype: torch.dtype, sizes: list[int]) -> dict[str, Tensor]:
    network = _network(GlobalBatchNorm, dtype)
    parallel = DistributedDataParallel(network, broadcast_buffers=False)
    image, target = (part.split(sizes)[rank] for part in _batch(dtype))
    return _seen(network, *_train(parallel, image, target))


def _compiled(rank: int) -> dict[str, Tensor]:
    """One graph, which `fullgraph` holds to, then the compiled network in DDP."""
    network = _network(GlobalBatchNorm, torch.float64)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=False)
    parallel = DistributedDataParallel(compiled, broadcast_buffers=False)  # type: ignore[arg-type]
    return _seen(network, *_train(parallel, *(part.chunk(2)[rank] for part in _batch())))


def _hostile() -> tuple[Tensor, Tensor]:
    """Images with a mean a thousand times their standard deviation, and a gradient."""
    generator = torch.Generator().manual_seed(3)
    image, gradient = torch.randn(2, 6, 8, 7, 5, generator=generator)
    return image + 1000.0, gradient


def _hostile_worker(rank: int) -> dict[str, Tensor]:
    norm = GlobalBatchNorm(8)
    image, gradient = (part.chunk(2)[rank] for part in _hostile())
    image.requires_grad_()
    output = norm(image)
    output.backward(gradient)
    assert image.grad is not None
    return {"output": output.detach(), "input": image.grad, "var": norm.running_var}


def _bfloat16(rank: int) -> dict[str, Tensor]:
    norm = GlobalBatchNorm(3)
    image = _batch()[0].chunk(2)[rank].to(torch.bfloat16).requires_grad_()
    output = norm(image)
    output.float().square().sum().backward()
    assert image.grad is not None
    return {"output": output.detach(), "input": image.grad, "own": norm.eval()(image).detach()}


def _exchanges(rank: int) -> dict[str, Tensor]:
    """Count all-reduces of a forward and a backward pass."""
    counts, all_reduce = [0], dist.all_reduce

    def count(*arguments: object) -> None:
        counts[-1] += 1
        all_reduce(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", count)
        output = GlobalBatchNorm(3)(_batch(torch.float32)[0].requires_grad_())
        counts.append(0)
        output.sum().backward()
    return {"counts": torch.tensor(counts)}


def _worker(rank: int) -> dict[str, dict[str, Tensor]]:
    results = {name: _trained(rank, *case) for name, case in CASES.items()}
    return results | {
        "compiled": _compiled(rank),
        "hostile": _hostile_worker(rank),
        "bfloat16": _bfloat16(rank),
        "exchanges": _exchanges(rank),
    }


@pytest.fixture(scope="module")
def workers() -> list[dict[str, dict[str, Tensor]]]:
    """What each of two processes saw in each case."""
    return run_workers(_worker, 2)


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    """What one process sees with the whole batch."""
    network = _network(_Plain, torch.float64)
    return _seen(network, *_train(network, *_batch()))


@pytest.mark.parametrize("case", ["equal", "compiled"])
def test_two_workers_train_as_one_with_the_whole_batch(workers, alone, case):
    both = torch.cat([worker[case]["output"] for worker in workers], dim=1)
    torch.testing.assert_close(both, alone["output"])
    # A worker's loss is the mean over its own half: twice its share of the global mean.
    both = torch.cat([worker[case]["input"] for worker in workers]) / 2
    torch.testing.assert_close(both, alone["input"])
    for worker in workers:
        for name in alone.keys() - {"output", "input"}:
            torch.testing.assert_close(worker[case][name], alone[name])


def test_workers_with_unequal_batches_share_the_statistics(workers, alone):
    both = torch.cat([worker["unequal"]["output"] for worker in workers], dim=1)
    torch.testing.assert_close(both, alone["output"])


def test_float32_statistics_are_exact_where_the_mean_is_far_from_zero(workers, alone):
    both = torch.cat([worker["float32"]["output"] for worker in workers], dim=1)
    torch.testing.assert_close(both.double(), alone["output"], rtol=1e-4, atol=1e-4)


def test_float32_is_exact_where_the_mean_is_a_thousand_standard_deviations(workers):
    norm = nn.BatchNorm2d(8, dtype=torch.float64)
    image, gradient = (part.double() for part in _hostile())
    output = norm(image.requires_grad_())
    output.backward(gradient)
    found = {
        name: torch.cat([worker["hostile"][name] for worker in workers]).double()
        for name in ("output", "input")
    }
    # At 1,000 there are 6e-5 between two float32 numbers, in the mean as in the image.
    torch.testing.assert_close(found["output"], output.detach(), rtol=0.0, atol=2e-4)
    torch.testing.assert_close(found["input"], image.grad, rtol=0.0, atol=2e-5)
    for worker in workers:
        var = worker["hostile"]["var"].double()
        torch.testing.assert_close(var, norm.running_var, rtol=2e-5, atol=0.0)


def test_bfloat16_input_has_float32_statistics(workers):
    norm = nn.BatchNorm2d(3)
    image = _batch()[0].to(torch.bfloat16)
    both = torch.cat([worker["bfloat16"]["output"] for worker in workers])
    assert both.dtype == torch.bfloat16
    torch.testing.assert_close(both, norm(image), rtol=2e-2, atol=2e-2)
    for worker, part in zip(workers, image.chunk(2), strict=True):
        evaluated = worker["bfloat16"]["own"]
        torch.testing.assert_close(evaluated, norm.eval()(part), rtol=2e-2, atol=2e-2)
        assert worker["bfloat16"]["input"].isfinite().all()


def test_one_all_reduce_each_way(workers):
    assert [worker["exchanges"]["counts"].tolist() for worker in workers] == [[1, 1], [1, 1]]


def test_one_process_computes_exactly_what_plain_batch_norm_does():
    plain, ours = _network(_Plain), _network(GlobalBatchNorm)
    batch = _batch(torch.float32)
    for a, b in zip(_train(plain, *batch), _train(ours, *batch), strict=True):
        assert torch.equal(a, b)
    state = ours.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match="dimension"):
        GlobalBatchNorm(3)(torch.zeros(3))


def _reduce(dy, x, mean, invstd, weight, *wanted):
    """What `torch.batch_norm_backward_reduce` returns on a GPU."""
    assert wanted == (True, True, True)
    xmu = x - mean[:, None, None]
    total, total_xmu = dy.sum((0, 2, 3)), (dy * xmu).sum((0, 2, 3))
    return total, total_xmu, total_xmu * invstd, total


def _element(dy, x, mean, invstd, weight, total, total_xmu, count):
    """What `torch.batch_norm_backward_elemt` returns on a GPU."""
    assert (count.dtype, count.shape) == (torch.int32, (1,))
    total, total_xmu = total / count, total_xmu / count * invstd.square()
    dx = dy - total[:, None, None] - (x - mean[:, None, None]) * total_xmu[:, None, None]
    return dx * (weight * invstd)[:, None, None]


def test_the_three_backward_passes_agree(monkeypatch):
    """The one of CUDA on a model of its kernels: this needs no GPU."""
    monkeypatch.setattr(torch, "batch_norm_backward_reduce", _reduce)
    monkeypatch.setattr(torch, "batch_norm_backward_elemt", _element)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(2.0))
    x, dy = torch.randn(2, 4, 3, 5, 6, dtype=torch.float64)
    var, mean = torch.var_mean(x + 0.3, (0, 2, 3))
    weight, count = torch.rand(3, dtype=torch.float64), torch.tensor([240.0], dtype=torch.float64)
    saved = batch_norm._Saved(x, weight, mean, var, count, 1e-5, True)
    expected = batch_norm._backward_compiled(dy, saved)
    for backward in (batch_norm._backward_cpu, batch_norm._backward_cuda):
        for ours, reference in zip(backward(dy, saved), expected, strict=True):
            torch.testing.assert_close(ours, reference)


def test_pytorch_still_has_the_kernels_of_synchronized_batch_norm():
    # They are not in PyTorch's documentation, and only a GPU runs them.
    schemas = {
        "batch_norm_stats": "(Tensor input, float eps) -> (Tensor, Tensor)",
        "batch_norm_backward_reduce": (
            "(Tensor grad_out, Tensor input, Tensor mean, Tensor invstd, Tensor? weight, "
            "bool input_g, bool weight_g, bool bias_g) -> (Tensor, Tensor, Tensor, Tensor)"
        ),
        "batch_norm_backward_elemt": (
            "(Tensor grad_out, Tensor input, Tensor mean, Tensor invstd, Tensor? weight, "
            "Tensor sum_dy, Tensor sum_dy_xmu, Tensor count) -> Tensor"
        ),
    }
    for name, schema in schemas.items():
        assert str(getattr(torch.ops.aten, name).default._schema) == f"aten::{name}{schema}"
