"""A worker's share of its node: the cores that it computes on, and its loader processes.

A run records the number of cores, because float sums depend on it: a run that resumes on as many
continues bit by bit.
"""

import ray

from reid_train.config import LOADERS, TrainConfig
from reid_train.runs.ray_trainer import use_gpu


def share_of_cores(workers: int) -> int:
    """Return how many cores each worker gets if all share the nodes' cores: at least 1.

    Cores that other programs on the cluster hold are left to them.
    """
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    most = min(max(nodes, default=0), int(ray.available_resources().get("CPU", 0)) // workers)
    fitting = (n for n in range(most, 1, -1) if sum(cores // n for cores in nodes) >= workers)
    return next(fitting, 1)


def settle(cpus: int | None, loaders: int | None, workers: int, *, gpu: bool) -> tuple[int, int]:
    """Return a worker's cores and loader processes; None is replaced by its default.

    On CPUs a worker computes on its whole share. On a GPU it needs one core, and the loader
    processes get the others, at most `LOADERS`.
    """
    if cpus is not None and loaders is not None:
        return cpus, loaders
    share = share_of_cores(workers)
    cpus = cpus or (1 if gpu else share)
    return cpus, min(max(share - cpus, 0), LOADERS) if loaders is None else loaders


def with_cores(config: TrainConfig, at_a_time: int = 1) -> TrainConfig:
    """Return a run's configuration with these two numbers, for `at_a_time` runs on the cluster."""
    gpu = use_gpu(config.device, config.min_workers or config.workers, warn=False)
    workers = config.workers * at_a_time
    cpus, loaders = settle(config.cpus_per_worker, config.loader.workers, workers, gpu=gpu)
    return config.replace(cpus_per_worker=cpus, loader__workers=loaders)
