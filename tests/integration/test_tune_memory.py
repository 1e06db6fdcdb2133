"""A trial that takes a machine's memory, ended by the memory monitor of a real Ray cluster."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import ray

from data_shards.building.build import build
from data_shards.storage import open_storage
from reid_train.config import TrainConfig
from reid_train.recipes import recipe
from reid_train.runs.console import Board
from tune import runner
from tune.controller import Controller
from tune.searchers import Searcher
from tune.store import Store, Trial

pytestmark = pytest.mark.slow

ALLOWED = 4 << 30
"""Bytes that the cluster may use beyond what is in use before; a small trial takes 2 GiB."""
HUGE = {"image.height": 2048, "image.width": 1024}
"""Activations of 8 such images take 10 GB."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder: Path = tmp_path_factory.mktemp("memory")
    options = {"identities": 8, "cameras": 2, "images_per_camera": 2, "seed": 0}
    build("synthetic", folder / "raw", str(folder / "shards"), options=options, jobs=1)
    return recipe("demo").replace(
        data=str(folder / "shards"),
        output=str(folder / "runs"),
        image__height=32,
        image__width=32,
        batch__identities=4,
        batch__images=2,
        batch__steps_per_epoch=2,
        model__stripes=0,
        optimizer__epochs=1,
        evaluation__every=1,
        evaluation__initial=False,
        checkpoint__max_failures=0,
        loader__cache=folder / "cache",
        tracking__uri="off",
        device="cpu",
    )


@pytest.fixture(scope="module")
def trials(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> list[Trial]:
    """One trial of huge images, then a small one."""
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + ALLOWED) / memory.total
    if threshold > 0.9:
        pytest.skip("too little memory is free to let a trial run out of it")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_memory_usage_threshold", str(threshold))
        patch.setenv("RAY_memory_monitor_refresh_ms", "100")
        ray.init(num_cpus=1, log_to_driver=False, logging_level="ERROR")
        store = Store(open_storage(config.output))
        study = Controller(store, config, [Trial(0, dict(HUGE)), Trial(1, {})], Searcher())
        runner.run(study, Board.remote(), 1)  # type: ignore[attr-defined]
        ray.shutdown()
    return study.trials


def test_a_trial_that_runs_out_of_memory_is_marked_with_where_and_what_used_it(trials):
    assert trials[0].state == "failed"
    assert "memory ran out on" in trials[0].reason
    assert "ray::RayTrainWorker" in trials[0].reason
    assert "--resume" not in trials[0].reason


def test_the_sweep_continues_after_it(trials):
    assert trials[1].state == "finished"
    assert trials[1].evaluations
