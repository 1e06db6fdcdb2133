"""Training on a merged dataset: which batches it sees, that it resumes, and what is measured."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import Recorded, build_dataset, config, run, state

from data_shards.building.merge import merge
from data_shards.dataset import Dataset
from reid_train.config import TrainConfig
from reid_train.evaluation.metrics import MEAN
from reid_train.training.data import epoch_plan

pytestmark = pytest.mark.usefixtures("small_and_quick")


@pytest.fixture(scope="module")
def merged(tiny_dataset: Dataset, tmp_path_factory) -> Dataset:
    """The tiny dataset, and another one of as many people."""
    folder = tmp_path_factory.mktemp("merged")
    other = build_dataset(folder / "other", ("query", "gallery", "train"), name="other")
    merge([tiny_dataset.url, other], str(folder / "both"))
    return Dataset.open(str(folder / "both"))


def settings(datasets: str) -> TrainConfig:
    return config(batch__datasets=datasets, checkpoint__every_steps=2, tracking__every_steps=1)


@pytest.fixture(scope="module", params=["mixed", "apart"])
def trained(merged, request, tmp_path_factory) -> tuple[str, Recorded]:
    scratch = tmp_path_factory.mktemp(request.param)
    return request.param, run(merged, settings(request.param), scratch)


def test_run_on_a_merged_dataset_resumes_bitwise(merged, trained, tmp_path):
    datasets, whole = trained
    assert len(whole.losses()) == 6
    assert np.isfinite(whole.losses()).all()
    resumed = run(merged, settings(datasets), tmp_path, whole.checkpoints[0])
    assert 0 < len(resumed.losses()) < 6
    assert state(resumed.checkpoints[-1]) == state(whole.checkpoints[-1])


def test_each_dataset_is_measured_besides_all_of_them(trained):
    metrics = trained[1].metrics[-1]
    for measure in ("mAP", "rank-1"):
        each = [metrics[f"{measure}/{name}"] for name in ("other", "table")]
        assert metrics[f"{measure}/{MEAN}"] == pytest.approx(np.mean(each))
        assert all(0 <= value <= 1 for value in each)
    # Both have as many queries.
    assert metrics["mAP"] == pytest.approx(metrics[f"mAP/{MEAN}"])


@pytest.mark.parametrize(("datasets", "in_a_batch"), [("mixed", 2), ("apart", 1)])
def test_batches_are_of_one_dataset_or_of_all(merged, datasets, in_a_batch):
    rows = np.concatenate([epoch_plan(settings(datasets), merged, epoch) for epoch in range(6)])
    origin = merged.origin("train")[rows]
    assert set(origin.ravel().tolist()) == {0, 1}
    assert max(len(np.unique(batch)) for batch in origin) == in_a_batch
