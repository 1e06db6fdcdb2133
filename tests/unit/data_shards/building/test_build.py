"""Building: the same bytes each time, whatever interrupts it, and nothing left behind."""

from __future__ import annotations

import errno
import io
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from pictures import SMALL, picture, tree
from PIL import Image

from data_shards.building import build as building
from data_shards.building import state
from data_shards.building.build import build
from data_shards.dataset import Dataset
from data_shards.errors import ConfigError, DataError, ObjectExists, StorageError
from data_shards.storage import LocalStorage
from data_shards.verify import verify


def test_built_dataset_gives_each_image_back(root, tmp_path):
    manifest = build("csv", root, str(tmp_path / "out"), **SMALL).manifest
    dataset = Dataset.open(str(tmp_path / "out"))
    assert dataset.manifest == manifest
    assert manifest.complete
    assert {s: i.images for s, i in manifest.splits.items()} == {
        "train": 24,
        "query": 3,
        "gallery": 9,
    }
    assert len(manifest.shards) > 4
    for split in manifest.splits:
        index = dataset.index(split)
        for n in range(len(index)):
            shard = manifest.shards[index.shard[n]].name
            data = dataset.storage.read_range(shard, int(index.offset[n]), int(index.size[n]))
            assert data == (root.parent / index.path[n]).read_bytes()


def test_two_builds_are_byte_identical_whatever_the_processes(root, tmp_path):
    for name, jobs in (("one", 1), ("two", 2)):
        build("csv", root, str(tmp_path / name), shard_bytes=12_000, jobs=jobs)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_nothing_but_the_dataset_is_left_behind(root, tmp_path):
    build("csv", root, str(tmp_path / "out"), work=tmp_path / "work", **SMALL)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "manifest.json",
        "index.parquet",
        "shards",
    }
    assert not (tmp_path / "work").exists()


def test_same_build_again_changes_nothing(root, tmp_path):
    out = tmp_path / "out"
    build("csv", root, str(out), **SMALL)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert build("csv", root, str(out), **SMALL).already_built
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize("change", ["image", "label", "option"])
def test_another_dataset_at_the_same_place_is_refused(root, tmp_path, change):
    out = tmp_path / "out"
    build("csv", root, str(out), **SMALL)
    before = tree(out)
    settings = dict(SMALL)
    if change == "image":
        picture(root.parent / "p0/0.jpg", 999)
    elif change == "label":
        root.write_text(root.read_text().replace("p0/0.jpg,0,0", "p0/0.jpg,0,1"))
    else:
        settings["shard_bytes"] = 20_000
    with pytest.raises(DataError, match="holds another dataset"):
        build("csv", root, str(out), **settings)
    assert tree(out) == before


def stop_after(monkeypatch, count: int) -> list[str]:
    """Let `count` shards be written, then fail as a full disk would; list those written."""
    written, write = [], building.write_shard

    def write_some(plan, dataset, path):
        if len(written) == count:
            raise StorageError("disk full")
        written.append(plan.name)
        return write(plan, dataset, path)

    monkeypatch.setattr(building, "write_shard", write_some)
    return written


def test_interrupted_build_continues(root, tmp_path, monkeypatch):
    build("csv", root, str(tmp_path / "whole"), **SMALL)
    out = tmp_path / "out"
    with monkeypatch.context() as context:
        first = stop_after(context, 2)
        with pytest.raises(StorageError):
            build("csv", root, str(out), **SMALL)
    assert not (out / "manifest.json").exists()
    with monkeypatch.context() as context:
        second = stop_after(context, 1000)
        build("csv", root, str(out), **SMALL)
    assert len(first) == 2
    assert not set(first) & set(second), "a finished shard was written again"
    assert tree(out) == tree(tmp_path / "whole")


