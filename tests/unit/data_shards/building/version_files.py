"""Small datasets whose versions are compared."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from data_shards.dataset import Dataset
from data_shards.records import SPLITS
from data_shards.verify import verify

SMALL = {"shard_bytes": 6_000, "jobs": 1}
PEOPLE = {1: "train", 3: "train", 5: "train", 7: "test", 9: "test"}


def write_csv(
    folder: Path, pids: dict[int, str], *, first: int = 0, cameras: bool = True, seed: int = 0
) -> Path:
    """Three images of each person, who is in a split; one in three is a query."""
    folder.mkdir(exist_ok=True)
    lines = ["path,pid,camid,split"]
    for pid, split in pids.items():
        for n in range(first, first + 3):
            file, rng = io.BytesIO(), np.random.default_rng([seed, pid, n])
            Image.fromarray(rng.integers(0, 255, (20, 10, 3), np.uint8)).save(file, "JPEG")
            (folder / f"{pid}-{n}.jpg").write_bytes(file.getvalue())
            part = "train" if split == "train" else "query" if n == first else "gallery"
            lines.append(f"{pid}-{n}.jpg,{pid},{n % 2 if cameras else ''},{part}")
    (folder / "people.csv").write_text("\n".join(lines))
    return folder / "people.csv"


def images_of(dataset: Dataset) -> dict[tuple[str, int, int, str], bytes]:
    """Every image by its split, pid, camid and path."""
    found = {}
    for split in SPLITS:
        index = dataset.index(split)
        for row in range(len(index)):
            who = split, int(index.pid[row]), int(index.camid[row]), str(index.path[row])
            found[who] = dataset.read(index, row)
    return found


def is_whole(url: str) -> bool:
    return verify(url, decode_images=True, jobs=1)[1] == []
