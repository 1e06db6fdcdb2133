from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from data_shards.errors import ConfigError, DataError
from data_shards.records import NO_CAMERA
from data_shards.sources import SOURCES
from data_shards.sources.layout import Counts, Source, count, difference


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not opened by a parser")


def brief(records) -> list[tuple[str, int, int, str]]:
    return [(r.relative, r.pid, r.camid, r.split) for r in records]


def read(name: str, root: Path, **options):
    return SOURCES[name].read(root, **options)


# MSMT17


def msmt17(root: Path, train: str = "train", test: str = "test") -> Path:
    lists = {
        "train": (train, ["0000/0000_000_01_0303morning_0008_0.jpg 0"]),
        "val": (train, ["0001/0001_004_14_0303noon_0010_1.jpg 1"]),
        "query": (test, ["0000/0000_000_05_0303afternoon_0011_0.jpg 0"]),
        "gallery": (test, ["0000/0000_001_06_0303morning_0012_0.jpg 0", ""]),
    }
    for split, (folder, lines) in lists.items():
        touch(root / folder, *(line.split()[0] for line in lines if line))
        (root / f"list_{split}.txt").write_text("\n".join(lines))
    return root


@pytest.mark.parametrize(
    ("below", "folders"),
    [
        (".", ("train", "test")),
        ("MSMT17_V1", ("train", "test")),
        ("MSMT17_V2", ("mask_train_v2", "mask_test_v2")),
    ],
)
def test_msmt17_both_versions_are_read(tmp_path, below, folders):
    msmt17(tmp_path / below, *folders)
    train, test = folders
    assert brief(read("msmt17", tmp_path)) == [
        (f"{train}/0000/0000_000_01_0303morning_0008_0.jpg", 0, 1, "train"),
        (f"{train}/0001/0001_004_14_0303noon_0010_1.jpg", 1, 14, "train"),
        (f"{test}/0000/0000_000_05_0303afternoon_0011_0.jpg", 0, 5, "query"),
        (f"{test}/0000/0000_001_06_0303morning_0012_0.jpg", 0, 6, "gallery"),
    ]


def test_msmt17_val_can_stay_apart(tmp_path):
    records = read("msmt17", msmt17(tmp_path), val="separate")
    assert Counter(r.split for r in records) == {"train": 1, "val": 1, "query": 1, "gallery": 1}


def test_msmt17_two_versions_side_by_side_need_a_choice(tmp_path):
    msmt17(tmp_path / "MSMT17_V1")
    msmt17(tmp_path / "MSMT17_V2", "mask_train_v2", "mask_test_v2")
    with pytest.raises(DataError, match="folder of one version"):
        read("msmt17", tmp_path)


def test_msmt17_missing_image_shows_in_the_counts(tmp_path):
    root = msmt17(tmp_path)
    (root / "train/0000/0000_000_01_0303morning_0008_0.jpg").unlink()
    assert count(read("msmt17", root)).train_images == 1


@pytest.mark.parametrize(
    "line",
    [
        "0000/0000_000_01_a_0_0.jpg",
        "0000/0000.jpg 0",
        "0000/0000_000_xx_a_0_0.jpg 0",
        "a_b_1.jpg -1",
    ],
)
def test_msmt17_bad_line_is_named(tmp_path, line):
    root = msmt17(tmp_path)
    (root / "list_query.txt").write_text(f"0000/0000_000_05_0303afternoon_0011_0.jpg 0\n{line}\n")
    with pytest.raises(DataError, match=r"list_query\.txt, line 2"):
        read("msmt17", root)


@pytest.mark.parametrize("name", ["../../x_0_1.jpg", "/etc/x_0_1.jpg"])
def test_msmt17_list_does_not_lead_out(tmp_path, name):
    root = msmt17(tmp_path)
    (root / "list_train.txt").write_text(f"{name} 0\n")
    with pytest.raises(DataError, match=r"list_train\.txt, line 1"):
        read("msmt17", root)


def test_msmt17_missing_list_is_named(tmp_path):
    root = msmt17(tmp_path)
    (root / "list_gallery.txt").unlink()
    with pytest.raises(DataError, match=r"list_gallery\.txt does not exist"):
        read("msmt17", root)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_msmt17_lists_in_any_encoding(tmp_path, encoding, line_end):
    root = msmt17(tmp_path)
    expected = brief(read("msmt17", root))
    name = "0000/0000_000_01_0303café\u00a0x_0008_0.jpg"
    touch(root / "train", name)
    listing = root / "list_train.txt"
    lines = [*listing.read_text().splitlines(), f"./{name} 0", ""]
    listing.write_bytes(line_end.join(lines).encode(encoding))
    records = brief(read("msmt17", root))
    assert [r for r in records if r[0] != f"train/{name}"] == expected
    assert (f"train/{name}", 0, 1, "train") in records


