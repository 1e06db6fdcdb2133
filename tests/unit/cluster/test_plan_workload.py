"""What the planner counts is what the loop, the loader and the cache then do."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tiny import config as tiny_config
from tiny import make_worker, narrow_resnet18
from torchvision.models import resnet

from cluster.plan.network import _describe, describe
from cluster.plan.workload import Layout, Workload, workloads
from data_shards.cache import ShardCache
from data_shards.dataset import Dataset
from data_shards.errors import ConfigError
from data_shards.loader import split_batches, train_batches
from data_shards.sampler import slice_for_rank
from data_shards.storage import LocalStorage
from reid_train.training.checkpoint import MODEL, PROGRESS, TRAINING
from reid_train.training.loop import epoch_plan, train, train_index


@dataclass(frozen=True)
class Remote:
    """A folder whose shards have to be downloaded, as a bucket's have."""

    root: Path

    @property
    def url(self) -> str:
        return str(self.root)

    def read(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> None:
        LocalStorage(self.root).download(key, path, sha256=sha256)


@pytest.fixture
def remote(tiny_dataset: Dataset) -> Dataset:
    storage = Remote(Path(tiny_dataset.url))
    return replace(tiny_dataset, storage=storage)  # type: ignore[arg-type]


def read(config, dataset: Dataset, layout: Layout, folder: Path) -> list[tuple[int, int]]:
    """Downloads and bytes of each node when its ranks read all passes, one rank after the other."""
    shutil.rmtree(folder, ignore_errors=True)
    size = {"height": config.image.height, "width": config.image.width, "workers": 0}
    caches = [
        ShardCache(dataset.storage, folder / str(node), config.loader.cache_bytes)
        for node in range(layout.nodes)
    ]

    def evaluate() -> None:
        for cache, ranks in zip(caches, layout.ranks(), strict=True):
            for rank in ranks:
                for split in ("query", "gallery"):
                    place = {"rank": rank, "world": layout.workers}
                    batch = config.evaluation.batch
                    list(split_batches(dataset, cache, split, **place, batch=batch, **size))

    if config.evaluation.initial:
        evaluate()
    for epoch in range(config.total_epochs):
        rows = epoch_plan(config, train_index(dataset), epoch)
        for cache, ranks in zip(caches, layout.ranks(), strict=True):
            for rank in ranks:
                mine = slice_for_rank(rows, rank, layout.workers)
                list(train_batches(dataset, cache, mine, **size))
        if (epoch + 1) % config.evaluation.every == 0 or epoch + 1 == config.total_epochs:
            evaluate()
    return [(cache.stats.downloads, cache.stats.download_bytes) for cache in caches]


def count(config, dataset: Dataset, layout: Layout = Layout(1, 1)) -> Workload:  # noqa: B008
    return workloads(config, dataset, [layout])[0]


@pytest.mark.parametrize(
    "layout", [Layout(1, 1), Layout(2, 1), Layout(4, 2), Layout(4, 1)], ids=str
)
@pytest.mark.parametrize("steps", [3, None])
def test_downloads_are_those_of_the_real_loader(remote, tmp_path, layout, steps):
    config = tiny_config(batch__steps_per_epoch=steps, optimizer__epochs=3, evaluation__every=2)
    found = read(config, remote, layout, tmp_path / "cache")
    planned = count(config, remote, layout)
    assert planned.exact
    assert planned.shards == sum(downloads for downloads, _ in found)
    assert sum(p.bytes for p in planned.passes) == sum(size for _, size in found)


@pytest.mark.parametrize("room", [5, 7, 10])
def test_downloads_of_a_small_cache_are_close_to_the_real_ones(remote, tmp_path, room):
    shard = max(shard.bytes for shard in remote.manifest.shards)
    config = tiny_config(optimizer__epochs=4, loader__cache_bytes=room * shard)
    found = read(config, remote, Layout(1, 1), tmp_path / "cache")
    planned = count(config, remote)
    assert not planned.exact
    assert planned.shards == pytest.approx(found[0][0], rel=0.15)


def test_each_node_downloads_no_more_than_the_dataset_once(remote):
    whole = sum(shard.bytes for shard in remote.manifest.shards)
    planned = count(tiny_config(optimizer__epochs=9), remote, Layout(8, 2))
    assert max(p.busiest_bytes for p in planned.passes) <= whole
    assert planned.shards <= 4 * len(remote.manifest.shards)


def test_a_smaller_cache_never_downloads_less(remote):
    shard = max(shard.bytes for shard in remote.manifest.shards)
    rooms = [
        count(tiny_config(optimizer__epochs=6, loader__cache_bytes=n * shard), remote).bytes
        for n in (5, 8, 11, 13)
    ]
    assert rooms == sorted(rooms, reverse=True)
    assert rooms[0] > rooms[-1]


def test_a_folder_is_read_in_place(tiny_dataset):
    planned = count(tiny_config(), tiny_dataset, Layout(4, 1))
    assert (planned.gets, planned.bytes, planned.shards) == (0, 0, 0)


def test_cache_that_cannot_hold_a_window_is_refused(remote):
    with pytest.raises(ConfigError, match="lower the window"):
        count(tiny_config(loader__cache_bytes=30_000), remote)


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
    planned = count(config, tiny_dataset)
    losses = [step for step, values in recorded.steps.items() if "loss/total" in values]
    assert planned.steps == len(losses)
    assert planned.evaluations == sum("mAP" in values for values in recorded.steps.values())
    assert sum(planned.checkpoints.values()) == len(recorded.checkpoints)
    phases = describe(config, len(tiny_dataset.identities)).phases
    for folder in recorded.checkpoints:
        phase = json.loads((folder / PROGRESS).read_text())["progress"]["phase"]
        assert tensor_bytes(folder / TRAINING) == phases[phase].moments
        weights = describe(config, len(tiny_dataset.identities)).weights
        assert tensor_bytes(folder / MODEL) == weights


@pytest.fixture
def narrow(monkeypatch):
    """A narrow network, also for the planner, which remembers what it counted by name."""
    monkeypatch.setattr(resnet, "resnet18", narrow_resnet18)
    _describe.cache_clear()
    yield
    _describe.cache_clear()


def tensor_bytes(path: Path) -> int:
    """Bytes of a safetensors file behind its header."""
    content = path.read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")
