"""What a run takes: the arithmetic of docs/PLAN.md.

Steps, evaluations and downloads are counted from the sampler's own plan; the network on PyTorch's
meta device, where it runs without memory or arithmetic; time follows from measured speeds.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cluster.measure import Measurement
from cluster.plan.command import Plan
from data_shards.cache import ShardCache
from data_shards.dataset import Dataset
from data_shards.errors import ConfigError
from data_shards.loading.loader import AHEAD, HELD
from data_shards.manifest import MANIFEST_NAME
from data_shards.records import EVALUATED
from reid_train.config import LOADERS, TrainConfig
from reid_train.evaluation.examples import MATCHES, QUERIES
from reid_train.model.network import ReidNet
from reid_train.training.compiled import compiles
from reid_train.training.data import epoch_plan

GIGABIT = 1e9 / 8
START, FINISH = 30.0, 20.0  # seconds before the first step and after the last
COMPILE = 120.0  # seconds of torch.compile on a GPU, for both phases: an estimate, not measured
SCALES = 0.9  # of the speed without exchange: what counts as scaling
OVERLAP = 2 / 3  # of computing, the backward pass, during which gradients are averaged
RANKING = 147e9  # operations of ranking in a core-second
WRITING = 400e6  # bytes of a checkpoint in a second

EpochPlan = Callable[[int], np.ndarray]


class Counts(NamedTuple):
    """What a run does, however many workers it has."""

    steps: int
    frozen_steps: int  # of these, with the backbone frozen
    evaluations: int
    queries: int  # embedded in each evaluation
    gallery: int  # embedded in each evaluation
    checkpoints: int


class Downloads(NamedTuple):
    """What all nodes read from S3."""

    exact: bool = True  # or an upper bound, if the cache holds two windows of shards
    shards: int = 0
    bytes: int = 0
    busiest_bytes: int = 0  # of the node that downloads most
    gets: int = 0


class Network(NamedTuple):
    """A network of which all weights are trained."""

    weights: int  # bytes of parameters and buffers
    gradients: int  # bytes that the workers average in each step
    state: int  # bytes of a checkpoint beside the weights: Adam's moments, θ, counters
    activations: int  # bytes of an image that are kept for backward, in float32
    exchanges: int  # small exchanges between workers in each batch
    embedding: int  # D, numbers in an embedding
    forward: float  # floating point operations of an image's forward pass
    flops: float  # of an image, forward and backward


class Speed(NamedTuple):
    """How long a worker takes for its share of a global batch."""

    seconds: float
    note: str  # where that is from
    exchanged: bool = False  # whether the exchange between workers is included


def plans(config: TrainConfig, dataset: Dataset) -> EpochPlan:
    """The sampler's plans by epoch: rows of the train index for each batch. Each is made once."""
    return cache(partial(epoch_plan, config, dataset))


