"""The pids and camids of what is added to a dataset, or removed from it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from data_shards.building.scan import ScannedImage, for_each
from data_shards.dataset import Dataset
from data_shards.errors import ConfigError, DataError
from data_shards.index import Index, split_of_rows
from data_shards.manifest import Manifest, Names, sha256
from data_shards.records import NO_CAMERA, SPLITS, ImageRecord
from data_shards.storage import LocalStorage

LEAST = ("least_pid", "least_camid")
"""Options of a manifest: the first numbers that nobody had in any version when it was made."""


def _next(numbers: np.ndarray) -> int:
    return int(numbers.max(initial=-1)) + 1


def next_numbers(manifest: Manifest, indices: Iterable[Index]) -> tuple[int, int]:
    """The first pid and camid that are not in these indices, and were not in earlier versions.

    The number of a person who was removed stays theirs, because old versions and reports have it.
    """
    pid, camid = (manifest.options.get(name, 0) for name in LEAST)
    assert isinstance(pid, int)
    assert isinstance(camid, int)
    # A camera keeps its name and number while it has no images.
    camid = max(camid, *(number + 1 for number in (manifest.names or Names()).cameras), 0)
    for index in indices:
        pid = max(pid, _next(index.pid))
        camid = max(camid, _next(index.camid & (NO_CAMERA - 1)))
    return pid, camid


def pids_of(people: Sequence[int | str], versions: Sequence[Manifest], url: str) -> list[list[int]]:
    """The pids, in each version, of people who are given by pid or by name.

    A name counts only in the versions that have it: another person may have the pid in others.
    """
    known = [(manifest.names or Names()).people for manifest in versions]
    pids = [list[int]() for _ in versions]
    for person in people:
        number = {int(person)} if str(person).isdecimal() else set[int]()
        named = [{pid for pid, name in of.items() if name == str(person)} for of in known]
        meant = number.union(*named)
        if not meant:
            raise DataError(f"{url} has nobody named {person}: nothing was changed")
        if len(meant) > 1:
            several = ", ".join(map(str, sorted(meant)))
            raise DataError(f"{person} may be pid {several} of {url}: give pids")
        for of_version, there in zip(pids, named, strict=True):
            of_version += number | there
    return pids


def _numbers(names: set[str], known: Mapping[int, str], free: int, what: str) -> dict[str, int]:
    """The number of each name: the dataset's, or the next free one."""
    if not names:
        return {}
    if not known:
        raise ConfigError(
            f"these images have names of {what}, and the dataset has numbers: give its numbers, or"
            " --ids new if all of them are other people"
        )
    times = Counter(known.values())
    if twice := sorted(name for name in names if times[name] > 1):
        raise ConfigError(
            f"several {what} of the dataset are named {twice[0]}: give numbers, or --ids new if all"
            " of these are other people"
        )
    number = {name: n for n, name in known.items()}
    return number | {name: free + n for n, name in enumerate(sorted(names - number.keys()))}


def renumbered(
    images: Sequence[ScannedImage],
    dataset: Dataset,
    ids: Literal["same", "new"],
    free: tuple[int, int],
) -> list[ScannedImage]:
    """Images to add, with the pids and camids that they get in the dataset; `free` has the next.

    An image without a camera that is there already, byte for byte, keeps its camera's number.
    """
    index, known = dataset.whole, dataset.manifest.names or Names()
    unknown = index.camid >= NO_CAMERA
    pid, camid = free if ids == "new" else (0, 0)
    more = camid or _next(index.camid[unknown] - NO_CAMERA)
    person_number, camera_number = dict[str, int](), dict[str, int]()
    if ids == "same":
        people = {image.record.person for image in images} - {""}
        cameras = {image.record.camera for image in images} - {""}
        person_number = _numbers(people, known.people, free[0], "people")
        camera_number = _numbers(cameras, known.cameras, free[1], "cameras")

    def person(record: ImageRecord) -> int:
        return person_number.get(record.person, record.pid + pid)

    same = dict[tuple[int, int], list[int]]()
    if ids == "same":
        for row in np.flatnonzero(unknown & np.isin(index.pid, [person(i.record) for i in images])):
            same.setdefault((int(index.pid[row]), int(index.size[row])), []).append(int(row))

    def camera(image: ScannedImage) -> int:
        record = image.record
        if record.camid < NO_CAMERA:
            return camera_number.get(record.camera, record.camid + camid)
        for row in same.get((person(record), image.size), ()):
            if sha256(dataset.read(index, row)) == image.sha256:
                return int(index.camid[row])
        return record.camid + more

    return [
        replace(i, record=replace(i.record, pid=person(i.record), camid=camera(i))) for i in images
    ]


def not_in(dataset: Dataset, images: Sequence[ScannedImage]) -> list[ScannedImage]:
    """The images that a dataset does not have yet, by split, pid, camid, path and bytes."""
    index, rows = dataset.whole, dict[tuple[str, int, int, str], list[int]]()
    split = split_of_rows(index, dataset.manifest.shards)
    for row in np.flatnonzero(np.isin(index.pid, [image.record.pid for image in images])).tolist():
        who = int(index.pid[row]), int(index.camid[row])
        rows.setdefault((SPLITS[split[row]], *who, str(index.path[row])), []).append(row)

    def is_there(image: ScannedImage) -> bool:
        record = image.record
        same = rows.get((record.split, record.pid, record.camid, record.relative), ())
        return any(sha256(dataset.read(index, row)) == image.sha256 for row in same)

    there = for_each(is_there, images, local=isinstance(dataset.storage, LocalStorage))
    return [image for image, found in zip(images, there, strict=True) if not found]
