"""Images and their labels in the tars of a WebDataset: local, on S3 or on a web server.

Each tar is streamed once, by one task, which decodes its images. When shards are written, images
are read again by their place in the tar. Tars are opened by `data_shards.storage`, and members are
taken as JSON or text: nothing here unpickles, or runs a command as `pipe:` URLs do elsewhere.
"""

import io
import json
import posixpath
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from data_shards.building.parallel import Cluster, parallel_map
from data_shards.building.scan import ScannedImage, scan_bytes
from data_shards.errors import ConfigError, DataError
from data_shards.manifest import LeftOut
from data_shards.progress import Progress, silent
from data_shards.records import NO_CAMERA, SPLITS, ImageRecord
from data_shards.sources.folders import SUFFIXES, TEST
from data_shards.sources.layout import numbered
from data_shards.sources.split import split_off
from data_shards.storage import open_file
from data_shards.storage.http import HttpFile
from data_shards.storage.object_path import ObjectPath, object_at

FIELDS = ("pid", "camid", "split", "image")
IMAGES = (*(suffix[1:] for suffix in SUFFIXES), "image")
STAGE = "scanning tars"
_BLOCK = tarfile.BLOCKSIZE
_READ = 8 << 20  # bytes of a request while a tar is streamed


@dataclass(frozen=True)
class _Sample:
    """An image, with its fields as text."""

    image: ScannedImage | LeftOut
    values: Mapping[str, str]


def read(
    root: str,
    *,
    fields: Sequence[str] = (),
    test: float | None = None,
    seed: int = 0,
    jobs: int = 1,
    cluster: Cluster | None = None,
    progress: Progress = silent,
) -> tuple[list[ScannedImage], list[LeftOut]]:
    """Stream all tars; return the readable and the unreadable images, both in order.

    Args:
        root: the tars, such as `s3://bucket/old-{000000..000123}.tar`.
        fields: where a sample has its `pid`, and if known its `camid` and `split`, as
            `pid=json.person` or `pid=cls`: a member, and a key in it if it is JSON. `image=jpg`
            chooses one of several images.
        test: the fraction of the identities to test on, if samples have no split.
        seed: another one chooses other identities for the test.
        jobs, progress, cluster: as in `parallel_map`.

    Raises:
        ConfigError: a field is not known, or a URL cannot be opened.
        DataError: a tar is cut short, a key is there twice, or a sample lacks a field.
    """
    import braceexpand  # as `webdataset` does

    where = _parse(fields)
    if "split" in where and test is not None:
        raise ConfigError("samples have a field for their split: leave out --test")
    urls = list(braceexpand.braceexpand(root))
    folders = [posixpath.dirname(url.partition("?")[0]) for url in urls]
    # Not `commonpath`, which makes s3:/bucket of s3://bucket.
    base = "/".join(posixpath.commonprefix([folder.split("/") for folder in folders]))
    names = [url.partition("?")[0].removeprefix(base).strip("/") for url in urls]
    scan, report = partial(_scan_tar, where), partial(progress, STAGE)
    tasks = list(zip(urls, names, strict=True))
    found = parallel_map(scan, tasks, jobs, [1] * len(urls), report, cluster)
    samples = [sample for of_tar in found for sample in of_tar]
    return _labelled(samples, where, test, seed)


def default_name(root: str) -> str:
    """The dataset's name: that of its tars, without braces and numbers."""
    name = posixpath.basename(root.partition("?")[0]).removesuffix(".tar")
    return re.sub(r"[-_.]*(\{.*|\d+)$", "", name)


def _labelled(
    samples: Sequence[_Sample], where: Mapping[str, str], test: float | None, seed: int
) -> tuple[list[ScannedImage], list[LeftOut]]:
    """Number the identities and cameras of all tars, and check the splits."""
    good = [(s.image, s.values) for s in samples if isinstance(s.image, ScannedImage)]
    left_out = [sample.image for sample in samples if isinstance(sample.image, LeftOut)]

    def numbers(field: str) -> tuple[list[int], bool]:
        values = [values[field] for _, values in good]
        return numbered(values, field, lambda i: f"sample {good[i][0].record.relative}")

    (pids, people), camids, cameras = numbers("pid"), [NO_CAMERA] * len(good), False
    if "camid" in where and any(values["camid"] for _, values in good):
        camids, cameras = numbers("camid")
    records = []
    for (image, values), pid, camid in zip(good, pids, camids, strict=True):
        split = values.get("split", "train")
        if split not in SPLITS:
            raise DataError(
                f"sample {image.record.relative}: split {split!r} is none of {', '.join(SPLITS)}"
            )
        known = {"pid": pid, "camid": camid, "split": split}
        known |= {"person": values["pid"]} if people else {}
        known |= {"camera": values["camid"]} if cameras else {}
        records.append(replace(image.record, **known))
    if "split" not in where:
        records = split_off(records, "--test", TEST if test is None else test, seed, "test")
    pairs = zip(good, records, strict=True)
    return [replace(image, record=record) for (image, _), record in pairs], left_out


