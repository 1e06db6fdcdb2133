"""How the nodes' cores are shared by workers."""

from __future__ import annotations

import pytest
import ray

from reid_train.recipes import recipe
from reid_train.runs.cores import share_of_cores, with_cores
from tune.runner import slots


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch):
    """Makes a cluster: the cores of its nodes, GPUs of each, and cores that are in use."""

    def make(*nodes: int, gpus: int = 0, used: int = 0) -> None:
        found = [{"Alive": True, "Resources": {"CPU": n, "GPU": gpus}} for n in nodes]
        dead = {"Alive": False, "Resources": {"CPU": 64.0}}
        monkeypatch.setattr(ray, "nodes", lambda: [*found, dead])
        monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": sum(nodes) - used})
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": gpus * len(nodes)})

    return make


@pytest.mark.parametrize(
    ("nodes", "used", "workers", "share"),
    [
        ((2,), 0, 1, 2),
        ((2,), 0, 2, 1),
        ((8,), 0, 3, 2),
        ((8, 8), 0, 2, 8),
        ((8, 8), 0, 3, 4),
        ((2, 16), 0, 1, 16),
        ((8,), 4, 1, 4),  # another program has four
        ((2,), 2, 1, 1),  # it waits for a core
        ((2,), 0, 4, 1),
        ((), 0, 1, 1),  # nodes come when they are asked for
    ],
)
def test_workers_share_the_cores_of_the_nodes_that_hold_them(cluster, nodes, used, workers, share):
    cluster(*nodes, used=used)
    assert share_of_cores(workers) == share


def test_a_worker_computes_on_all_its_cores_and_decodes_on_what_is_left(cluster):
    cluster(8)
    config = recipe("demo")
    alone = with_cores(config)
    assert (alone.cpus_per_worker, alone.loader.workers) == (8, 0)
    assert with_cores(config.replace(workers=2)).cpus_per_worker == 4
    told = with_cores(config.replace(cpus_per_worker=6))
    assert (told.cpus_per_worker, told.loader.workers) == (6, 2)
    assert with_cores(config.replace(loader__workers=3)).loader.workers == 3
    assert with_cores(with_cores(config).replace(workers=2)).cpus_per_worker == 8


def test_a_worker_with_a_gpu_computes_on_one_core(cluster):
    cluster(16, gpus=2)
    config = with_cores(recipe("demo").replace(workers=2))
    assert (config.cpus_per_worker, config.loader.workers) == (1, 4)
    cluster(4, gpus=2)
    assert with_cores(recipe("demo").replace(workers=2)).loader.workers == 1
    assert with_cores(recipe("demo").replace(device="cpu")).cpus_per_worker == 4


def test_as_many_trials_run_together_as_their_cores_allow(cluster):
    cluster(8, 3)
    config = recipe("demo").replace(device="cpu")
    assert slots(config, None) == 11
    assert slots(config.replace(cpus_per_worker=2), None) == 5
    assert slots(config.replace(cpus_per_worker=2, workers=2), None) == 2
    assert with_cores(config, slots(config, 2)).cpus_per_worker == 4
    assert with_cores(config, slots(config, None)).cpus_per_worker == 1
