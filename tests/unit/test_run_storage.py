"""Where Ray Train keeps a run's checkpoints, and which of them a run goes on from."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from ray.train import Checkpoint as RayCheckpoint
from test_checkpoint import original  # noqa: F401

from data_shards.errors import DataError
from reid_train.checkpoint import MODEL, SEAL
from reid_train.run_storage import first_whole, opened, ray_checkpoint, ray_storage, upload


@pytest.fixture
def checkpoints(original, tmp_path: Path) -> list[RayCheckpoint]:  # noqa: F811
    """Two checkpoints in a run's folder, the newest first."""
    return [
        upload(str(tmp_path / "run"), RayCheckpoint(str(original[0])), name)
        for name in ("checkpoint_2", "checkpoint_1")
    ]


def tear(checkpoint: RayCheckpoint, name: str = MODEL) -> None:
    path = Path(checkpoint.path, name)
    path.write_bytes(path.read_bytes()[:-1])


def test_uploaded_checkpoint_comes_back(original, checkpoints):  # noqa: F811
    with opened(checkpoints[0]) as folder:
        names = sorted(path.name for path in folder.iterdir())
        assert names == sorted(path.name for path in original[0].iterdir())


def test_newest_is_taken_if_it_is_whole(checkpoints):
    assert first_whole(checkpoints) is checkpoints[0]


@pytest.mark.parametrize("name", [MODEL, SEAL])
def test_torn_newest_is_passed_over_and_that_is_said(checkpoints, caplog, name):
    tear(checkpoints[0], name)
    assert first_whole(checkpoints) is checkpoints[1]
    assert "passing over a damaged checkpoint" in caplog.text


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
