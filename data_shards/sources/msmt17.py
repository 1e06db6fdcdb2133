"""MSMT17, V1 and V2: four lists of `0000/0000_000_01_0303morning_0008_0.jpg 0`.

A line is a path and an identity; the camera is the third field of the file's name. Identities
start at 0 in both train and test, and are different people there.
"""

import logging
from typing import Literal

from data_shards.errors import DataError
from data_shards.records import ImageRecord
from data_shards.sources.layout import Counts, is_of_macos, normalized, require_folder
from data_shards.storage.object_path import Place

log = logging.getLogger(__name__)

COUNTS = Counts(32_621, 1_041, 11_659, 82_161, 15)

_FOLDERS = (("train", "test"), ("mask_train_v2", "mask_test_v2"))  # V1, V2


def read(root: Place, *, val: Literal["merge", "separate"] = "merge") -> list[ImageRecord]:
    """Read MSMT17 from its unpacked archive; skip listed images that do not exist, with a warning.

    Args:
        root: the folder that holds `list_train.txt`, or its parent.
        val: whether the images of `list_val.txt`, which are of training identities, become part of
            `train`, as in the published numbers, or of a split `val`.
    """
    base, train, test = _find(root)
    records = []
    for split, folder in {"train": train, "val": train, "query": test, "gallery": test}.items():
        listing = base / f"list_{split}.txt"
        if split == "val" and not listing.is_file():
            continue
        into = "train" if split == "val" and val == "merge" else split
        records += _read_list(listing, base, folder, into)
    return records


def _find(root: Place) -> tuple[Place, str, str]:
    found = [
        (base, train, test)
        for base in (require_folder(root), root / "MSMT17_V1", root / "MSMT17_V2")
        for train, test in _FOLDERS
        if (base / train).is_dir() and (base / test).is_dir()
    ]
    if not found:
        raise DataError(
            f"MSMT17: no folders train and test (V1), or mask_train_v2 and mask_test_v2 (V2),"
            f" under {root}, {root / 'MSMT17_V1'} or {root / 'MSMT17_V2'}"
        )
    if len(found) > 1:
        places = " and ".join(str(base / train) for base, train, _ in found)
        raise DataError(f"MSMT17: both {places} exist: give the folder of one version with --root")
    return found[0]


def _read_list(listing: Place, base: Place, folder: str, split: str) -> list[ImageRecord]:
    if not listing.is_file():
        raise DataError(f"MSMT17: {listing} does not exist: is the archive complete?")
    records, missing, data = [], [], listing.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip(" \t\r")
        name, _, pid = line.rpartition(" ")
        if not line or is_of_macos(name):
            continue
        where = f"{listing}, line {number}"
        fields = name.rpartition("/")[2].split("_")
        if not (pid.isascii() and pid.isdecimal()) or len(fields) < 3 or not fields[2].isdecimal():
            raise DataError(f"{where}: {line!r} is not a path with a camera, and an identity")
        name = normalized(base / folder, name.strip(" \t"), where)
        path = base / folder / name
        record = ImageRecord(path, f"{folder}/{name}", int(pid), int(fields[2]), split)
        (records if path.is_file() else missing).append(record)
    if missing:
        some = missing[0].path
        log.warning("%s names %d files that do not exist, such as %s", listing, len(missing), some)
    return records
