"""Any images, in a folder for each identity; their cameras are not known.

Either `ROOT/train/ID/*.jpg`, `ROOT/query/ID/*.jpg` and `ROOT/gallery/ID/*.jpg`, or only
`ROOT/ID/*.jpg`, of which some identities are split off for the test.
"""

from collections.abc import Iterator
from pathlib import Path

from data_shards.errors import ConfigError, DataError
from data_shards.records import NO_CAMERA, SPLITS, ImageRecord
from data_shards.sources.layout import require_folder
from data_shards.sources.split import split_off

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
TEST = 0.25  # of the identities


def read(root: Path, *, test: float | None = None, seed: int = 0) -> list[ImageRecord]:
    """Read a tree of folders; the name of an image's folder is its identity.

    If all names are different integers, they are the pids; else the names are numbered in sorted
    order. Hidden files and files that are no images are skipped.

    Args:
        root: the folder that holds the splits, or the identities.
        test: the fraction of the identities to test on, if there are no folders for the splits.
        seed: another one chooses other identities for the test.
    """
    splits = [split for split in SPLITS if (require_folder(root) / split).is_dir()]
    if splits and test is not None:
        raise ConfigError(f"{root} has folders for {', '.join(splits)}: leave out --test")
    places = {split: root / split for split in splits} or {"train": root}
    found = [
        (split, person.name, path)
        for split, place in places.items()
        for person in _visible(place)
        if person.is_dir()
        for path in _visible(person)
        if path.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise DataError(
            f"no images under {root}: it must hold folders train, query and gallery with a folder "
            "for each identity in them, or only a folder for each identity"
        )
    pids = _pids({name for _, name, _ in found})
    records = [
        ImageRecord(path, path.relative_to(root).as_posix(), pids[name], NO_CAMERA, split)
        for split, name, path in found
    ]
    if splits:
        return records
    return split_off(records, "--test", TEST if test is None else test, seed, "test")


def _visible(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))


def _pids(names: set[str]) -> dict[str, int]:
    numbers = {name: int(name) for name in names if name.isascii() and name.isdecimal()}
    if len(set(numbers.values())) == len(names):
        return numbers
    return {name: number for number, name in enumerate(sorted(names))}
