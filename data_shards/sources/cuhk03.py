"""CUHK03 in its new protocol (Zhong et al., CVPR 2017): 767 people to train on, 700 to test on.

The people were cut out by hand ("labeled") or by a detector ("detected"). Either is found as

- `labeled/bounding_box_train` and so on, with names like `0001_c1_5.png` (the archive CUHK03-NP);
- `images_labeled`, with names like `1_001_1_01.png`, as programs unpack `cuhk-03.mat`. The splits
  are in `cuhk03_new_protocol_config_labeled.mat` or in `splits_new_labeled.json` beside it.
"""

import io
import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from data_shards.errors import DataError
from data_shards.records import ImageRecord
from data_shards.sources.layout import Counts, Source, require_folder
from data_shards.sources.market1501 import FOLDERS, read_folders
from data_shards.storage.object_path import Place

_SPLITS = ("train", "query", "gallery")


def _read(boxes: str, root: Place) -> list[ImageRecord]:
    title = f"CUHK03 ({boxes})"
    bases = [require_folder(root), *(root / name for name in ("cuhk03", "cuhk03-np", "CUHK03-NP"))]
    for base in bases:
        if (base / boxes / "bounding_box_train").is_dir():
            return read_folders(title, boxes, FOLDERS, r"(\d+)_c(\d+)_", base)
        images = base / f"images_{boxes}"
        if images.is_dir():
            return list(_records(title, images, _entries(title, base, boxes)))
    found = f"{title}: no folders {boxes}/bounding_box_train or images_{boxes} under {root}"
    packed = [base / place / "cuhk-03.mat" for base in bases for place in ("", "cuhk03_release")]
    if any(path.is_file() for path in packed):
        found += (
            "; cuhk-03.mat has to be unpacked first: Torchreid does that when it loads cuhk03. Or "
            "take the archive CUHK03-NP, which has the images as files"
        )
    raise DataError(found)


def _records(
    title: str, images: Place, entries: Iterator[tuple[str, str, int]]
) -> Iterator[ImageRecord]:
    """The records of (split, file name, pid); the camera is the third field of a name."""
    for split, name, pid in entries:
        match = re.fullmatch(r"\d+_\d+_(\d+)_\d+\.(png|jpg)", name)
        if match is None:
            raise DataError(f"{title}: {name!r} is not a name like 1_001_1_01.png")
        path = images / name
        yield ImageRecord(path, f"{images.name}/{name}", pid, int(match[1]), split)


def _entries(title: str, base: Place, boxes: str) -> Iterator[tuple[str, str, int]]:
    config = base / f"cuhk03_new_protocol_config_{boxes}.mat"
    listing = base / f"splits_new_{boxes}.json"
    if not config.is_file() and not listing.is_file():
        raise DataError(f"{title}: {base} has neither {config.name} nor {listing.name}")
    file = config if config.is_file() else listing
    try:
        yield from _of_mat(config) if file == config else _of_json(listing)
    except Exception as error:  # SciPy's have no common base
        raise DataError(f"{file} is not a split of {title}: {error}") from None


def _of_mat(path: Place) -> Iterator[tuple[str, str, int]]:
    from scipy.io import loadmat

    config: dict[str, Any] = loadmat(io.BytesIO(path.read_bytes()))
    names, labels = config["filelist"].ravel(), config["labels"].ravel()
    for split in _SPLITS:
        for row in config[f"{split}_idx"].ravel() - 1:  # it counts from 1
            yield split, str(names[row].item()), int(labels[row])


def _of_json(path: Place) -> Iterator[tuple[str, str, int]]:
    (splits,) = json.loads(path.read_text())
    for split in _SPLITS:
        for name, pid, *_ in splits[split]:  # the folder is that of the machine that wrote it
            yield split, re.split(r"[/\\]", name)[-1], int(pid)


LABELED = Source("CUHK03 (labeled)", partial(_read, "labeled"), Counts(7_368, 767, 1_400, 5_328, 2))
DETECTED = Source(
    "CUHK03 (detected)", partial(_read, "detected"), Counts(7_365, 767, 1_400, 5_332, 2)
)
