"""A training small enough for a unit test: random pictures, a narrow network, a few steps."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.models import resnet

from data_shards.building.build import build
from data_shards.cache import ShardCache
from data_shards.dataset import Dataset
from reid_train.config import TrainConfig
from reid_train.recipes import recipe
from reid_train.training.checkpoint import MODEL, SEAL, TRAINING, Checkpoint
from reid_train.training.context import WorkerContext
from reid_train.training.history import History
from reid_train.training.loop import train

CONFIG = recipe("demo").replace(
    image__height=32,
    image__width=32,
    batch__identities=4,
    batch__images=2,
    batch__steps_per_epoch=3,
    batch__window=2,
    optimizer__frozen_epochs=1,
    optimizer__epochs=1,
    precision="float32",
    evaluation__initial=False,
    evaluation__every=1,
    evaluation__batch=5,
)


def narrow_resnet18(
    weights: None = None, norm_layer: type[nn.BatchNorm2d] = nn.BatchNorm2d
) -> resnet.ResNet:
    """Stands in for torchvision's: an eighth of its width, so that checkpoints take 5 MB."""
    network = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], norm_layer=norm_layer)
    network.inplanes = 8
    network.conv1 = nn.Conv2d(3, 8, kernel_size=7, stride=2, padding=3, bias=False)
    network.bn1 = norm_layer(8)
    for number, planes in enumerate((8, 16, 32, 64), 1):
        layer = network._make_layer(resnet.BasicBlock, planes, 2, stride=1 + (number > 1))
        setattr(network, f"layer{number}", layer)
    network.fc = nn.Linear(64, 1000)
    return network


def build_dataset(
    folder: Path,
    splits: tuple[str, ...] = ("train", "query", "gallery"),
    validation: float | None = None,
    name: str | None = None,
) -> str:
    """Shard random pictures and return where; query and gallery have odd counts.

    The order of the splits decides the pixels, so other splits make another dataset.
    """
    rng = np.random.default_rng(0)
    rows = []
    people = {"train": range(6), "query": range(10, 13), "gallery": range(10, 14)}
    for split in splits:
        for pid in people[split]:
            for number in range(5):
                picture = f"{split}-{pid}-{number}.png"
                pixels = rng.integers(0, 256, (24, 16, 3), np.uint8)
                folder.mkdir(exist_ok=True)
                Image.fromarray(pixels).save(folder / picture)
                rows.append((picture, pid, number % 3, split))
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "pid", "camid", "split"), *rows[:-1]])
    out = folder / "shards"
    options = {"shard_bytes": 20_000, "jobs": 1, "validation": validation}
    build("csv", folder / "table.csv", str(out), name=name, **options)
    return str(out)


@dataclass
class Recorded:
    """What a training told its worker."""

    checkpoints: list[Path] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    steps: dict[int, dict[str, float]] = field(default_factory=dict)

    def report(self, metrics: dict[str, float], folder: Path | None) -> None:
        self.metrics.append(metrics)
        if folder is not None:
            self.checkpoints.append(folder)

    def log(self, values: dict[str, float], step: int) -> None:
        self.steps.setdefault(step, {}).update(values)

    def losses(self, name: str = "loss/total") -> list[float]:
        return [values[name] for _, values in sorted(self.steps.items()) if name in values]


def make_worker(
    dataset: Dataset, scratch: Path, rank: int = 0, world: int = 1, device: str = "cpu"
) -> tuple[WorkerContext, Recorded]:
    """A worker of its own, or one of several, and what it will have recorded."""
    recorded = Recorded()
    worker = WorkerContext(
        rank,
        world,
        torch.device(device),
        ShardCache(dataset.storage, scratch / "cache", 10**9),
        report=recorded.report,
        log=recorded.log,
        scratch=scratch,
    )
    return worker, recorded


def config(**changes: object) -> TrainConfig:
    """The tiny configuration with changes."""
    return CONFIG.replace(**changes)


def run(
    dataset: Dataset,
    settings: TrainConfig,
    scratch: Path,
    start: Path | None = None,
    device: str = "cpu",
) -> Recorded:
    """Train to the end in this process."""
    worker, recorded = make_worker(dataset, scratch, device=device)
    train(settings, dataset, worker, Checkpoint.open(start) if start else None)
    return recorded


def state(folder: Path) -> dict[str, object]:
    """All that a checkpoint says, but for how fast it was: equal means bitwise equal."""
    seal = json.loads((folder / SEAL).read_text())
    history = History.load(folder / "history.safetensors")
    steps = {k: v for k, v in history.steps.items() if k != "images_per_second"}
    return {
        "files": {name: seal[name] for name in (MODEL, TRAINING, "config.json")},
        "progress": Checkpoint.open(folder).progress,
        "steps": np.array([steps[name] for name in sorted(steps)]).tobytes(),
        "evaluations": history.evaluations,
        "factors": [values.tobytes() for values in history.factors()],
    }
