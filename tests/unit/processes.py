"""Runs a function in real gloo processes, for tests of what workers do together."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import multiprocessing


def run_workers(function: Callable[..., object], world: int, *arguments: object) -> list:
    """Return what `function(rank, *arguments)` returned in each of `world` processes."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(
            _worker, args=(world, folder, function, arguments), nprocs=world, join=True
        )
        return [
            torch.load(os.path.join(folder, f"{rank}.pt"), weights_only=True)
            for rank in range(world)
        ]


def _worker(
    rank: int, world: int, folder: str, function: Callable[..., object], arguments: tuple
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save(function(rank, *arguments), os.path.join(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()
