"""Communication between the data-parallel workers, for batch norm and losses."""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_shards.errors import ReidError


def world_size() -> int:
    """Return the number of data-parallel workers, 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def require_equal(tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
    """Raise if a tensor is not the same, in every bit, on all ranks of a group for the host.

    Raises:
        ReidError: on every rank, with the names of the ranks and of the first tensor.
    """
    sums = [zlib.crc32(tensor.detach().cpu().numpy().tobytes()) for tensor in tensors.values()]
    own = torch.tensor(sums)
    of_all = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(of_all, own, group)
    differs = torch.stack(of_all) != of_all[0]
    if not differs.any():
        return
    ranks = ", ".join(map(str, differs.any(1).nonzero().flatten().tolist()))
    places = differs.any(0).nonzero().flatten().tolist()
    raise ReidError(
        f"the weights of rank {ranks} are not those of rank 0: {list(tensors)[places[0]]} differs, "
        f"and {len(places) - 1} more of {len(tensors)} tensors. Their machines compute different "
        "results: train on equal GPUs with equal drivers and versions, and continue from a "
        "checkpoint of before with --resume"
    )


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