def test_msmt17_missing_image_is_warned_of(tmp_path, caplog):
    root = msmt17(tmp_path)
    (root / "train/0000/0000_000_01_0303morning_0008_0.jpg").unlink()
    read("msmt17", root)
    assert "list_train.txt names 1 files that do not exist" in caplog.text


# Market-1501 and DukeMTMC-reID


def test_market1501_drops_junk_and_keeps_distractors(tmp_path):
    root = tmp_path / "Market-1501-v15.09.15"
    touch(root / "bounding_box_train", "0002_c1s1_000451_03.jpg", "Thumbs.db")
    touch(root / "bounding_box_train", "._0002_c1s1_000451_03.jpg", "._holiday.jpg", ".DS_Store")
    touch(root / "query", "0001_c6s1_001051_00.jpg")
    touch(root / "bounding_box_test", "-1_c1s1_000401_03.jpg", "0000_c2s1_000151_01.jpg")
    for place in (tmp_path, root):
        assert brief(read("market1501", place)) == [
            ("bounding_box_train/0002_c1s1_000451_03.jpg", 2, 1, "train"),
            ("query/0001_c6s1_001051_00.jpg", 1, 6, "query"),
            ("bounding_box_test/0000_c2s1_000151_01.jpg", 0, 2, "gallery"),
        ]


def test_dukemtmc_names_are_read(tmp_path):
    touch(tmp_path / "bounding_box_train", "0002_c1_f0044158.jpg")
    touch(tmp_path / "query", "0005_c2_f0046985.jpg")
    touch(tmp_path / "bounding_box_test", "7139_c8_f0091434.jpg")
    pids = [(r.pid, r.camid, r.split) for r in read("dukemtmc", tmp_path)]
    assert pids == [(2, 1, "train"), (5, 2, "query"), (7139, 8, "gallery")]


def test_market1501_strange_name_is_an_error(tmp_path):
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        touch(tmp_path / folder, "holiday.jpg")
    with pytest.raises(DataError, match=r"holiday\.jpg"):
        read("market1501", tmp_path)


@pytest.mark.parametrize(
    "name", ["msmt17", "market1501", "dukemtmc", "veri776", "cuhk03_labeled", "folders"]
)
@pytest.mark.parametrize("root", ["nowhere", "."])
def test_wrong_folder_is_an_error(tmp_path, name, root):
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        read(name, tmp_path / root)


# Counts


def test_published_counts():
    assert SOURCES["msmt17"].counts == Counts(32_621, 1_041, 11_659, 82_161, 15)
    assert SOURCES["market1501"].counts == Counts(12_936, 751, 3_368, 15_913, 6)
    assert SOURCES["veri776"].counts == Counts(37_778, 576, 1_678, 11_579, 20)
    assert SOURCES["cuhk03_labeled"].counts == Counts(7_368, 767, 1_400, 5_328, 2)
    assert SOURCES["cuhk03_detected"].counts == Counts(7_365, 767, 1_400, 5_332, 2)
    assert SOURCES["dukemtmc"].counts == Counts(16_522, 702, 2_228, 17_661, 8)


def test_short_copy_is_described(tmp_path):
    records = read("msmt17", msmt17(tmp_path))
    source = Source("MSMT17", SOURCES["msmt17"].read, Counts(3, 2, 1, 1, 4))
    assert difference(source, records, tmp_path) == (
        f"MSMT17: expected 3 train images, found 2 under {tmp_path}"
    )


@pytest.mark.parametrize("val", ["merge", "separate"])
def test_whole_copy_is_whole_wherever_val_goes(tmp_path, val):
    records = read("msmt17", msmt17(tmp_path), val=val)
    source = Source("MSMT17", SOURCES["msmt17"].read, Counts(2, 2, 1, 1, 4))
    assert difference(source, records, tmp_path) is None


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


# VeRi-776 and CUHK03


