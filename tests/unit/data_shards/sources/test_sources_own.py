"""Images of one's own: CSV files and folders; and drawn people."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from PIL import Image
from source_files import brief, read, touch

from data_shards.errors import ConfigError, DataError, StorageError
from data_shards.records import NO_CAMERA
from data_shards.sources import webdataset
from data_shards.sources.layout import Counts, count
from data_shards.storage.object_path import open_place

# CSV


def csv(root: Path, *lines: str, header: str = "path,pid,camid,split") -> Path:
    touch(root, "a.jpg", "b/c.png")
    path = root / "list.csv"
    path.write_text("\n".join((header, *lines)), encoding="utf-8")
    return path


def test_csv_is_read_with_paths_beside_it(tmp_path):
    path = csv(tmp_path, "a.jpg,5,1,train", "b/c.png,7,2,query")
    assert brief(read("csv", path)) == [("a.jpg", 5, 1, "train"), ("b/c.png", 7, 2, "query")]


def test_csv_paths_may_be_elsewhere_and_columns_in_any_order(tmp_path):
    touch(tmp_path / "pictures", "x.jpg")
    path = csv(tmp_path / "lists", "train,1,x.jpg,5,more", header="\ufeffsplit,camid,path,pid,note")
    records = read("csv", path, images=tmp_path / "pictures")
    assert brief(records) == [("x.jpg", 5, 1, "train")]


def test_csv_names_are_numbered_by_their_order(tmp_path):
    path = csv(tmp_path, "a.jpg,zoe,north,train", "b/c.png,adam,south,train")
    assert [(r.pid, r.camid) for r in read("csv", path)] == [(1, 0), (0, 1)]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("b/c.png,x7,1,train", r"line 3: pid 'x7' is not an integer"),
        ("b/c.png,-1,1,train", r"line 3: pid '-1' is not an integer"),
        ("b/c.png,7,1.5,train", r"line 3: camid '1\.5'"),
        ("b/c.png,7,,train", r"line 3: camid '' .*, or none at all if cameras are not known"),
        ("b/c.png,7,1,test", r"line 3: split 'test' is none of train, val, query, gallery"),
        ("b/c.png,7,1", r"line 3: too few fields"),
        ("gone.jpg,7,1,train", r"line 3: .*gone\.jpg does not exist"),
        ("../x.jpg,7,1,train", r"line 3: '\.\./x\.jpg' leads out"),
        ("/etc/passwd,7,1,train", r"line 3: '/etc/passwd' is not a path relative"),
        (",7,1,train", r"line 3: '' is not a path"),
        ("a.jpg,7,1,train", r"line 3: 'a\.jpg' is already listed on line 2"),
    ],
)
def test_csv_bad_line_is_named(tmp_path, line, complaint):
    with pytest.raises(DataError, match=complaint):
        read("csv", csv(tmp_path, "a.jpg,5,1,train", line))


def test_csv_missing_column_is_named(tmp_path):
    with pytest.raises(DataError, match="no column pid"):
        read("csv", csv(tmp_path, "a.jpg,5,train", header="path,camid,split"))


@pytest.mark.parametrize(("mark", "shown"), [(";", "';'"), ("\t", r"'\\t'")])
def test_columns_that_are_not_separated_by_commas_are_named(tmp_path, mark, shown):
    table = csv(tmp_path, mark.join("a51t"), header=mark.join(("path", "pid", "camid", "split")))
    with pytest.raises(DataError, match=f"must be path,pid,camid,split with commas, not {shown}"):
        read("csv", table)


def test_csv_may_have_no_cameras(tmp_path):
    wanted = [("a.jpg", 5, NO_CAMERA, "train"), ("b/c.png", 7, NO_CAMERA, "query")]
    without = csv(tmp_path, "a.jpg,5,train", "b/c.png,7,query", header="path,pid,split")
    assert brief(read("csv", without)) == wanted
    assert brief(read("csv", csv(tmp_path, "a.jpg,5,,train", "b/c.png,7, ,query"))) == wanted


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00\x01"])
def test_csv_that_is_none_is_refused(tmp_path, data):
    (tmp_path / "list.csv").write_bytes(data)
    with pytest.raises(DataError, match=r"list\.csv"):
        read("csv", tmp_path / "list.csv")


def test_csv_missing_file_is_named(tmp_path):
    with pytest.raises(
        DataError, match=r"none\.csv is not there: give a file whose first line is path,pid"
    ):
        read("csv", tmp_path / "none.csv")


def test_csv_object_that_is_not_there_is_not_called_a_folder(bucket):
    with pytest.raises(DataError, match=r"people\.csv is not there: give a file"):
        read("csv", open_place(f"s3://{bucket}/people.csv", file=True))


def test_csv_header_may_have_spaces(tmp_path):
    path = csv(tmp_path, "a.jpg,5,1,train", header="\ufeffpath, pid ,camid ,\tsplit")
    assert brief(read("csv", path)) == [("a.jpg", 5, 1, "train")]


def test_csv_with_windows_line_ends(tmp_path):
    path = csv(tmp_path, "a.jpg,5,1,train")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert brief(read("csv", path)) == [("a.jpg", 5, 1, "train")]


def test_csv_skips_files_of_macos(tmp_path, caplog):
    touch(tmp_path, "._a.jpg", "b/._c.png")
    lines = ("._a.jpg,5,1,train", "a.jpg,5,1,train", "b/._c.png,5,1,train", ".DS_Store,5,1,train")
    assert brief(read("csv", csv(tmp_path, *lines))) == [("a.jpg", 5, 1, "train")]
    assert "skipped 3 files" in caplog.text


@pytest.mark.parametrize("spelling", ["./a.jpg", "b/./../a.jpg", ".//a.jpg", "a.jpg"])
def test_csv_same_image_twice_is_named_however_it_is_spelt(tmp_path, spelling):
    expected = "leads out" if ".." in spelling else r"line 3: .*a\.jpg' is already listed on line 2"
    with pytest.raises(DataError, match=expected):
        read("csv", csv(tmp_path, "a.jpg,5,1,train", f"{spelling},5,1,train"))


def test_csv_paths_are_recorded_in_their_shortest_form(tmp_path):
    path = csv(tmp_path, "./a.jpg,5,1,train", "b//c.png,5,1,train")
    assert [r.relative for r in read("csv", path)] == ["a.jpg", "b/c.png"]


@pytest.mark.parametrize(
    "name",
    ["a\u00a0b.jpg", "at 9.41\u202fPM.jpg", "人\u3000a.jpg", "👩\u200d🔬.jpg", "e\u0301.jpg"],
    ids=["no-break space", "macOS screenshot", "ideographic space", "joined emoji", "combining"],
)
def test_csv_takes_every_valid_name(tmp_path, name):
    touch(tmp_path, name)
    assert brief(read("csv", csv(tmp_path, f"{name},5,1,train"))) == [(name, 5, 1, "train")]


# Synthetic people

SMALL = {"identities": 4, "cameras": 2, "images_per_camera": 3}


def test_synthetic_people_are_split_by_identity(tmp_path):
    records = read("synthetic", tmp_path, **SMALL)
    assert count(records) == Counts(12, 2, 4, 8, 2)
    with Image.open(records[0].path) as image:
        image.load()
        assert image.height == 2 * image.width


def test_synthetic_people_are_the_same_again(tmp_path):
    first, second = (read("synthetic", tmp_path / n, **SMALL) for n in ("a", "b"))
    assert brief(first) == brief(second)
    assert [r.path.read_bytes() for r in first] == [r.path.read_bytes() for r in second]


def test_synthetic_people_are_others_with_another_seed(tmp_path):
    first, second = (read("synthetic", tmp_path, **SMALL, seed=s) for s in (0, 1))
    assert all(
        a.path.read_bytes() != b.path.read_bytes() for a, b in zip(first, second, strict=True)
    )


def test_synthetic_people_are_rendered_once(tmp_path):
    first = read("synthetic", tmp_path, **SMALL)
    before = first[0].path.stat().st_mtime_ns
    assert read("synthetic", tmp_path, **SMALL)[0].path.stat().st_mtime_ns == before


@pytest.mark.parametrize("wrong", [{"identities": 3}, {"cameras": 1}, {"seed": -1}])
def test_synthetic_people_that_cannot_be(tmp_path, wrong):
    with pytest.raises(ConfigError, match="at least 4 identities"):
        read("synthetic", tmp_path, **SMALL | wrong)


# Folders


def test_folders_of_splits_are_read_without_cameras(tmp_path):
    touch(tmp_path / "train" / "zoe", "1.jpg", "2.PNG", "notes.txt", ".hidden.jpg", "._1.jpg")
    touch(tmp_path / "query" / "adam", "1.jpg")
    touch(tmp_path / "gallery" / "adam", "1.jpg", "2.jpg")
    touch(tmp_path / "gallery" / ".git", "1.jpg")
    assert brief(read("folders", tmp_path)) == [
        ("train/zoe/1.jpg", 1, NO_CAMERA, "train"),
        ("train/zoe/2.PNG", 1, NO_CAMERA, "train"),
        ("query/adam/1.jpg", 0, NO_CAMERA, "query"),
        ("gallery/adam/1.jpg", 0, NO_CAMERA, "gallery"),
        ("gallery/adam/2.jpg", 0, NO_CAMERA, "gallery"),
    ]
    with pytest.raises(ConfigError, match="leave out --test"):
        read("folders", tmp_path, test=0.5)


def test_folders_of_identities_are_split_for_the_test(tmp_path):
    for person in range(8):
        touch(tmp_path / f"{person:03}", *(f"{n}.jpg" for n in range(5)))
    records = read("folders", tmp_path)
    assert count(records)[:4] == Counts(30, 6, 2, 8, 1)[:4]
    assert {r.pid for r in records} == set(range(8))
    assert len({r.pid for r in read("folders", tmp_path, test=0.5) if r.split == "train"}) == 4
    assert read("folders", tmp_path, seed=1) != records


@pytest.mark.parametrize(
    ("names", "pids"),
    [(["7", "12"], [12, 7]), (["7", "07", "a"], [0, 1, 2]), (["7", "07"], [0, 1])],
)
def test_folders_that_are_different_numbers_keep_them(tmp_path, names, pids):
    for name in names:
        touch(tmp_path / "train" / name, "1.jpg")
    assert [r.pid for r in read("folders", tmp_path)] == pids


def test_folders_without_images_say_what_is_expected(tmp_path):
    touch(tmp_path, "1.jpg")
    with pytest.raises(DataError, match="a folder for each identity"):
        read("folders", tmp_path)


def test_folders_with_names_that_are_not_utf_8_are_split_for_the_test(tmp_path):
    for person in range(8):
        touch(tmp_path / f"{person}", *(os.fsdecode(b"caf\xe9%d.jpg" % n) for n in range(4)))
    records = read("folders", tmp_path, test=0.5)
    assert {record.split for record in records} == {"train", "query", "gallery"}


# What the disk refuses


@pytest.mark.parametrize(
    ("source", "method", "refused"),
    [
        ("csv", "is_file", "list.csv"),
        ("csv", "read_bytes", "list.csv"),
        ("folders", "is_dir", "2"),
        ("folders", "iterdir", "2"),
        ("market1501", "is_dir", "bounding_box_train"),
        ("msmt17", "is_dir", "train"),
    ],
)
def test_what_may_not_be_read_is_one_line(tmp_path, monkeypatch, source, method, refused):
    csv(tmp_path, "a.jpg,5,1,train")
    touch(tmp_path, "1/a.jpg", "2/a.jpg")
    call = getattr(Path, method)

    def refuse(path):
        if path.name == refused:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return call(path)

    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(StorageError, match=rf"{tmp_path}/{refused}: Permission denied"):
        read(source, tmp_path / "list.csv" if source == "csv" else tmp_path)


# Tars


@pytest.mark.parametrize(
    ("root", "names"),
    [
        ("s3://b/{x/0,y/0}.tar", ["x/0.tar", "y/0.tar"]),
        ("s3://b/in/{x,y}.tar", ["x.tar", "y.tar"]),
        ("https://host/{ab/0.tar?s=1,a/0.tar?s=2}", ["ab/0.tar", "a/0.tar"]),
        ("/data/{x/0,y/0}.tar", ["x/0.tar", "y/0.tar"]),
        ("{x/0,y/0}.tar", ["x/0.tar", "y/0.tar"]),
        ("/data/0.tar", ["0.tar"]),
    ],
)
def test_tars_are_named_below_their_common_folder(monkeypatch, root, names):
    tasks = list[tuple[str, str]]()

    def note(_, given, *rest):
        tasks.extend(given)
        return []

    monkeypatch.setattr(webdataset, "parallel_map", note)
    monkeypatch.setattr(webdataset, "_labelled", lambda *_: None)
    read("webdataset", root, fields=["pid=cls"])
    assert [name for _, name in tasks] == names
