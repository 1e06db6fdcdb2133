"""Folders and S3 behind one protocol."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_shards.errors import ConfigError, DataError, ObjectExists, ObjectMissing, StorageError
from data_shards.storage import Storage, open_file, open_storage
from data_shards.storage import atomic as files

pytestmark = pytest.mark.usefixtures("credentials")


@pytest.fixture(params=["s3", "local"])
def storage(request, tmp_path) -> Storage:
    if request.param == "local":
        return open_storage(str(tmp_path / "store"))
    return open_storage(f"s3://{request.getfixturevalue('bucket')}/some/prefix")


class TestBothKinds:
    def test_reads_back_what_was_written(self, storage):
        storage.write("a/b.bin", b"hello")
        assert storage.read("a/b.bin") == b"hello"
        assert storage.size("a/b.bin") == 5
        assert storage.exists("a/b.bin")

    def test_write_replaces(self, storage):
        storage.write("k", b"old")
        storage.write("k", b"new")
        assert storage.read("k") == b"new"

    def test_create_once_refuses_and_leaves_what_was_there(self, storage):
        storage.write("k", b"old", create_once=True)
        with pytest.raises(ObjectExists):
            storage.write("k", b"new", create_once=True)
        assert storage.read("k") == b"old"

    def test_create_once_has_one_winner(self, storage):
        def contend(n: int) -> bool:
            try:
                storage.write("k", b"%d" % n, create_once=True)
            except ObjectExists:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(contend, range(8))) == 1

    def test_range_is_exact(self, storage):
        storage.write("k", bytes(range(100)))
        assert storage.read_range("k", 10, 5) == bytes(range(10, 15))
        assert storage.read_range("k", 10, 0) == b""

    @pytest.mark.parametrize("start", [3, 50])
    def test_range_past_the_end_is_an_error(self, storage, start):
        storage.write("k", b"12345")
        with pytest.raises(StorageError, match="truncated"):
            storage.read_range("k", start, 30)

    def test_missing_object_has_its_own_error(self, storage):
        for use in (storage.read, storage.size, lambda key: storage.read_range(key, 0, 1)):
            with pytest.raises(ObjectMissing):
                use("nothing")
        with pytest.raises(ObjectMissing):
            storage.download("nothing", Path("unused"))
        assert not storage.exists("nothing")
        storage.delete("nothing")

    def test_lists_by_key_below_a_prefix(self, storage):
        for key in ("b/2", "a", "b/10", "c"):
            storage.write(key, key.encode())
        assert list(storage.list()) == [("a", 1), ("b/10", 4), ("b/2", 3), ("c", 1)]
        assert [key for key, _ in storage.list("b/")] == ["b/10", "b/2"]
        assert [key for key, _ in storage.child("b").list()] == ["10", "2"]
        assert list(storage.list("zzz")) == []

    def test_delete_removes_one(self, storage):
        storage.write("a/x", b"1")
        storage.write("a/y", b"2")
        storage.delete("a/x")
        assert list(storage.list()) == [("a/y", 1)]

    def test_uploads_and_downloads_a_file(self, storage, tmp_path):
        source, target = tmp_path / "source", tmp_path / "deep" / "target"
        source.write_bytes(os.urandom(3 << 20))
        storage.upload("f", source)
        storage.download("f", target, sha256=files.file_sha256(source))
        assert target.read_bytes() == source.read_bytes()
        assert [p.name for p in target.parent.iterdir()] == ["target"]

    def test_download_with_another_digest_leaves_nothing(self, storage, tmp_path):
        storage.write("f", b"flipped")
        target = tmp_path / "deep" / "target"
        with pytest.raises(DataError, match="damaged"):
            storage.download("f", target, sha256="0" * 64)
        assert list(target.parent.iterdir()) == []

    def test_full_disk_is_named_and_leaves_nothing(self, storage, tmp_path, monkeypatch):
        storage.write("f", b"x")

        def full(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(files.os, "fsync", full)
        with pytest.raises(StorageError, match="disk full"):
            storage.download("f", tmp_path / "cache" / "target")
        assert list((tmp_path / "cache").iterdir()) == []

    def test_copy_of_what_is_missing_names_the_source(self, storage):
        source, target = storage.child("from"), storage.child("to")
        with pytest.raises(ObjectMissing, match=r"/from/k does not exist"):
            target.copy_from(source, "k", "k")
        source.write("k", b"there")
        assert target.copy_from(source, "k", "k")
        assert target.read("k") == b"there"

    @pytest.mark.parametrize("key", ["", "/etc/passwd", "../up", "a/../../up"])
    def test_keys_do_not_lead_out(self, storage, key):
        with pytest.raises(StorageError, match="not a key inside"):
            storage.read(key)

    def test_survives_pickling_and_forking(self, storage):
        storage.write("k", b"shared")
        copy = pickle.loads(pickle.dumps(storage))
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=lambda: queue.put(copy.read("k")))
        child.start()
        assert queue.get() == b"shared"
        child.join()


@pytest.mark.parametrize("url", ["s3:///key", "gs://bucket/x", "file://host/x", ""])
def test_urls_that_cannot_be_opened(url):
    with pytest.raises(ConfigError):
        open_storage(url)


@pytest.mark.parametrize(
    ("url", "right"),
    [
        ("s3:/bucket/x", "s3://bucket/x"),
        ("s3:bucket/x", "s3://bucket/x"),
        ("S3://bucket/x", "s3://bucket/x"),
        ("s3:///bucket", "s3://bucket/prefix"),
        ("file:/data/x", "file:///data/x"),
        ("file://data/x", "file:///data/x"),
        ("FILE:///data/x", "file:///data/x"),
    ],
)
def test_misspelt_url_is_refused_with_the_right_form(url, right, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(right)):
        open_storage(url)
    with pytest.raises(ConfigError, match=re.escape(right)):
        open_file(f"{url}/file")


@pytest.mark.parametrize("folder", ["s3", "files/s3:x", "./s3:x", "a:b"])
def test_path_that_only_looks_like_a_url_is_a_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_storage(folder).url == str(tmp_path / folder)


@pytest.mark.parametrize(
    ("url", "folder", "name"),
    [
        ("s3://b/a/x.pt", "s3://b/a", "x.pt"),
        ("s3://b/x.pt", "s3://b", "x.pt"),
        ("/a/x.pt", "/a", "x.pt"),
        ("/x.pt", "/", "x.pt"),
    ],
)
def test_file_is_found_in_its_folder(url, folder, name):
    storage, key = open_file(url)
    assert (storage.url, key) == (folder, name)


@pytest.mark.parametrize(
    ("url", "opened"),
    [
        ("s3://b/runs/", "s3://b/runs"),
        ("s3://b", "s3://b"),
        ("s3://b/data#v2", "s3://b/data#v2"),
        ("s3://b/what?/now", "s3://b/what?/now"),
        ("s3://b/100%25/ä", "s3://b/100%25/ä"),
    ],
)
def test_s3_urls_are_taken_by_the_letter(url, opened):
    assert open_storage(url).url == opened


def test_file_url_is_a_folder(tmp_path):
    folder = tmp_path / "with space"
    open_storage(folder.as_uri()).write("k", b"1")
    assert (folder / "k").read_bytes() == b"1"


def test_object_that_goes_while_it_is_listed_is_not_listed(tmp_path, monkeypatch):
    storage, walk = open_storage(str(tmp_path)), os.walk
    for key in ("a", "b"):
        storage.write(key, b"x")

    def walk_and_lose_one(root, **options):
        found = list(walk(root, **options))
        (tmp_path / "a").unlink()
        return found

    monkeypatch.setattr(os, "walk", walk_and_lose_one)
    assert list(storage.list()) == [("b", 1)]


class TestDiskWithoutHardLinks:
    @pytest.fixture(autouse=True, params=[errno.EPERM, errno.ENOTSUP])
    def no_links(self, request, monkeypatch):
        def refuse(*_):
            raise OSError(request.param, os.strerror(request.param))

        monkeypatch.setattr(files.os, "link", refuse)

    @pytest.fixture
    def storage(self, tmp_path) -> Storage:
        return open_storage(str(tmp_path))

    test_one_wins = TestBothKinds.test_create_once_has_one_winner
    test_what_was_there_stays = TestBothKinds.test_create_once_refuses_and_leaves_what_was_there

    def test_nobody_sees_a_file_that_is_not_whole(self, storage, tmp_path, monkeypatch):
        replace, seen = os.replace, list[bool]()

        def look(name, path):
            seen.append(path.exists())
            replace(name, path)

        monkeypatch.setattr(files.os, "replace", look)
        storage.write("k", b"whole", create_once=True)
        assert seen == [False]
        assert [path.name for path in tmp_path.iterdir()] == ["k"]


def test_folder_that_may_not_be_entered_is_one_line(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(StorageError, match=r"/k: Permission denied"):
        open_storage(str(tmp_path)).exists("k")


def test_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch, caplog):
    storage, scandir = open_storage(str(tmp_path)), os.scandir
    for key in ("a/1", "b/1"):
        storage.write(key, b"x")

    def refuse(path):
        if str(path).endswith("/a"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert list(storage.list()) == [("b/1", 1)]
    assert f"{tmp_path}/a is left out: Permission denied" in caplog.text
