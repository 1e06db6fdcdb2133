"""The public datasets, as they are on disk."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from scipy.io import savemat
from source_files import brief, read, touch

from data_shards.cli import SourceName
from data_shards.errors import DataError
from data_shards.sources import SOURCES
from data_shards.sources.layout import Counts, Source, count, difference

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


def test_command_line_takes_every_source():
    assert list(get_args(SourceName)) == list(SOURCES)


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
