"""Where Ray Train keeps a run's checkpoints, and which of them a run goes on from."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
from ray.train import Checkpoint as RayCheckpoint
from ray.train._internal.session import _TrainingResult
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext

from data_shards.errors import DataError, ReidError
from data_shards.storage import LocalStorage
from reid_train.runs.ray_checkpoints import (
    first_whole,
    forget_missing,
    opened,
    ray_checkpoint,
    ray_storage,
    unlisted,
    upload,
)
from reid_train.runs.run_lock import held
from reid_train.training.checkpoint import MODEL, SEAL


@pytest.fixture
def checkpoints(original, tmp_path: Path) -> list[RayCheckpoint]:
    """Two checkpoints in a run's folder, the newest first."""
    return [
        upload(str(tmp_path / "run"), RayCheckpoint(str(original[0])), name)
        for name in ("checkpoint_2", "checkpoint_1")
    ]


def tear(checkpoint: RayCheckpoint, name: str = MODEL) -> None:
    path = Path(checkpoint.path, name)
    path.write_bytes(path.read_bytes()[:-1])


def test_uploaded_checkpoint_comes_back(original, checkpoints):
    with opened(checkpoints[0]) as folder:
        names = sorted(path.name for path in folder.iterdir())
        assert names == sorted(path.name for path in original[0].iterdir())


def test_nothing_is_written_or_deleted_without_the_lease(original, tmp_path):
    place, checkpoint = tmp_path / "run", RayCheckpoint(str(original[0]))
    with held(LocalStorage(place), "run") as claim:
        kept = upload(str(place), checkpoint, "checkpoint_1", claim=claim)
        storage = StorageContext(experiment_dir_name="run", **ray_storage(str(tmp_path), claim))
    files = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert files
    with pytest.raises(ReidError, match="another driver took the run over"):
        upload(str(place), checkpoint, "checkpoint_2", claim=claim)
    for fs, path in ((kept.filesystem, kept.path), (storage.storage_filesystem, str(place))):
        assert fs is not None
        with pytest.raises(ReidError):
            fs.delete_dir(path)
        with pytest.raises(ReidError):
            fs.open_output_stream(f"{path}/list.json")
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == files


def test_newest_is_taken_if_it_is_whole(checkpoints):
    assert first_whole(checkpoints) is checkpoints[0]


@pytest.mark.parametrize("name", [MODEL, SEAL])
def test_torn_newest_is_passed_over_and_that_is_said(checkpoints, caplog, name):
    tear(checkpoints[0], name)
    assert first_whole(checkpoints) is checkpoints[1]
    name = Path(checkpoints[0].path).name
    assert f"passing over {name}, which is damaged, for the next best" in caplog.text


def test_unsealed_newest_is_passed_over(checkpoints):
    Path(checkpoints[0].path, SEAL).unlink()
    assert first_whole(checkpoints) is checkpoints[1]


def test_none_whole_is_an_error_that_names_them(checkpoints):
    for checkpoint in checkpoints:
        tear(checkpoint)
    with pytest.raises(DataError, match=r"checkpoint_2, checkpoint_1.*--name"):
        first_whole(checkpoints)


def test_ray_finds_writes_and_removes_files(tmp_path):
    place = ray_storage(str(tmp_path / "runs"))
    files, root = pickle.loads(pickle.dumps(place["storage_filesystem"])), place["storage_path"]
    assert files == place["storage_filesystem"], "or Ray takes a checkpoint for another's"
    with files.open_output_stream(f"{root}/r/snapshot.json") as file:
        file.write(b"{}")
    assert files.open_input_stream(f"{root}/r/snapshot.json").read() == b"{}"
    assert [info.is_file for info in files.get_file_info([f"{root}/r/snapshot.json"])] == [True]
    assert files.get_file_info(f"{root}/r").type.name == "Directory"
    assert files.get_file_info(f"{root}/other").type.name == "NotFound"
    files.delete_dir(f"{root}/r")
    assert files.get_file_info(f"{root}/r/snapshot.json").type.name == "NotFound"


