"""The pids and camids of what is added to a dataset, or removed from it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from data_shards.building.scan import ScannedImage
from data_shards.dataset import Dataset
from data_shards.errors import ConfigError, DataError
from data_shards.manifest import Manifest, Names, sha256
from data_shards.records import NO_CAMERA, ImageRecord


def next_number(numbers: np.ndarray) -> int:
    return int(numbers.max(initial=-1)) + 1


def pids_of(people: Sequence[int | str], versions: Sequence[Manifest], url: str) -> list[int]:
    """The pids of people who are given by pid or by name."""
    known = dict[str, set[int]]()
    for names in [manifest.names for manifest in versions if manifest.names is not None]:
        for pid, name in names.people.items():
            known.setdefault(name, set()).add(pid)
    pids = list[int]()
    for person in people:
        meant = known.get(str(person), set())
        if str(person).isdecimal():
            meant = meant | {int(person)}
        if not meant:
            raise DataError(f"{url} has nobody named {person}: nothing was changed")
        if len(meant) > 1:
            several = ", ".join(map(str, sorted(meant)))
            raise DataError(f"{person} may be pid {several} of {url}: give pids")
        pids += meant
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
    images: Sequence[ScannedImage], dataset: Dataset, ids: Literal["same", "new"]
) -> list[ScannedImage]:
    """Images to add, with the pids and camids that they get in the dataset.

    An image without a camera that is there already, byte for byte, keeps its camera's number.
    """
    index, known = dataset.whole, dataset.manifest.names or Names()
    unknown = index.camid >= NO_CAMERA
    free, free_camera = next_number(index.pid), next_number(index.camid & (NO_CAMERA - 1))
    pid, camid = (free, free_camera) if ids == "new" else (0, 0)
    more = camid or next_number(index.camid[unknown] - NO_CAMERA)
    person_number, camera_number = dict[str, int](), dict[str, int]()
    if ids == "same":
        people = {image.record.person for image in images} - {""}
        cameras = {image.record.camera for image in images} - {""}
        person_number = _numbers(people, known.people, free, "people")
        camera_number = _numbers(cameras, known.cameras, free_camera, "cameras")

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
