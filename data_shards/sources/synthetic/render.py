"""Drawn people before several cameras: a dataset for demos and tests without a download.

They are rendered to a folder with a CSV file, as a user's own images would be.
"""

import itertools
import os
import tempfile
from pathlib import Path

import numpy as np

from data_shards.errors import ConfigError
from data_shards.records import ImageRecord
from data_shards.sources import csv
from data_shards.storage.atomic import disk_errors
from data_shards.storage.object_path import Place

VERSION = 2  # of the drawings; another version is rendered anew


def read(
    root: Place,
    *,
    identities: int = 64,
    cameras: int = 4,
    images_per_camera: int = 6,
    seed: int = 0,
) -> list[ImageRecord]:
    """Render the people, unless an earlier call did, and read them.

    The first half of them are for training. Of the rest, each camera's first picture is a query
    and the others are the gallery. Each choice of options has its own folder inside `root`.
    """
    if identities < 4 or cameras < 2 or images_per_camera < 2 or seed < 0:
        raise ConfigError(
            "synthetic people need at least 4 identities, 2 cameras, 2 images per camera and a seed"
            f" from 0 up, not {identities}, {cameras}, {images_per_camera} and {seed}"
        )
    if not isinstance(root, Path):
        raise ConfigError(f"synthetic people are drawn into a local folder, not {root}")
    folder = root / f"v{VERSION}-{identities}x{cameras}x{images_per_camera}-seed{seed}"
    if not folder.is_dir():
        with disk_errors(folder):
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root, ignore_cleanup_errors=True) as temporary:
                whole = Path(temporary, folder.name)  # moved when it is complete
                _render(whole, identities, cameras, images_per_camera, seed)
                try:
                    os.rename(whole, folder)
                except OSError:
                    if not folder.is_dir():  # else another process was faster
                        raise
    return csv.read(folder / "people.csv")


def _render(folder: Path, identities: int, cameras: int, images: int, seed: int) -> None:
    from data_shards.sources.synthetic.cameras import Camera, Person  # imports OpenCV

    folder.mkdir()
    lenses = [Camera(seed, number) for number in range(cameras)]
    lines = [",".join(csv.COLUMNS)]
    for pid in range(identities):
        who = Person(np.random.default_rng([seed, 0, pid]))
        for camera, shot in itertools.product(range(cameras), range(images)):
            rng = np.random.default_rng([seed, 2, pid, camera, shot])
            name = f"{pid:04d}_c{camera}_{shot:03d}.jpg"
            (folder / name).write_bytes(lenses[camera].photograph(who, rng))
            split = "train" if pid < identities // 2 else "gallery" if shot else "query"
            lines.append(f"{name},{pid},{camera},{split}")
    (folder / "people.csv").write_text("\n".join(lines) + "\n")