def test_folder_and_bucket_name_their_checkpoints(tmp_path):
    assert ray_checkpoint(str(tmp_path / "c")).path == str(tmp_path / "c")
    assert ray_checkpoint("s3://bucket/runs/r/c").path == "bucket/runs/r/c"


def test_deleted_newest_is_passed_over_and_that_is_said(checkpoints, caplog):
    shutil.rmtree(checkpoints[0].path)
    assert first_whole(checkpoints) is checkpoints[1]
    assert "checkpoint_2" in caplog.text


@pytest.fixture
def manager(checkpoints, tmp_path):
    """Makes what Ray Train keeps its list of the run's two checkpoints with, on a new driver."""
    from ray.train import CheckpointConfig

    def make() -> CheckpointManager:
        place = ray_storage(str(tmp_path))
        context = StorageContext(
            place["storage_path"], "run", storage_filesystem=place["storage_filesystem"]
        )
        return CheckpointManager(CheckpointConfig(num_to_keep=2), context)

    first = make()
    for step, checkpoint in enumerate(reversed(checkpoints), 1):
        reported = ray_checkpoint(checkpoint.path)
        result = _TrainingResult(checkpoint=reported, metrics={"step": step})
        first._checkpoint_results.append(result)
        first._latest_checkpoint_result = result
        first._checkpoint_to_report_index[reported] = step
    first._write_state_to_storage()
    return make


@pytest.mark.parametrize(("deleted", "latest"), [(0, "checkpoint_1"), (1, "checkpoint_2")])
def test_ray_starts_although_a_checkpoint_was_deleted(
    checkpoints, manager, tmp_path, caplog, deleted, latest
):
    forget_missing(str(tmp_path / "run"))
    assert len(manager()._checkpoint_results) == 2
    shutil.rmtree(checkpoints[deleted].path)
    forget_missing(str(tmp_path / "run"))
    assert f"deleted: {Path(checkpoints[deleted].path).name}" in caplog.text
    (left,) = manager()._checkpoint_results
    assert Path(left.checkpoint.path).name == latest
    assert manager()._latest_checkpoint_result is not None


def test_all_deleted_is_an_error_that_names_them(checkpoints, manager, tmp_path):
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint.path)
    with pytest.raises(DataError, match=r"checkpoint_1, checkpoint_2.*--name"):
        forget_missing(str(tmp_path / "run"))


def test_run_that_is_new_has_no_list_and_gets_none(tmp_path):
    forget_missing(str(tmp_path / "run"))
    assert not list(tmp_path.rglob("*.json"))


def test_deleted_list_is_made_up_for_by_the_newest_whole_checkpoint(checkpoints, tmp_path, caplog):
    run = str(tmp_path / "run")
    assert unlisted(run) == f"{run}/checkpoint_2"
    assert "list of checkpoints is gone: going on from checkpoint_2" in caplog.text
    tear(checkpoints[0])
    assert unlisted(run) == f"{run}/checkpoint_1"


def test_none_whole_and_no_list_is_an_error_and_no_new_beginning(checkpoints, tmp_path):
    for checkpoint in checkpoints:
        tear(checkpoint)
    with pytest.raises(DataError, match=r"checkpoint_2, checkpoint_1.*--name"):
        unlisted(str(tmp_path / "run"))


def test_checkpoints_that_ray_lists_are_its_affair(checkpoints, manager, tmp_path):
    assert unlisted(str(tmp_path / "run")) is None


def test_half_a_first_checkpoint_is_no_place_to_start(checkpoints, tmp_path):
    for checkpoint in checkpoints:
        Path(checkpoint.path, SEAL).unlink()
    assert unlisted(str(tmp_path / "run")) is None
    assert unlisted(str(tmp_path / "new")) is None
