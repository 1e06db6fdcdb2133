"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny import build_dataset, narrow_resnet18
from tiny_checkpoint import original  # noqa: F401
from torchvision.models import resnet

from data_shards.dataset import Dataset


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """6 identities to train on, 15 query and 19 gallery images."""
    return Dataset.open(build_dataset(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def small_and_quick() -> Iterator[None]:
    """For modules that train: the narrow network, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet, "resnet18", narrow_resnet18)
        yield
    torch.set_num_threads(before)
