"""Batch norm over the global batch, in real gloo processes against one process."""

from __future__ import annotations

import pytest
import torch
from processes import run_workers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reid_train.model.batch_norm import GlobalBatchNorm, convert

WORLD = 2


def _network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8, momentum=0.3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 6 * 4, 5),
        nn.BatchNorm1d(5, eps=2e-5, momentum=None),
    )
    for module in network:
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias)
    return network.to(dtype, memory_format=torch.channels_last)


def _batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    # Far from zero and different in the halves: the ranks' own statistics are all wrong.
    image = torch.randn(8, 3, 8, 6, generator=generator) + 20.0
    image[4:] = 3.0 * image[4:] + 5.0
    target = torch.randn(8, 5, generator=generator)
    return image.to(dtype), target.to(dtype)


def _train(network: nn.Module, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Two training steps' outputs, (2, B, 5), and the gradient at the input."""
    image = image.clone().requires_grad_()
    outputs = []
    for _ in range(2):
        outputs.append(network(image))
        (outputs[-1] * target).square().sum(dim=1).mean().backward()
    assert image.grad is not None
    return torch.stack(outputs).detach(), image.grad


def _parallel(rank: int, dtype: torch.dtype, sizes: list[int]) -> dict[str, Tensor]:
    network = convert(_network(dtype))
    parallel = DistributedDataParallel(network, broadcast_buffers=False)
    image, target = (part.split(sizes)[rank] for part in _batch(dtype))
    output, at_input = _train(parallel, image, target)
    gradients = {f"grad {n}": p.grad for n, p in network.named_parameters() if p.grad is not None}
    buffers = {f"buffer {n}": b for n, b in network.named_buffers()}
    return {"output": output, "input": at_input, **gradients, **buffers}


def _bfloat16(rank: int) -> dict[str, Tensor]:
    norm = convert(nn.BatchNorm2d(3, affine=False))
    image = _batch()[0].chunk(WORLD)[rank].to(torch.bfloat16).requires_grad_()
    output = norm(image)
    output.float().square().sum().backward()
    assert image.grad is not None
    evaluated = norm.eval()(image)
    return {"output": output.detach(), "input": image.grad, "evaluated": evaluated.detach()}


def _worker(rank: int) -> dict[str, dict[str, Tensor]]:
    return {
        "float64": _parallel(rank, torch.float64, [4, 4]),
        "float32": _parallel(rank, torch.float32, [4, 4]),
        "unequal": _parallel(rank, torch.float64, [7, 1]),
        "bfloat16": _bfloat16(rank),
    }


@pytest.fixture(scope="module")
def workers() -> list[dict[str, dict[str, Tensor]]]:
    """What each of two processes saw in each case."""
    return run_workers(_worker, WORLD)


def test_two_workers_train_as_one_with_the_whole_batch(workers):
    network = _network(torch.float64)
    output, at_input = _train(network, *_batch(torch.float64))

    both = torch.cat([worker["float64"]["output"] for worker in workers], dim=1)
    torch.testing.assert_close(both, output)
    # A worker's loss is the mean over its own half: twice its share of the global mean.
    both = torch.cat([worker["float64"]["input"] for worker in workers]) / WORLD
    torch.testing.assert_close(both, at_input)
    for worker in workers:
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(worker["float64"][f"grad {name}"], parameter.grad)
        for name, buffer in network.named_buffers():
            torch.testing.assert_close(worker["float64"][f"buffer {name}"], buffer)


def test_float32_statistics_survive_a_mean_far_from_zero(workers):
    output, _ = _train(_network(torch.float64), *_batch(torch.float64))
    both = torch.cat([worker["float32"]["output"] for worker in workers], dim=1)
    torch.testing.assert_close(both.double(), output, rtol=1e-4, atol=1e-4)


def test_workers_of_unequal_batches_share_the_statistics(workers):
    output, _ = _train(_network(torch.float64), *_batch(torch.float64))
    both = torch.cat([worker["unequal"]["output"] for worker in workers], dim=1)
    torch.testing.assert_close(both, output)


def test_bfloat16_input_without_affine_parameters(workers):
    norm = nn.BatchNorm2d(3, affine=False)
    image = _batch()[0].to(torch.bfloat16)
    both = torch.cat([worker["bfloat16"]["output"] for worker in workers])
    assert both.dtype == torch.bfloat16
    torch.testing.assert_close(both, norm(image), rtol=2e-2, atol=2e-2)
    for worker, part in zip(workers, image.chunk(WORLD), strict=True):
        evaluated = worker["bfloat16"]["evaluated"]
        torch.testing.assert_close(evaluated, norm.eval()(part), rtol=2e-2, atol=2e-2)
        assert worker["bfloat16"]["input"].isfinite().all()


def test_one_process_computes_exactly_what_plain_batch_norm_does():
    plain, converted = _network(), convert(_network())
    for a, b in zip(_train(plain, *_batch()), _train(converted, *_batch()), strict=True):
        assert torch.equal(a, b)


def test_convert_keeps_names_parameters_buffers_and_options():
    network = _network()
    parameters, state = list(network.parameters()), network.state_dict()
    assert convert(network) is network
    assert [type(network[i]) for i in (1, 5)] == [GlobalBatchNorm, GlobalBatchNorm]
    assert all(a is b for a, b in zip(parameters, network.parameters(), strict=True))
    assert list(network.state_dict()) == list(state)
    assert (network[5].eps, network[5].momentum) == (2e-5, None)
    _network().load_state_dict(network.state_dict())


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match="dimensions"):
        GlobalBatchNorm(3)(torch.zeros(3))