def _parse(fields: Sequence[str]) -> dict[str, str]:
    found = dict[str, str]()
    for field in fields:
        name, _, place = field.partition("=")
        if name not in FIELDS or not place:
            raise ConfigError(
                f"--fields {field}: write NAME=MEMBER or NAME=json.KEY; the names are"
                f" {', '.join(FIELDS)}"
            )
        found[name] = place
    if "pid" not in found:
        raise ConfigError("a WebDataset needs --fields pid=…, such as pid=json.person or pid=cls")
    return found


def _open(url: str) -> ObjectPath:
    if url.startswith(("http://", "https://")):
        return ObjectPath(HttpFile(url))
    if url.startswith("s3://"):
        return object_at(url)
    storage, key = open_file(url)
    return ObjectPath(storage, key)


def _scan_tar(where: Mapping[str, str], task: tuple[str, str]) -> list[_Sample]:
    """Decode all images of a tar, one at a time."""
    from webdataset.tariterators import group_by_keys  # imports torch

    url, name = task
    path, samples = _open(url), list[_Sample]()
    try:
        for sample in group_by_keys(_members(path, where)):
            samples.append(_scan_sample(path, name, sample, where))
    except ValueError as error:  # two members of a sample have one name
        raise DataError(f"{path}: {error.args[0]}") from None
    except tarfile.TarError as error:
        raise DataError(f"{path} is cut short, compressed, or not a tar: {error}") from None
    return samples


def _scan_sample(
    path: ObjectPath, tar: str, sample: Mapping[str, Any], where: Mapping[str, str]
) -> _Sample:
    key = sample["__key__"]
    members = {name: value for name, value in sample.items() if not name.startswith("__")}
    images = [where["image"]] if "image" in where else [m for m in members if m in IMAGES]
    if len(images) != 1 or images[0] not in members:
        asked = f" {where['image']}" if "image" in where else ""
        several = len(images) > 1
        what = f"the images {', '.join(images)}: choose with --fields image=…"
        raise DataError(
            f"{path}: sample {key} has {what if several else f'no image{asked}'};"
            f" its members are {', '.join(members)}"
        )
    data, offset = members[images[0]]
    place = ObjectPath(path.storage, path.key, (offset, len(data)))
    record = ImageRecord(place, f"{tar}/{key}.{images[0]}", 0, 0, "train")
    values = {f: _value(members, p) for f, p in where.items() if f != "image"}
    for field, value in values.items():
        if value is None:
            raise DataError(
                f"{path}: sample {key} has no {where[field]} (--fields {field}={where[field]});"
                f" its members are {', '.join(members)}"
            )
    return _Sample(
        scan_bytes(record, data), {field: value or "" for field, value in values.items()}
    )


def _value(members: Mapping[str, tuple[bytes, int]], place: str) -> str | None:
    """A field of a sample as text; None if it is missing."""
    parts = place.split(".")
    for end in range(len(parts), 0, -1):
        member = members.get(".".join(parts[:end]))
        if member is None:
            continue
        try:
            value: Any = member[0].decode()
            if end < len(parts):
                value = json.loads(value)
                for part in parts[end:]:
                    value = value[part]
        except (ValueError, KeyError, TypeError, IndexError):
            return None
        if value is None:
            return ""
        return str(value).strip() if isinstance(value, str | int) else None
    return None


def _members(path: ObjectPath, where: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the members of a tar as `webdataset` groups them; data is bytes and their offset.

    Only images and members that hold a field are read.
    """
    size, end = path.storage.size(path.key), 0
    stream = io.BufferedReader(_Stream(path, size), _READ)
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for info in tar:
            file = tar.extractfile(info) if info.isreg() else None
            extension = posixpath.basename(info.name).partition(".")[2].lower()
            wanted = any(
                place == extension or place.startswith(f"{extension}.") for place in where.values()
            )
            read = file is not None and (wanted or extension in IMAGES)
            if file is not None:
                data = file.read() if read else b""
                yield {"fname": info.name, "data": (data, info.offset_data), "__url__": str(path)}
            end = (
                info.offset_data + -(-info.size // 512) * 512 if info.isreg() else info.offset_data
            )
            # Else it keeps all of them; `webdataset` does the same.
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
    # `tarfile` takes a damaged header for the end.
    if size - end < _BLOCK or any(path.storage.read_range(path.key, end, _BLOCK)):
        raise DataError(f"{path} is cut short or damaged at byte {end:,} of {size:,}")


class _Stream(io.RawIOBase):
    """An object as a file that is read from its start to its end."""

    def __init__(self, path: ObjectPath, size: int) -> None:
        self._path, self._size, self._position = path, size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self._size - self._position)
        if count > 0:
            where = (self._path.key, self._position, count)
            buffer[:count] = self._path.storage.read_range(*where)
            self._position += count
        return count