def count(config: TrainConfig, dataset: Dataset, plan: EpochPlan) -> Counts:
    """Go through the epochs as the training loop does."""
    batch, total, every = config.batch, config.total_epochs, config.checkpoint.every_steps
    plan(0)  # shows whether a batch can be made
    steps = [batch.steps_per_epoch or len(plan(e)) // batch.accumulate for e in range(total)]
    if 0 in steps:
        raise ConfigError(
            f"epoch {steps.index(0)} has fewer batches than --batch.accumulate {batch.accumulate}: "
            "lower it, or give --batch.steps-per-epoch"
        )
    ends = np.cumsum(steps).tolist()
    evaluated = {*ends[config.evaluation.every - 1 :: config.evaluation.every], ends[-1]}
    saved = evaluated | set(range(every, ends[-1] + 1, every) if every else ())
    split = dataset.choose_split(config.evaluation.split)
    queries, gallery = (len(index) for index in dataset.evaluated(split))
    frozen = sum(steps[: config.optimizer.frozen_epochs])
    evaluations = len(evaluated) + config.evaluation.initial if queries and gallery else 0
    return Counts(ends[-1], frozen, evaluations, queries, gallery, checkpoints=len(saved))


def download(options: Plan, dataset: Dataset, plan: EpochPlan, evaluations: int) -> Downloads:
    """Count what the nodes download, their caches empty at first."""
    config, workers, shards = options.config, options.gpus, dataset.manifest.shards
    files = ShardCache(dataset.storage, config.loader.cache, config.loader.cache_bytes)
    files.require([shard for shard in shards if shard.split == "train"], config.batch.window)
    if files.in_place:
        return Downloads()
    exact = sum(s.bytes for s in shards if s.split != "val") <= config.loader.cache_bytes
    node = np.arange(workers) // options.gpus_per_node  # of each rank
    times = np.zeros((node[-1] + 1, len(shards)), np.int64)
    index = dataset.index("train")
    one_pass = len(epoch_plan(config.replace(batch__steps_per_epoch=None), dataset, 0))
    for epoch in range(config.total_epochs):
        rows = plan(epoch)
        read = np.zeros_like(times, bool)
        read[np.repeat(node, rows.shape[1] // workers), index.shard[rows]] = True
        # An epoch of a given length may go through the data several times.
        times += read * (1 + len(rows) // one_pass if config.batch.steps_per_epoch else 1)
    evaluated = EVALUATED[dataset.choose_split(config.evaluation.split)]
    for split in evaluated if evaluations else ():
        shard = dataset.index(split).shard
        for rank in range(workers):
            mine = shard[len(shard) * rank // workers : len(shard) * (rank + 1) // workers]
            times[node[rank], np.unique(mine)] += evaluations
    times = np.minimum(times, 1) if exact else times
    read_bytes = times @ np.array([shard.bytes for shard in shards])
    openings = workers + 1  # of manifest and index, by each worker and the driver
    opened = len(dataset.storage.read(MANIFEST_NAME)) + dataset.manifest.index.bytes
    pictures = QUERIES * (1 + MATCHES) if evaluations else 0  # of the report, at most
    return Downloads(
        exact=exact,
        shards=int(times.sum()),
        bytes=int(read_bytes.sum()) + openings * opened,
        busiest_bytes=int(read_bytes.max()),
        gets=int(times.sum()) + 2 * openings + pictures,
    )


def describe(config: TrainConfig, identities: int) -> Network:
    """Count what a configuration's network takes for a number of training identities."""
    images = 2  # batch norm needs two
    with torch.device("meta"):
        model = ReidNet.from_config(config, identities)
        image = torch.empty(images, 3, config.image.height, config.image.width)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(image)
        forward = counter.get_total_flops()
        torch.stack([part.sum() for part in (*output.pooled, *output.logits)]).sum().backward()
    parameters = list(model.parameters())
    for parameter in parameters:
        kept.pop(id(parameter.untyped_storage()), None)
    state = 8 + sum(2 * parameter.nbytes + 4 for parameter in parameters)
    if config.regularization.mode == "adaptive":  # θ and its moments, and one counter
        state += 3 * 4 * len(parameters) + 4
    norms = sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model.modules())
    synchronized = 2 * norms if config.model.batch_norm == "global" else 0
    return Network(
        weights=sum(tensor.nbytes for tensor in model.state_dict().values()),
        gradients=sum(parameter.nbytes for parameter in parameters),
        state=state,
        activations=sum(storage.nbytes() for storage in kept.values()) // images,
        # Each norm and each head's gathered features, forward and backward; the labels.
        exchanges=synchronized + 2 * (1 + config.model.stripes) + 1,
        embedding=model.embedding_size,
        forward=forward / images,
        flops=counter.get_total_flops() / images,
    )


def speed_of(
    table: list[Measurement], config: TrainConfig, device: str, network: Network
) -> Speed | None:
    """How long a worker takes for its share of a batch, or None if nothing near was measured.

    As measured, or in proportion to images and operations from one worker's nearest measurement.
    """
    share, gigaflops = config.batch_size // config.workers, network.flops / 1e9
    model, image = config.model, config.image
    shape = (model.backbone, model.stripes, image.height, image.width)
    kind, compiled = (device, config.precision, "all"), compiles(config, device)

    def distance(entry: Measurement) -> tuple[bool, bool, float, float, int]:
        operations, images = math.log(entry.gigaflops / gigaflops), math.log(entry.batch / share)
        far = entry.compile != compiled, entry.shape != shape
        return *far, abs(operations), abs(images), -entry.workers

    known = [e for e in table if (e.device, e.precision, e.phase) == kind]
    known = [e for e in known if compiled or not e.compile]
    same = (shape, config.workers, share)
    known = [e for e in known if e.workers == 1 or (e.shape, e.workers, e.batch) == same]
    if not known:
        return None
    near = min(known, key=distance)
    note, operations = near.source, gigaflops / near.gigaflops
    if near.compile != compiled:
        note += ", not compiled: compiling makes it faster"
    if near.batch != share:
        note += f", × {share}/{near.batch} for the images"
    if near.shape != shape:
        note += f", × {operations:.2f} for the operations of an image"
    seconds = near.workers * share / near.images_per_second * operations
    return Speed(seconds, note, exchanged=near.workers > 1)


def exchange(options: Plan, network: Network, workers: int) -> tuple[float, float]:
    """Seconds that `workers` take for a batch's small exchanges, and for averaging gradients."""
    within = workers <= options.gpus_per_node
    link = GIGABIT * (options.interconnect_gbit if within else options.network_gbit)
    small = network.exchanges * options.collective_microseconds / 1e6 * math.log2(workers)
    return small, 2 * (workers - 1) / workers * network.gradients / link


def least_share(small: float, ring: float, rate: float) -> int:
    """Fewest images of a worker's share that scale, if a worker alone trains `rate` a second.

    Then the exchange, less the part of the ring beside the backward pass, takes at most 1/9 of the
    computing.
    """
    allowed = 1 / SCALES - 1
    return max(1, math.ceil(rate * max(small / allowed, (small + ring) / (OVERLAP + allowed))))


def estimate(
    options: Plan, counts: Counts, network: Network, read: Downloads, speed: Speed
) -> dict[str, Any]:
    """Seconds, speed, cost, counts and the limit; frozen epochs count as if all was trained."""
    config, workers = options.config, options.gpus
    nodes, accumulate = math.ceil(workers / options.gpus_per_node), config.batch.accumulate
    computing, share = accumulate * speed.seconds, config.batch_size / workers
    small, ring = exchange(options, network, workers)
    exposed = accumulate * small + max(0.0, ring - OVERLAP * speed.seconds)
    if speed.exchanged:
        exposed = 0.0
    train = counts.steps * (computing + exposed)
    embedded = (counts.queries + counts.gallery) * (2 if config.evaluation.mirror else 1)
    embed = embedded / workers * speed.seconds / share * network.forward / network.flops
    rank = 2 * counts.queries * counts.gallery * network.embedding / RANKING
    evaluate = counts.evaluations * (embed + rank)
    from_s3 = max(read.busiest_bytes / options.network_gbit, read.bytes / options.s3_gbit) / GIGABIT
    limits = {"computing": counts.steps * computing + evaluate, "download from S3": from_s3}
    limits["exchange between workers"] = counts.steps * exposed
    compiling = COMPILE if compiles(config, options.gpu_type) else 0.0
    parts = {"start": START, "compile": compiling, "train": train, "evaluate": evaluate}
    parts["checkpoint"] = counts.checkpoints * (network.weights + network.state) / WRITING
    parts["wait"] = max(0.0, from_s3 - train - evaluate)
    parts["finish"] = FINISH
    seconds = sum(parts.values())
    cost = workers * seconds / 3600 * options.price_per_gpu_hour
    cost += read.gets * options.price_per_get + read.bytes / 1e9 * options.price_per_gb
    return {
        "workers": workers,
        "nodes": nodes,
        "limit": max(limits, key=limits.__getitem__),
        "seconds": seconds,
        "parts": parts,
        "images_per_second": config.batch_size * accumulate / (computing + exposed),
        "exchanges": accumulate * network.exchanges if workers > 1 else 0,
        "gradient_bytes": network.gradients if workers > 1 else 0,
        "least_share": least_share(small, ring, share / speed.seconds),
        "images": counts.steps * accumulate * config.batch_size,
        "cost": cost,
        **counts._asdict(),
        **read._asdict(),
    }


def memory(options: Plan, dataset: Dataset, network: Network) -> dict[str, int]:
    """Bytes of a worker's device in float32, of a node's /dev/shm, and of the whole dataset."""
    config, mates = options.config, min(options.gpus, options.gpus_per_node)
    share, loaders = config.batch_size // options.gpus, config.loader.workers
    loaders = LOADERS if loaders is None else loaders
    batch = max(share, config.evaluation.batch) * config.image.height * config.image.width * 3
    states = network.weights + network.gradients + network.state
    return {
        "device": states + share * network.activations,
        "shm": (AHEAD * loaders + HELD) * batch * mates if loaders else 0,
        "cache": sum(shard.bytes for shard in dataset.manifest.shards if shard.split != "val"),
    }
