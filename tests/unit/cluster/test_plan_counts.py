"""What `plan` counts is what the loop, the loader and the cache do."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from tiny import config as tiny_config
from tiny import make_worker, narrow_resnet18
from torchvision.models import resnet

from cluster.plan.command import Plan
from cluster.plan.estimate import Counts, Downloads, count, describe, download, plans
from data_shards.cache import ShardCache
from data_shards.dataset import Dataset
from data_shards.errors import ConfigError
from data_shards.loading.loader import split_batches, train_batches
from data_shards.sampler import slice_for_rank
from data_shards.storage import LocalStorage
from reid_train.training.checkpoint import MODEL, PROGRESS, TRAINING
from reid_train.training.data import epoch_plan
from reid_train.training.loop import train


@dataclass(frozen=True)
class Remote:
    """A folder with shards that must be downloaded, as from a bucket."""

    root: Path
    sizes: list[int] = field(default_factory=list)  # bytes of each download

    @property
    def url(self) -> str:
        return str(self.root)

    def read(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> None:
        LocalStorage(self.root).download(key, path, sha256=sha256)
        self.sizes.append(path.stat().st_size)


@pytest.fixture
def remote(tiny_dataset: Dataset) -> Dataset:
    storage = Remote(Path(tiny_dataset.url))
    return replace(tiny_dataset, storage=storage)  # type: ignore[arg-type]


def read(
    config, dataset: Dataset, workers: int, per_node: int, folder: Path
) -> list[tuple[int, int]]:
    """Downloads and bytes of each node when its ranks read everything, one rank after another."""
    shutil.rmtree(folder, ignore_errors=True)
    size = {"height": config.image.height, "width": config.image.width, "workers": 0}
    nodes = [range(first, first + per_node) for first in range(0, workers, per_node)]
    storages = [Remote(Path(dataset.url)) for _ in nodes]
    caches = [
        ShardCache(storage, folder / str(ranks.start), config.loader.cache_bytes)
        for ranks, storage in zip(nodes, storages, strict=True)
    ]

    def evaluate() -> None:
        for cache, ranks in zip(caches, nodes, strict=True):
            for rank in ranks:
                for split in ("query", "gallery"):
                    place = {"rank": rank, "world": workers, "batch": config.evaluation.batch}
                    list(split_batches(dataset, cache, split, **place, **size))

    if config.evaluation.initial:
        evaluate()
    for epoch in range(config.total_epochs):
        rows = epoch_plan(config, dataset, epoch)
        for cache, ranks in zip(caches, nodes, strict=True):
            for rank in ranks:
                mine = slice_for_rank(rows, rank, workers)
                list(train_batches(dataset, cache, mine, **size))
        if (epoch + 1) % config.evaluation.every == 0 or epoch + 1 == config.total_epochs:
            evaluate()
    return [(len(storage.sizes), sum(storage.sizes)) for storage in storages]


def counted(
    config, dataset: Dataset, workers: int = 1, per_node: int = 1
) -> tuple[Counts, Downloads]:
    options = Plan(config, gpus=workers, gpu_type="H100", gpus_per_node=per_node)
    plan = plans(config, dataset)
    counts = count(config, dataset, plan)
    return counts, download(options, dataset, plan, counts.evaluations)


@pytest.mark.parametrize(("workers", "per_node"), [(1, 1), (2, 1), (4, 2), (4, 1)])
@pytest.mark.parametrize("steps", [3, None])
def test_downloads_are_those_of_the_real_loader(remote, tmp_path, workers, per_node, steps):
    config = tiny_config(batch__steps_per_epoch=steps, optimizer__epochs=3, evaluation__every=2)
    found = read(config, remote, workers, per_node, tmp_path / "cache")
    _, planned = counted(config, remote, workers, per_node)
    assert planned.exact
    assert planned.shards == sum(downloads for downloads, _ in found)
    assert planned.busiest_bytes == max(size for _, size in found)
    opened = len(remote.storage.read("manifest.json")) + remote.manifest.index.bytes
    assert planned.bytes == sum(size for _, size in found) + (workers + 1) * opened


@pytest.mark.parametrize("room", [7, 10])
@pytest.mark.parametrize("steps", [3, 40, None])
def test_downloads_to_a_small_cache_are_no_more_than_planned(remote, tmp_path, room, steps):
    shard = max(shard.bytes for shard in remote.manifest.shards)
    config = tiny_config(
        optimizer__epochs=4, loader__cache_bytes=room * shard, batch__steps_per_epoch=steps
    )
    ((downloads, size),) = read(config, remote, 1, 1, tmp_path / "cache")
    _, planned = counted(config, remote)
    assert not planned.exact
    assert downloads <= planned.shards
    assert size <= planned.busiest_bytes


def test_a_folder_is_read_in_place(tiny_dataset):
    _, planned = counted(tiny_config(), tiny_dataset, workers=4)
    assert (planned.gets, planned.bytes, planned.shards) == (0, 0, 0)


def test_cache_that_cannot_hold_a_window_is_refused(remote):
    with pytest.raises(ConfigError, match=r"lower --batch\.window"):
        counted(tiny_config(loader__cache_bytes=30_000), remote)


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint__every_steps": 2, "evaluation__initial": True},
        {"checkpoint__every_steps": 3, "evaluation__every": 2},
        {"batch__steps_per_epoch": None, "batch__accumulate": 2, "regularization__mode": "none"},
    ],
    ids=["checkpoints between", "a checkpoint after an epoch", "a whole pass"],
)
def test_steps_evaluations_and_checkpoints_are_those_of_the_loop(
    tiny_dataset, tmp_path, narrow, changes
):
    config = tiny_config(tracking__every_steps=1, **changes)
    worker, recorded = make_worker(tiny_dataset, tmp_path)
    train(config, tiny_dataset, worker)
    planned, _ = counted(config, tiny_dataset)
    losses = [step for step, values in recorded.steps.items() if "loss/total" in values]
    assert planned.steps == len(losses)
    assert planned.evaluations == sum("mAP" in values for values in recorded.steps.values())
    assert planned.checkpoints == len(recorded.checkpoints)
    network = describe(config, len(tiny_dataset.identities))
    for folder in recorded.checkpoints:
        state = tensor_bytes(folder / TRAINING)
        if json.loads((folder / PROGRESS).read_text())["progress"]["phase"] == "all":
            assert state == network.state
        else:
            assert state < network.state
        assert tensor_bytes(folder / MODEL) == network.weights


@pytest.fixture
def narrow(monkeypatch):
    """A narrow network, also where it is counted."""
    monkeypatch.setattr(resnet, "resnet18", narrow_resnet18)


def tensor_bytes(path: Path) -> int:
    """Bytes of a safetensors file behind its header."""
    content = path.read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")