def test_veri776_names_are_read(tmp_path):
    root = tmp_path / "VeRi"
    touch(root / "image_train", "0001_c001_00016450_0.jpg")
    touch(root / "image_query", "0002_c002_00030600_0.jpg")
    touch(root / "image_test", "0002_c002_00030600_0.jpg", "0002_c003_00034605_0.jpg")
    for place in (tmp_path, root):
        assert brief(read("veri776", place)) == [
            ("image_train/0001_c001_00016450_0.jpg", 1, 1, "train"),
            ("image_query/0002_c002_00030600_0.jpg", 2, 2, "query"),
            ("image_test/0002_c002_00030600_0.jpg", 2, 2, "gallery"),
            ("image_test/0002_c003_00034605_0.jpg", 2, 3, "gallery"),
        ]


def test_cuhk03_is_read_from_the_archive_of_its_new_protocol(tmp_path):
    root = tmp_path / "cuhk03-np"
    for boxes in ("labeled", "detected"):
        touch(root / boxes / "bounding_box_train", f"0003_c1_{len(boxes)}.png")
        touch(root / boxes / "query", "0001_c1_1.png")
        touch(root / boxes / "bounding_box_test", "0001_c2_6.png", "Thumbs.db")
    for place in (tmp_path, root):
        assert brief(read("cuhk03_detected", place)) == [
            ("bounding_box_train/0003_c1_8.png", 3, 1, "train"),
            ("query/0001_c1_1.png", 1, 1, "query"),
            ("bounding_box_test/0001_c2_6.png", 1, 2, "gallery"),
        ]
    assert read("cuhk03_labeled", root)[0].relative == "bounding_box_train/0003_c1_7.png"


NAMES = ["1_003_1_01.png", "1_003_2_06.png", "1_001_1_02.png", "1_001_2_07.png"]


def unpacked(root: Path, *, mat: bool) -> Path:
    """CUHK03 as it is after unpacking, with the splits in one of two files."""
    touch(root / "images_labeled", *NAMES)
    if mat:
        columns = {"train_idx": [1, 2], "query_idx": [3], "gallery_idx": [4], "camId": [1, 2, 1, 2]}
        arrays = {name: np.array(values)[:, None] for name, values in columns.items()}
        arrays["labels"] = np.array([3, 3, 1, 1])[:, None]
        arrays["filelist"] = np.array(NAMES, object)[:, None]
        savemat(root / "cuhk03_new_protocol_config_labeled.mat", arrays)
    else:
        paths = [f"D:\\data\\images_labeled\\{NAMES[0]}", *(f"/home/x/{n}" for n in NAMES[1:])]
        rows = [[path, pid, 0] for path, pid in zip(paths, (3, 3, 1, 1), strict=True)]
        splits = {"train": rows[:2], "query": rows[2:3], "gallery": rows[3:], "num_train_pids": 1}
        (root / "splits_new_labeled.json").write_text(json.dumps([splits]))
    return root


@pytest.mark.parametrize("mat", [True, False])
def test_cuhk03_is_read_after_unpacking(tmp_path, mat):
    assert brief(read("cuhk03_labeled", unpacked(tmp_path, mat=mat))) == [
        ("images_labeled/1_003_1_01.png", 3, 1, "train"),
        ("images_labeled/1_003_2_06.png", 3, 2, "train"),
        ("images_labeled/1_001_1_02.png", 1, 1, "query"),
        ("images_labeled/1_001_2_07.png", 1, 2, "gallery"),
    ]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("cuhk03_new_protocol_config_labeled.mat", b""),
        ("cuhk03_new_protocol_config_labeled.mat", b"MATLAB 7.3 MAT-file" + bytes(200)),
        ("splits_new_labeled.json", b"[]"),
        ("splits_new_labeled.json", b"[{}]"),
        ("splits_new_labeled.json", b"{"),
    ],
)
def test_cuhk03_damaged_split_is_named(tmp_path, name, data):
    touch(tmp_path / "images_labeled", *NAMES)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=re.escape(name)):
        read("cuhk03_labeled", tmp_path)


def test_cuhk03_without_splits_names_what_is_missing(tmp_path):
    touch(tmp_path / "images_labeled", *NAMES)
    with pytest.raises(DataError, match=r"neither cuhk03_new_protocol_config_labeled\.mat nor"):
        read("cuhk03_labeled", tmp_path)


def test_cuhk03_that_is_not_unpacked_says_what_to_do(tmp_path):
    touch(tmp_path / "cuhk03_release", "cuhk-03.mat")
    with pytest.raises(DataError, match="has to be unpacked first"):
        read("cuhk03_labeled", tmp_path)


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
