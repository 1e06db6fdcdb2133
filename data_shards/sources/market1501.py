"""Datasets of three folders with pid and camid in each file's name.

Names of Market-1501 are like `0002_c1s1_000451_03.jpg`, of DukeMTMC-reID like
`0002_c1_f0044158.jpg`, of VeRi-776, whose identities are vehicles, like `0002_c002_00030600_0.jpg`.
The authors of DukeMTMC-reID have withdrawn it, so only an existing copy can be read.
"""

import re
from collections.abc import Mapping
from functools import partial

from data_shards.errors import DataError
from data_shards.records import ImageRecord
from data_shards.sources.layout import Counts, Source, is_of_macos, require_folder
from data_shards.storage.object_path import Place

FOLDERS = {"bounding_box_train": "train", "query": "query", "bounding_box_test": "gallery"}


def read_folders(
    title: str, below: str, folders: Mapping[str, str], pattern: str, root: Place
) -> list[ImageRecord]:
    """Read a dataset; drop images of pid -1 (false detections), keep pid 0 (distractors).

    Args:
        title: the dataset, for messages.
        below: the name of the folder that holds the three in the dataset's archive.
        folders: the split of each of the three.
        pattern: matches a file name; its groups are pid and camid.
        root: that folder, or its parent.
    """
    candidates = (require_folder(root), root / below)
    base = next((c for c in candidates if all((c / f).is_dir() for f in folders)), None)
    if base is None:
        raise DataError(f"{title}: no folders {', '.join(folders)} under {root} or {root / below}")
    records = []
    for folder, split in folders.items():
        for path in sorted((base / folder).iterdir()):
            if path.suffix.lower() not in (".jpg", ".jpeg", ".png") or is_of_macos(path.name):
                continue  # Thumbs.db and the like
            match = re.match(pattern, path.name)
            if match is None:
                raise DataError(f"{title}: the name of {path} has no identity and camera")
            pid, camid = int(match[1]), int(match[2])
            if pid >= 0:
                records.append(ImageRecord(path, f"{folder}/{path.name}", pid, camid, split))
    return records


# The gallery has 19,732 files: 3,819 of pid -1 are dropped, 2,798 of pid 0 are distractors.
MARKET1501 = Source(
    "Market-1501",
    partial(read_folders, "Market-1501", "Market-1501-v15.09.15", FOLDERS, r"(-1|\d+)_c(\d+)s\d+_"),
    Counts(12_936, 751, 3_368, 15_913, 6),
)
DUKEMTMC = Source(
    "DukeMTMC-reID",
    partial(read_folders, "DukeMTMC-reID", "DukeMTMC-reID", FOLDERS, r"(-1|\d+)_c(\d+)_"),
    Counts(16_522, 702, 2_228, 17_661, 8),
)
VERI_FOLDERS = {"image_train": "train", "image_query": "query", "image_test": "gallery"}
VERI776 = Source(
    "VeRi-776",
    partial(read_folders, "VeRi-776", "VeRi", VERI_FOLDERS, r"(\d+)_c(\d+)_"),
    Counts(37_778, 576, 1_678, 11_579, 20),
)
