"""The flags of `python -m cluster plan`, and what they mean to the model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from cluster.plan.estimate import Host, Machine, Prices
from cluster.plan.throughput import OWN, Origin
from data_shards.dataset import Dataset
from data_shards.errors import ConfigError
from reid_train.config import TrainConfig

GIGABIT = 1e9 / 8

# docs/PLAN.md, "Measured here": core-nanoseconds of a JPEG of quality 90.
DECODE_SOURCE_PIXEL, DECODE_PIXEL, DECODE_IMAGE = 4.6, 0.8, 30_000


@dataclass(frozen=True)
class Plan:
    """What a run will take: time, S3, cache, memory, cost, and what limits it.

    Takes the flags of `python -m reid_train train`; `--gpus` stands for `--workers`. Reads the
    manifest, the index and a table of measured speeds; starts nothing.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    gpus: int
    """Workers, one GPU each ('cpu': one core each). They must share the global batch equally."""
    gpu_type: str
    """As the table of measured speeds names it; 'cpu' for workers without GPUs."""
    gpus_per_node: int | None = None
    """By default 8, or all workers on the one node of 'cpu'."""
    cores_per_node: int | None = None
    """By default 8 a GPU, or this machine's for 'cpu'."""
    network_gbit: float | None = None
    """Of each node, to the others and to S3; by default 10."""
    s3_gbit: float | None = None
    """Of S3, to all nodes together; by default no limit of its own."""
    interconnect_gbit: float | None = None
    """Between the workers of a node; by default 100 for GPUs, and what was measured for 'cpu'."""
    collective_microseconds: float | None = None
    """Of a small exchange between two workers; by default 50, and what was measured for 'cpu'."""
    images_per_second: float | None = None
    """Of one worker with its share of the batch, everything trained; in place of the table's."""
    decode_images_per_second: float | None = None
    """Of one core; by default from measured JPEG decoding and this dataset's image sizes."""
    price_per_gpu_hour: float | None = None
    price_per_get: float | None = None
    price_per_gb: float | None = None
    """For a gigabyte (10^9 bytes) that leaves S3."""
    table: Path = OWN
    """Measured speeds of your own, which come before the packaged ones."""
    json: Path | None = None
    """Write everything to this file, too."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int | float) and value < (0 if name.startswith("price") else 1e-9):
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} is {value}: give a number above 0")

    @property
    def on_cpu(self) -> bool:
        """Whether workers compute without GPUs."""
        return self.gpu_type == "cpu"

    @property
    def prices(self) -> Prices | None:
        """None where none was given."""
        given = (self.price_per_gpu_hour, self.price_per_get, self.price_per_gb)
        return None if given == (None, None, None) else Prices(*(price or 0.0 for price in given))

    def per_node(self) -> int:
        """Workers of a full node."""
        return self.gpus_per_node or (self.config.batch_size if self.on_cpu else 8)

    def machine(self) -> tuple[Machine, dict[str, tuple[str, Origin]]]:
        """What it runs on, and for each figure its value in words and where it is from."""
        cpu = self.on_cpu
        cores = (os.cpu_count() or 1) if cpu else 8 * self.per_node()
        # Of gloo between two processes of one machine: docs/PLAN.md, "Measured here".
        habits = {
            "cores_per_node": (cores, "measured" if cpu else "assumed", "cores"),
            "network_gbit": (10.0, "assumed", "Gbit/s"),
            "interconnect_gbit": (
                6.0 if cpu else 100.0,
                "measured" if cpu else "assumed",
                "Gbit/s",
            ),
            "collective_microseconds": (
                500.0 if cpu else 50.0,
                "measured" if cpu else "assumed",
                "µs",
            ),
        }
        values, facts = {}, {}
        for name, (habit, origin, unit) in habits.items():
            given = getattr(self, name)
            values[name] = habit if given is None else given
            facts[name] = f"{values[name]:g} {unit}", origin if given is None else "given"
        if self.s3_gbit is not None:
            facts["s3_gbit"] = f"{self.s3_gbit:g} Gbit/s", "given"
        machine = Machine(
            cores=int(values["cores_per_node"]),
            on_cpu=cpu,
            network=values["network_gbit"] * GIGABIT,
            s3=float("inf") if self.s3_gbit is None else self.s3_gbit * GIGABIT,
            interconnect=values["interconnect_gbit"] * GIGABIT,
            latency=values["collective_microseconds"] / 1e6,
        )
        return machine, facts

    def host(self, dataset: Dataset) -> tuple[Host, dict[str, tuple[str, Origin]]]:
        """What its cores do, and where that is from."""
        rate, origin = self.decode_images_per_second, "given"
        if rate is None:
            rate, origin = 1 / decode_seconds(dataset, self.config), "estimated"
        return Host(decode=1 / rate), {"decoding": (f"{rate:,.0f} images/s a core", origin)}


def decode_seconds(dataset: Dataset, config: TrainConfig) -> float:
    """Core-seconds to decode an average training image and resize it."""
    index = dataset.index("train")
    source = float(np.mean(index.width.astype(np.int64) * index.height))
    pixels = config.image.height * config.image.width
    return (DECODE_SOURCE_PIXEL * source + DECODE_PIXEL * pixels + DECODE_IMAGE) / 1e9
