"""Any images, in a folder for each identity; their cameras are not known.

Either `ROOT/train/ID/*.jpg`, `ROOT/query/ID/*.jpg` and `ROOT/gallery/ID/*.jpg`, or only
`ROOT/ID/*.jpg`, of which some identities are split off for the test.
"""

from collections.abc import Iterator

from data_shards.errors import ConfigError, DataError
from data_shards.records import NO_CAMERA, SPLITS, ImageRecord
from data_shards.sources.layout import require_folder
from data_shards.sources.split import split_off
from data_shards.storage.object_path import Place

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
TEST = 0.25  # of the identities


def read(root: Place, *, test: float | None = None, seed: int = 0) -> list[ImageRecord]:
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
    pids, named = _pids({name for _, name, _ in found})
    records = []
    for split, name, path in found:
        below = f"{split}/{name}" if splits else name
        who = pids[name], NO_CAMERA, split, name if named else ""
        records.append(ImageRecord(path, f"{below}/{path.name}", *who))
    if splits:
        return records
    return split_off(records, "--test", TEST if test is None else test, seed, "test")


def _visible(folder: Place) -> Iterator[Place]:
    return (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))


def _pids(names: set[str]) -> tuple[dict[str, int], bool]:
    """The pid of each name, and whether the names had to be numbered."""
    numbers = {name: int(name) for name in names if name.isascii() and name.isdecimal()}
    if len(set(numbers.values())) == len(names):
        return numbers, False
    return {name: number for number, name in enumerate(sorted(names))}, True
