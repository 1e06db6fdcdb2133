"""Images to embeddings: on one worker, and gathered from all of them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.distributed as dist

from data_shards.loading.loader import Batch
from data_shards.loading.on_device import on_device
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
) -> Iterator[np.ndarray]:
    """Yield the embeddings of each batch, (B, D) float32, on the host."""
    was_training = model.training
    model.eval()
    for batch in on_device(batches, device):
        yield embed(model, batch.image, mirror=mirror, autocast=autocast).cpu().numpy()
    model.train(was_training)


def gather_rows(rows: torch.Tensor, total: int, group: dist.ProcessGroup | None) -> None:
    """Send all ranks' rows to rank 0, straight into its place for them.

    Args:
        rows: (total, D) on rank 0, with its own rows in the beginning; on any other rank r its
            rows, those from `total * r // world` to `total * (r + 1) // world`. On the host.
        total: rows of all ranks.
        group: of the ranks, for tensors on the host; None for one rank.
    """
    if group is None:
        return
    world = group.size()
    for rank in range(1, world):
        part = slice(total * rank // world, total * (rank + 1) // world)
        if part.start == part.stop:
            continue
        if group.rank() == 0:
            dist.recv(rows[part], rank, group)
        elif group.rank() == rank:
            dist.send(rows, 0, group)
