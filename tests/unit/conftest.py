"""Fixtures of the unit tests."""

from __future__ import annotations

import pytest
from tiny import build_dataset

from data_shards.dataset import Dataset


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """6 identities to train on, 15 query and 19 gallery images."""
    return Dataset.open(build_dataset(tmp_path_factory.mktemp("tiny")))
