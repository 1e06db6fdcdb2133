"""Each family of backbones trained by two workers, resumed, measured and loaded again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import timm
import torch.distributed as dist
from processes import run_workers
from tiny import config, make_worker, state

from data_shards.dataset import Dataset
from reid_train.config import TrainConfig
from reid_train.model.embedder import Embedder
from reid_train.training.checkpoint import Checkpoint
from reid_train.training.loop import train

WORLD = 2
BACKBONES = (
    "timm:test_resnet",
    "timm:test_convnext",
    "timm:tf_efficientnet_lite0",
    "timm:mobilenetv3_small_050",
    "timm:test_vit",  # with a class token
    "timm:test_vit2",  # with a register token and layer scale
    "timm:swin_tiny_patch4_window7_224",
)
NARROW = {  # so that checkpoints are small
    "swin_tiny_patch4_window7_224": {
        "embed_dim": 12,
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 1, 2, 2),
    }
}
SETTINGS = config(
    image__height=64,
    model__embedding_size=16,
    batch__steps_per_epoch=2,
    checkpoint__every_steps=1,
    tracking__every_steps=1,
)


@contextmanager
def narrowed() -> Iterator[None]:
    """Let timm build the models of `NARROW` narrower than it has them."""
    create = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda n, **kw: create(n, **NARROW.get(n, {}), **kw))
        yield


def _train_and_resume(rank: int, url: str, given: dict[str, str], scratch: str) -> dict[str, dict]:
    """Train each backbone to the end, and again from its second checkpoint."""
    dataset, found = Dataset.open(url), {}
    for name, settings in given.items():
        folder, ends = Path(scratch) / name.replace(":", "-"), []
        folder.mkdir(exist_ok=True)
        start: Path | None = None
        for _ in range(2):
            worker, recorded = make_worker(dataset, folder, rank, WORLD)
            resume = Checkpoint.open(start) if start else None
            with narrowed():
                train(TrainConfig.from_json(settings), dataset, worker, resume)
            written = [[str(path) for path in recorded.checkpoints]]
            dist.broadcast_object_list(written, src=0)
            start = Path(written[0][1])
            ends.append(written[0][-1])
        found[name] = {
            "ends": ends,
            "losses": recorded.losses(),
            "mAP": recorded.metrics[-1]["mAP"],
        }
    return found


@pytest.fixture(scope="module")
def trained(tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    given = {name: SETTINGS.replace(model__backbone=name).to_json() for name in BACKBONES}
    folder = str(tmp_path_factory.mktemp("backbones"))
    return run_workers(_train_and_resume, WORLD, tiny_dataset.url, given, folder)[0]


@pytest.mark.parametrize("name", BACKBONES)
def test_a_resumed_training_ends_bitwise_as_the_whole_one(trained, name):
    whole, resumed = (state(Path(folder)) for folder in trained[name]["ends"])
    assert resumed == whole


@pytest.mark.parametrize("name", BACKBONES)
def test_a_training_is_measured_and_its_checkpoint_embeds(trained, name):
    found = trained[name]
    assert np.isfinite(found["losses"]).all()
    assert 0 < found["mAP"] <= 1
    with narrowed():
        embedder = Embedder.from_folder(found["ends"][0], "cpu")
    images = np.random.default_rng(0).integers(0, 256, (3, 50, 30, 3), np.uint8)
    embeddings = embedder(images)
    assert embeddings.shape == (3, 16)
    assert len(np.unique(embeddings, axis=0)) == 3
