"""Images to embeddings: on one worker, and gathered from all of them."""

import itertools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist

from data_shards.loader import Batch
from data_shards.on_device import on_device
from reid_train.model.embedder import embed
from reid_train.model.network import ReidNet

Autocast = Callable[[], AbstractContextManager]


def embed_batches(
    model: ReidNet,
    batches: Iterable[Batch],
    device: torch.device,
    *,
    mirror: bool = True,
    autocast: Autocast = nullcontext,
) -> torch.Tensor:
    """Embeddings (n, D) float32, on the device, of all batches in order; (0, D) for none."""
    was_training = model.training
    model.eval()
    images = (batch.image for batch in on_device(batches, device))
    parts = [embed(model, image, mirror=mirror, autocast=autocast) for image in images]
    model.train(was_training)
    return torch.cat(parts) if parts else torch.zeros(0, model.embedding_size, device=device)


def gather_rows(part: torch.Tensor, total: int, rank: int, world: int) -> torch.Tensor | None:
    """Collect all ranks' rows on rank 0: (total, D) on the CPU, None for the others.

    `part` has the rows from `total * rank // world` to `total * (rank + 1) // world`.
    """
    if world == 1:
        return part.cpu()
    bounds = [total * r // world for r in range(world + 1)]
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    padded = part.new_zeros(max(lengths), part.shape[1])
    padded[: len(part)] = part
    received = [torch.empty_like(padded) for _ in range(world)] if rank == 0 else None
    dist.gather(padded, received, dst=0)
    if received is None:
        return None
    return torch.cat([rows[:n].cpu() for rows, n in zip(received, lengths, strict=True)])
