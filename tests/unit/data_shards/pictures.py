"""Pictures of noise, and tables that list them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SMALL = {"shard_bytes": 12_000, "jobs": 1}


def picture(path: Path, seed: int, kind: str = "JPEG") -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (32, 16, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, kind)


def write_csv(root: Path, rows: list[tuple[str, int, int, str]]) -> Path:
    lines = ["path,pid,camid,split", *(",".join(map(str, row)) for row in rows)]
    (root / "list.csv").write_text("\n".join(lines))
    return root / "list.csv"


def people(root: Path, train: int = 6, test: int = 3) -> Path:
    """Four images of each person; a CSV lists them."""
    rows = []
    for pid in range(train + test):
        for n in range(4):
            split = "train" if pid < train else "query" if n == 0 else "gallery"
            rows.append((f"p{pid}/{n}.jpg", pid, n % 2, split))
            picture(root / rows[-1][0], 10 * pid + n)
    return write_csv(root, rows)


def tree(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
