"""Which checkpoints a run's folder has, which one is resumed from, and which are kept."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from data_shards.errors import DataError, ReidError
from data_shards.storage import LocalStorage
from data_shards.storage.atomic import file_sha256
from reid_train.runs import checkpoint_store
from reid_train.runs.checkpoint_store import (
    Keeper,
    Stored,
    by_score,
    delete_stale_checkpoints,
    kept_checkpoints,
    newest_whole,
    opened,
    stored_checkpoints,
    stored_evaluations,
    upload,
)
from reid_train.runs.run_lock import held
from reid_train.training.checkpoint import FILES, MODEL, PROGRESS, SEAL, Checkpoint


def at_step(original: Path, folder: Path, step: int, epoch: int = 1) -> Path:
    """A copy of a checkpoint that says that it is of another step."""
    shutil.copytree(original, folder)
    position = json.loads((folder / PROGRESS).read_text())
    position["progress"] |= {"global_step": step, "epoch": epoch}
    (folder / PROGRESS).write_text(json.dumps(position))
    seal = json.loads((folder / SEAL).read_text()) | {PROGRESS: file_sha256(folder / PROGRESS)}
    (folder / SEAL).write_text(json.dumps(seal))
    return folder


@pytest.fixture
def run(original, tmp_path: Path) -> Path:
    """A run with checkpoints of the steps 1 and 2."""
    for step in (1, 2):
        at_step(original[0], tmp_path / "run" / f"checkpoint_{step}", step)
    return tmp_path / "run"


def newest(run: Path) -> str | None:
    with newest_whole(str(run)) as found:
        return found and found.folder.name


def tear(run: Path, name: str, file: str = MODEL) -> None:
    path = run / name / file
    path.write_bytes(path.read_bytes()[:-1])


def test_uploaded_checkpoint_comes_back(original, tmp_path):
    upload(str(tmp_path / "run"), original[0], "checkpoint_1")
    with opened(str(tmp_path / "run" / "checkpoint_1"), "start") as found:
        names = sorted(path.name for path in found.folder.iterdir())
        assert names == sorted(path.name for path in original[0].iterdir())
        assert found.folder.name == "start"
    assert not found.folder.exists()


def test_newest_is_the_one_that_came_furthest(original, run):
    assert newest(run) == "checkpoint_2"
    at_step(original[0], run / "checkpoint_0_made_later", 3)
    assert newest(run) == "checkpoint_0_made_later"
    assert [stored.step for stored in stored_checkpoints(str(run))] == [3, 2, 1]


def test_an_evaluation_is_known_when_its_checkpoint_has_been_deleted(run):
    expected = {"mAP": 0.25, "epoch": 1, "step": 1}
    assert stored_evaluations(str(run)) == [expected | {"checkpoint": "checkpoint_1"}]
    shutil.rmtree(run / "checkpoint_1")
    assert stored_evaluations(str(run)) == [expected | {"checkpoint": ""}]


def test_run_without_checkpoints_starts_at_the_beginning(tmp_path):
    assert newest(tmp_path / "new") is None


def test_resuming_reads_and_hashes_every_byte_once(run, monkeypatch):
    read, hashed, parsed = 0, 0, 0

    def note_download(self, key, path, *, sha256=None):
        nonlocal read, hashed
        whole(self, key, path, sha256=sha256)
        read += path.stat().st_size
        hashed += path.stat().st_size if sha256 else 0

    def note_digest(file, *arguments):
        nonlocal hashed
        hashed += Path(file.name).stat().st_size
        return hash_file(file, *arguments)

    def note_open(folder, **options):
        nonlocal parsed
        parsed += 1
        return open_checkpoint(folder, **options)

    whole, hash_file = LocalStorage.download, hashlib.file_digest
    open_checkpoint = Checkpoint.open
    monkeypatch.setattr(LocalStorage, "download", note_download)
    monkeypatch.setattr(hashlib, "file_digest", note_digest)
    monkeypatch.setattr(checkpoint_store.Checkpoint, "open", note_open)
    assert newest(run) == "checkpoint_2"
    files = {name: (run / "checkpoint_2" / name).stat().st_size for name in (*FILES, SEAL)}
    assert read == sum(files.values())
    assert hashed == sum(files.values()) - files[SEAL]
    assert parsed == 1


@pytest.mark.parametrize("file", [MODEL, PROGRESS])
def test_damaged_newest_is_passed_over_with_a_warning(run, caplog, file):
    tear(run, "checkpoint_2", file)
    assert newest(run) == "checkpoint_1"
    if file == MODEL:
        assert "passing over checkpoint_2, which is damaged" in caplog.text


def test_checkpoint_without_a_seal_is_none(run):
    (run / "checkpoint_2" / SEAL).unlink()
    assert newest(run) == "checkpoint_1"
    (run / "checkpoint_1" / SEAL).unlink()
    assert newest(run) is None


def test_deleted_newest_is_not_missed(run):
    shutil.rmtree(run / "checkpoint_2")
    assert newest(run) == "checkpoint_1"


def test_none_whole_is_an_error_that_names_them(run):
    for name in ("checkpoint_1", "checkpoint_2"):
        tear(run, name)
    with pytest.raises(DataError, match=r"checkpoint_2, checkpoint_1.*--name"):
        newest(run)


def test_checkpoint_to_start_from_that_is_not_there_is_an_error(run):
    with (
        pytest.raises(DataError, match="checkpoint_9 is incomplete"),
        opened(f"{run}/checkpoint_9", "start"),
    ):
        pass


@pytest.mark.parametrize(
    ("scores", "kept"),
    [({}, {4, 5}), ({1: 0.5, 2: 0.9, 4: 0.7}, {2, 4, 5}), ({1: 0.5}, {1, 5})],
)
def test_newest_and_the_two_best_are_kept(scores, kept):
    stored = [Stored(step, f"checkpoint_{step}", step) for step in (3, 1, 5, 2, 4)]
    assert {entry.step for entry in kept_checkpoints(stored, scores)} == kept


def test_of_equal_scores_the_newer_is_better():
    stored = [Stored(step, f"checkpoint_{step}", step) for step in range(1, 5)]
    kept = kept_checkpoints(stored, dict.fromkeys(range(1, 4), 0.5))
    assert [entry.step for entry in kept] == [4, 3, 2]


def test_checkpoint_that_was_saved_before_its_step_was_measured_is_none_of_the_best():
    early, late = Stored(3, "checkpoint_3", 1), Stored(3, "checkpoint_3_measured", 2)
    stored = [early, late, Stored(1, "checkpoint_1", 1), Stored(4, "checkpoint_4", 3)]
    scores = {1: 0.5, 3: 0.9}
    assert by_score(stored, scores) == [late, stored[2]]
    assert early not in kept_checkpoints(stored, scores)


def test_superseded_checkpoints_are_deleted_once_the_next_is_stored(original, run, tmp_path):
    with newest_whole(str(run)) as resumed:
        keeper = Keeper(str(run), None, resumed)
    for step, score in ((3, 0.3), (4, 0.2), (5, 0.4), (6, -1.0)):
        folder = at_step(original[0], tmp_path / f"local-{step}", step)
        keeper.keep(folder, f"checkpoint_{step}", {"step": step, "epoch": 1, "mAP": score})
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoint_3",
        "checkpoint_5",
        "checkpoint_6",
    ]


def test_damaged_checkpoints_stay_until_the_run_ends(original, run, tmp_path):
    tear(run, "checkpoint_2")
    with newest_whole(str(run)) as resumed:
        keeper = Keeper(str(run), None, resumed)
    folder = at_step(original[0], tmp_path / "local", 3)
    keeper.keep(folder, "checkpoint_3", {"step": 3, "epoch": 1, "mAP": -1.0})
    assert (run / "checkpoint_2").exists()


def test_nothing_is_written_or_deleted_without_the_lock(original, run, tmp_path):
    with held(LocalStorage(run), "run") as lock, newest_whole(str(run)) as resumed:
        keeper = Keeper(str(run), lock, resumed)
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    folder = at_step(original[0], tmp_path / "local", 3)
    with pytest.raises(ReidError, match="another driver took the run"):
        keeper.keep(folder, "checkpoint_3", {"step": 3, "epoch": 1, "mAP": 0.9})
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files


def test_what_a_killed_upload_left_is_deleted_when_the_run_ends(run):
    (run / "checkpoint_2" / ".tmp-half").write_bytes(b"x")
    for name in ("checkpoint_3/model.safetensors", "checkpoint_4/.tmp-half", "report/index.html"):
        (run / name).parent.mkdir(parents=True)
        (run / name).write_bytes(b"x")
    (run / "run.json").write_bytes(b"x")
    delete_stale_checkpoints(str(run), {1: 0.5, 2: 0.4})
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoint_1",
        "checkpoint_2",
        "report",
        "run.json",
    ]
