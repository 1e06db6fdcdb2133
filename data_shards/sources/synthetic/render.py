"""Procedural people before several cameras: a dataset for demos and tests, downloaded by no one.

They are rendered to disk in MSMT17's own layout and read back by its parser.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from data_shards.errors import ConfigError
from data_shards.records import ImageRecord
from data_shards.sources import msmt17
from data_shards.sources.synthetic.people import draw_appearance
from data_shards.sources.synthetic.scenes import install_camera, photograph
from data_shards.storage.atomic import disk_errors

VERSION = 1  # of the drawings; another one renders anew
VAL_SHARE = 8  # every so many-th training image goes to list_val.txt


def read(
    root: Path,
    *,
    identities: int = 64,
    cameras: int = 4,
    images_per_camera: int = 6,
    seed: int = 0,
) -> list[ImageRecord]:
    """Render the people, unless they are there from an earlier time, and read them.

    The first half of them are for training. Of the rest, each camera's first picture is a query
    and the others are the gallery.

    Args:
        root: a folder of its own for renderings; one folder for each choice of options is made
            inside.
        identities: people, at least 4.
        cameras: at least 2, each of which sees everyone.
        images_per_camera: of each person, at least 2.
        seed: of everything.
    """
    if identities < 4 or cameras < 2 or images_per_camera < 2 or seed < 0:
        raise ConfigError(
            "synthetic people need at least 4 identities, 2 cameras, 2 images per camera and a seed"
            f" from 0 up, not {identities}, {cameras}, {images_per_camera} and {seed}"
        )
    name = f"v{VERSION}-{identities}x{cameras}x{images_per_camera}-seed{seed}"
    folder = root / name
    if not folder.is_dir():
        with disk_errors(folder):
            _render_whole(folder, identities, cameras, images_per_camera, seed)
    return msmt17.read(folder)


def _render_whole(folder: Path, identities: int, cameras: int, images: int, seed: int) -> None:
    """Render beside `folder` and then move there, so that what is there is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".rendering-", dir=folder.parent))
    try:
        _render(temporary, identities, cameras, images, seed)
        temporary.chmod(0o755)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same pictures
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _render(folder: Path, identities: int, cameras: int, images: int, seed: int) -> None:
    lenses = [install_camera(seed, number) for number in range(cameras)]
    training = identities // 2
    lists: dict[str, list[str]] = {"train": [], "val": [], "query": [], "gallery": []}
    for person in range(identities):
        who = draw_appearance(np.random.default_rng([seed, 0, person]))
        test = person >= training
        pid = person - training if test else person
        place = folder / ("test" if test else "train") / f"{pid:04d}"
        place.mkdir(parents=True)
        for number in range(cameras * images):
            camera, shot = divmod(number, images)
            rng = np.random.default_rng([seed, 2, person, camera, shot])
            name = f"{pid:04d}_{number:03d}_{camera + 1:02d}_0303morning_{shot:04d}_0.jpg"
            (place / name).write_bytes(photograph(lenses[camera], who, rng))
            if test:
                split = "query" if shot == 0 else "gallery"
            else:
                split = "val" if number % VAL_SHARE == VAL_SHARE - 1 else "train"
            lists[split].append(f"{pid:04d}/{name} {pid}\n")
    for split, lines in lists.items():
        (folder / f"list_{split}.txt").write_text("".join(lines))
