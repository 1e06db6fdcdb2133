"""What a group of workers is given."""

from __future__ import annotations

import pytest
import ray

from data_shards.errors import ReidError, StorageError
from data_shards.ray_utils import start_ray
from data_shards.storage import LocalStorage
from reid_train.recipes import recipe
from reid_train.runs import run_lock
from reid_train.runs.ray_trainer import _require_shared_folders, use_gpu


@pytest.mark.parametrize(
    ("device", "here", "needed", "expected"),
    [
        ("auto", 2, 2, True),
        ("auto", 1, 2, False),
        ("auto", 0, 1, False),
        ("cpu", 8, 1, False),
        ("cuda", 0, 1, True),
    ],
)
def test_gpus_are_used_if_there_are_enough_or_they_are_requested(
    device, here, needed, expected, monkeypatch
):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": float(here)})
    assert use_gpu(device, needed) is expected


def test_gpus_that_are_too_few_are_not_left_idle_without_a_word(monkeypatch, caplog):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 2.0})
    assert not use_gpu("auto", 4)
    assert "2 GPUs are here, fewer than the 4 workers" in caplog.text


def test_where_only_free_gpus_count_those_of_others_do_not(monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 2.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"GPU": 1.0})
    assert use_gpu("auto", 2)
    assert not use_gpu("auto", 2, free=True)


def test_node_without_a_folder_of_the_driver_names_it_and_the_flag(tmp_path):
    data, out = tmp_path / "data", tmp_path / "runs"
    tracking = f"sqlite:///{tmp_path}/mlflow.db"
    config = recipe("demo").replace(
        data=str(data), output=str(out), name="r", tracking__uri=tracking
    )
    files = data / "manifest.json", out / "r" / "run.json", tmp_path / "mlflow.db"
    with run_lock.held(LocalStorage(out / "r"), "r") as lock:
        for flag, file in zip(("--data", "--output", "--tracking.uri"), files, strict=True):
            with pytest.raises(StorageError, match=rf"node .* has no {file}: give {flag} .*share"):
                _require_shared_folders(config, lock)
            file.parent.mkdir(exist_ok=True)
            file.touch()
        _require_shared_folders(config, lock)
    elsewhere = config.replace(
        data="s3://b/people", output="s3://b/runs", tracking__uri="http://mlflow:5000"
    )
    _require_shared_folders(elsewhere, lock)


def test_ray_that_starts_too_slowly_is_one_line(monkeypatch):
    def init(**_):
        raise Exception("The current node timed out during startup.\nGCS overloaded")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(ReidError, match=r"does not start on this machine: .* startup\. GCS over"):
        start_ray(1)


def test_temporary_folder_too_long_for_ray_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("a" * 100)))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ReidError, match=r"Ray does not start on this machine: .* length"):
        start_ray(1)
