"""What a run needs room for: on the device, in shared memory, on the host, in the cache."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.plan.network import PHASES, Network
from cluster.plan.workload import Workload
from data_shards.dataset import Dataset
from data_shards.loader import AHEAD, HELD
from reid_train.config import TrainConfig

PROCESS = 900_000_000
"""Bytes of a worker's process before it trains: Python, PyTorch, Ray and their libraries."""


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        device: of a worker's weights, gradients, moments and activations; on CPU workers that is
            host memory. A GPU's kernels and caching allocator take more.
        shared: of a node's /dev/shm, for its loaders' batches.
        worker: of the first worker's process on the host; loader processes share nearly all of it.
        cache: of a node's shards at the end.
        cache_least: below which training refuses to start.
        cache_whole: with which each node downloads each shard once.
    """

    device: int
    shared: int
    worker: int
    cache: int
    cache_least: int
    cache_whole: int


def memory(
    config: TrainConfig, dataset: Dataset, work: Workload, network: Network, *, bf16: bool
) -> Memory:
    """Count what can be counted; `bf16` halves the activations and adds a copy of the weights."""
    share = config.batch_size // work.layout.workers
    states = network.weights + max(
        network.phases[phase].gradients
        + network.phases[phase].moments
        + round(share * network.phases[phase].activations * (0.5 if bf16 else 1.0))
        for phase in PHASES
        if phase == "all" or config.optimizer.frozen_epochs
    )
    pixels = config.image.height * config.image.width * 3
    batch = max(share, config.evaluation.batch if work.evaluations else 0)
    slots = (AHEAD * config.loader.workers + HELD) * batch * pixels
    embeddings = 4 * network.embedding * (work.queries + work.gallery)
    index = sum(len(dataset.index(split)) for split in ("train", "query", "gallery")) * 150
    shards = dataset.manifest.shards
    whole = sum(shard.bytes for shard in shards if shard.split != "val")
    train = sorted((shard.bytes for shard in shards if shard.split == "train"), reverse=True)
    least = sum(train[: config.batch.window])
    return Memory(
        device=states + (network.weights // 2 if bf16 else 0),
        shared=slots * work.layout.busiest if config.loader.workers else 0,
        # On the first worker: what it embedded, what all did, and ranking's copy of that.
        worker=PROCESS + index + 3 * embeddings + (0 if config.loader.workers else slots),
        cache=min(whole, config.loader.cache_bytes) if work.shards else 0,
        cache_least=least,
        cache_whole=whole,
    )
