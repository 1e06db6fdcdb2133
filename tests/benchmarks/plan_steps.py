"""Seconds of a step as planned, against the real loop in 1, 2 and 4 gloo processes. No Ray.

    python tests/benchmarks/plan_steps.py [--steps 6]

The plan knows two measurements of one process (a batch of 32 and of 8) and how fast two processes
exchange numbers. Core-seconds are CPU time of all processes, which other work on the machine
disturbs least.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from loader import render
from plan import exchanges
from rich.console import Console
from rich.table import Table
from torch import multiprocessing

from cluster.plan.estimate import Host, Machine, step
from cluster.plan.network import PHASES, describe
from cluster.plan.throughput import Speed
from cluster.plan.workload import Layout, workloads
from data_shards.building.build import build
from data_shards.cache import ShardCache
from data_shards.dataset import Dataset
from reid_train.config import TrainConfig
from reid_train.recipes import recipe
from reid_train.training import loop
from reid_train.training.context import Worker

FIRST = 2  # steps of a phase that are left out


def work(rank: int, world: int, config: str, folder: str) -> None:
    """Train as one of `world` processes; write the clocks after each step."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    clocks: list[tuple[float, float]] = []
    whole = loop._Run.step

    def timed(run: loop._Run, batches: list) -> None:
        whole(run, batches)
        clocks.append((time.process_time(), time.perf_counter()))

    loop._Run.step = timed
    settings = TrainConfig.from_json(config)
    dataset = Dataset.open(settings.data)
    cache = ShardCache(dataset.storage, Path(folder) / "cache", 10**9)
    scratch = Path(folder)
    loop.train(settings, dataset, Worker(rank, world, torch.device("cpu"), cache, scratch=scratch))
    Path(folder, f"{rank}.json").write_text(json.dumps(clocks))
    if world > 1:
        dist.destroy_process_group()


def seen(config: TrainConfig, world: int, steps: int) -> dict[str, tuple[float, float]]:
    """Core-seconds of all processes and seconds of a step, by phase."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, config.replace(workers=world).to_json(), folder)
        multiprocessing.spawn(work, args=arguments, nprocs=world, join=True)
        files = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
    clocks = np.array(files)  # (world, steps of both phases, 2)
    found = {}
    for i, phase in enumerate(PHASES):
        took = np.diff(clocks[:, i * steps + FIRST - 1 : (i + 1) * steps], axis=1)
        found[phase] = float(np.median(took[..., 0], 1).sum()), float(np.median(took[0, :, 1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        render(folder / "images", 512)
        out = str(folder / "data")
        build("csv", folder / "images" / "list.csv", out, shard_bytes=1 << 21, jobs=1)
        compare(folder, out, args.steps)


def compare(folder: Path, data: str, steps: int) -> None:
    """Calibrate, run, print."""
    config = recipe("demo").replace(
        data=data,
        batch__steps_per_epoch=steps,
        optimizer__frozen_epochs=1,
        optimizer__epochs=1,
        evaluation__initial=False,
    )
    dataset = Dataset.open(data)
    network = describe(config, len(dataset.identities))
    bandwidth, latency = exchanges(network.phases["all"].gradients)
    small = seen(config.replace(batch__identities=2), 1, steps)
    runs = {world: seen(config, world, steps) for world in (1, 2, 4)}
    cores = os.cpu_count() or 1
    machine = Machine(cores, True, bandwidth, bandwidth, bandwidth, latency)
    table = Table("processes", "phase", "planned s", "seen s", "core-s planned", "core-s seen", "/")
    for job in workloads(config, dataset, [Layout(world, 64) for world in runs]):
        world = job.layout.workers
        for phase in PHASES:
            low, high = small[phase][0], runs[1][phase][0]
            share = config.batch_size // world
            alone = low + (high - low) * (share - 8) / (32 - 8)
            speed = Speed(alone, "measured", "", decoding=True)
            planned = step(job, network.phases[phase], machine, Host(0.0), speed, 0, 1)
            spent, seconds = runs[world][phase]
            row = [planned.seconds, seconds, world * alone, spent, spent / (world * alone)]
            table.add_row(str(world), phase, *(f"{value:.2f}" for value in row))
    Console().print(
        f"{cores} cores; between two processes {bandwidth / 1e9:.2f} GB/s, {1e6 * latency:.0f} µs"
    )
    Console().print(table)


if __name__ == "__main__":
    main()
