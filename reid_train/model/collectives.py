"""Communication between the data-parallel workers, for batch norm and losses."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of data-parallel workers, 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Return the tensors of all ranks, concatenated in rank order; gradients flow through.

    The gradient of a rank's part is the sum of the gradients from all ranks. So a loss that is a
    mean over each rank's own anchors, with candidates from this function, has after DDP's averaging
    the same gradient as one process with the whole batch. The tensor is (B, …), of the same shape
    and dtype on every rank; the result is (B · world size, …).
    """
    if world_size() == 1:
        return tensor
    return _Gather.apply(tensor)  # type: ignore[return-value]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # gloo has no reduce-scatter; the gathered tensors are small.
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