def test_finished_shard_that_vanished_is_written_again(root, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as context:
        stop_after(context, 2)
        with pytest.raises(StorageError):
            build("csv", root, str(out), **SMALL)
    (out / "shards/train-000000.tar").unlink()
    build("csv", root, str(out), **SMALL)
    assert verify(str(out), jobs=1)[1] == []


def test_build_cut_off_before_its_manifest_ends_well(root, tmp_path, monkeypatch):
    build("csv", root, str(tmp_path / "whole"), **SMALL)
    out, write = tmp_path / "out", LocalStorage.write

    def cut(self, key, data, **options):
        if key == "manifest.json":
            raise StorageError("gone")
        write(self, key, data, **options)

    with monkeypatch.context() as context:
        context.setattr(LocalStorage, "write", cut)
        with pytest.raises(StorageError):
            build("csv", root, str(out), **SMALL)
    build("csv", root, str(out), **SMALL)
    assert tree(out) == tree(tmp_path / "whole")


def test_unfinished_build_of_another_dataset_is_kept(root, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as context:
        stop_after(context, 1)
        with pytest.raises(StorageError):
            build("csv", root, str(out), **SMALL)
    before = tree(out)
    picture(root.parent / "p0/0.jpg", 999)
    with pytest.raises(DataError, match="unfinished build of another dataset"):
        build("csv", root, str(out), **SMALL)
    assert tree(out) == before


def test_image_that_changes_leads_to_advice_that_works(root, tmp_path, monkeypatch):
    out, write = tmp_path / "out", building.write_shard

    def change(plan, dataset, path):
        picture(root.parent / "p0/0.jpg", 999)
        return write(plan, dataset, path)

    with monkeypatch.context() as context:
        context.setattr(building, "write_shard", change)
        with pytest.raises(DataError, match=f"changed .*--out, or delete what is in {out}, and"):
            build("csv", root, str(out), **SMALL)
    shutil.rmtree(out)
    build("csv", root, str(out), **SMALL)


@pytest.mark.parametrize("refuses", [True, False])
def test_plan_of_another_build_that_comes_first_is_respected(tmp_path, monkeypatch, refuses):
    """On a server that refuses the second plan, and on one that overwrites the first."""
    storage, write = LocalStorage(tmp_path), LocalStorage.write

    def late(self, key, data, **options):
        write(self, key, b"another")
        if refuses:
            raise ObjectExists(key)

    monkeypatch.setattr(LocalStorage, "write", late)
    with pytest.raises(DataError, match="unfinished build of another dataset"):
        state.claim(storage, "a")


def test_machines_that_start_the_same_build_at_once_both_build(tmp_path, monkeypatch):
    storage, write = LocalStorage(tmp_path), LocalStorage.write

    def late(self, key, data, **options):
        write(self, key, data)
        write(self, key, data, **options)

    monkeypatch.setattr(LocalStorage, "write", late)
    state.claim(storage, "a")
    assert state.is_claimed(storage, "a")


def test_work_folder_may_be_below_the_home(root, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with building.work_folder(Path("~/tars"), "build") as folder:
        assert folder == tmp_path / "home/tars"


def test_part_of_a_killed_download_is_not_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with building.work_folder(None, "build") as folder:
        (folder / ".tmp-abc").write_bytes(b"a part")
    assert not folder.exists()


def test_shards_of_unknown_origin_are_kept(root, tmp_path):
    shard = tmp_path / "out/shards/train-000000.tar"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"someone's")
    with pytest.raises(DataError, match="shards is not empty"):
        build("csv", root, str(tmp_path / "out"), **SMALL)
    assert shard.read_bytes() == b"someone's"


# Bad input


def spoil(root: Path) -> list[str]:
    """Make four images unreadable, each in its way."""
    jpeg = root.parent / "p0/0.jpg"
    jpeg.write_bytes(jpeg.read_bytes()[:-200])
    (root.parent / "p1/1.jpg").write_bytes(b"")
    picture(root.parent / "p2/2.jpg", 5, "PNG")
    png = root.parent / "p2/2.jpg"
    png.write_bytes(png.read_bytes()[:-300])
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    (root.parent / "p3/3.jpg").write_bytes(bomb.getvalue())
    return ["p0/0.jpg", "p1/1.jpg", "p2/2.jpg", "p3/3.jpg"]


def test_all_unreadable_images_are_listed_before_anything_is_written(root, tmp_path):
    spoiled = spoil(root)
    with pytest.raises(DataError, match="--skip-unreadable") as caught:
        build("csv", root, str(tmp_path / "out"), **SMALL)
    assert [name for name in spoiled if f"\n  {name}: " not in str(caught.value)] == []
    assert not (tmp_path / "out").exists()


def test_unreadable_images_can_be_left_out_and_are_recorded(root, tmp_path):
    spoiled = spoil(root)
    manifest = build("csv", root, str(tmp_path / "out"), skip_unreadable=True, **SMALL).manifest
    assert [item.path for item in manifest.left_out] == spoiled
    assert manifest.splits["train"].images == 20


def test_labels_stay_gapless_when_an_identity_is_left_out(root, tmp_path):
    for n in range(4):
        (root.parent / f"p2/{n}.jpg").write_bytes(b"")
    build("csv", root, str(tmp_path / "out"), skip_unreadable=True, **SMALL)
    dataset = Dataset.open(str(tmp_path / "out"))
    assert np.unique(dataset.index("train").label).tolist() == [0, 1, 2, 3, 4]
    assert dataset.identities.tolist() == [0, 1, 3, 4, 5]


def test_full_disk_leaves_no_half_tar(root, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("webdataset.TarWriter.write", full)
    with pytest.raises(StorageError, match="disk full"):
        build("csv", root, str(tmp_path / "out"), work=tmp_path / "work", **SMALL)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("work", [None, "work"])
def test_second_build_at_once_is_refused_and_the_first_continues(root, tmp_path, monkeypatch, work):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    out, write, refused = tmp_path / "out", building.write_shard, []
    settings = SMALL | {"work": work and tmp_path / work}

    def write_while_another_comes(plan, dataset, path):
        with pytest.raises(ConfigError, match=f"another build.* is running in {path.parent}"):
            build("csv", root, str(out), **settings)
        refused.append(path)
        return write(plan, dataset, path)

    monkeypatch.setattr(building, "write_shard", write_while_another_comes)
    assert not build("csv", root, str(out), **settings).already_built
    assert refused
    assert verify(str(out), jobs=1)[1] == []
    assert {path.name for path in tmp_path.iterdir()} == {"images", "out"}


def test_leftover_tar_that_another_still_reads_is_not_written_into(root, tmp_path):
    leftover = tmp_path / "work/train-000000.tar"
    leftover.parent.mkdir()
    leftover.write_bytes(b"as it was")
    with leftover.open("rb") as file:
        build("csv", root, str(tmp_path / "out"), work=leftover.parent, **SMALL)
        assert file.read() == b"as it was"
    assert verify(str(tmp_path / "out"), jobs=1)[1] == []
