"""Write images to WebDataset tars: the same images give the same bytes on any machine.

For each image, a shard holds the original file and a JSON member that describes it. Their keys are
`<split>-<number>`, so that the stock `webdataset` reader pairs them.
"""

import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from data_shards.building.scan import ScannedImage, for_each
from data_shards.errors import DataError, ObjectMissing
from data_shards.index import Index
from data_shards.index_file import COLUMNS
from data_shards.manifest import ShardInfo, sha256
from data_shards.records import SPLITS
from data_shards.storage.atomic import disk_errors, file_sha256

_BLOCK = tarfile.BLOCKSIZE
_JSON_BYTES = 512  # of nearly every JSON member; an estimate is enough for the plan


class SourceChanged(DataError):
    """An image is not what it was when it was scanned."""


@dataclass(frozen=True, slots=True)
class ShardImage:
    """An image with its key in the dataset and its training label (-1 outside train)."""

    image: ScannedImage
    key: str
    label: int


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The images of a shard, in order."""

    name: str
    split: str
    images: tuple[ShardImage, ...]


def plan_shards(
    images: Iterable[ScannedImage],
    shard_bytes: int,
    *,
    version: str = "",
    pids: Iterable[int] | None = None,
) -> list[ShardPlan]:
    """Assign images to shards of about `shard_bytes`: by split, then identity, then path.

    An identity's images are contiguous in one shard, unless they are larger than a shard. Only a
    single larger image makes a larger shard.

    Args:
        version: sets the names and keys of a later version apart.
        pids: all training identities of the dataset; by default those of the images.
    """
    ordered = sorted(
        images, key=lambda i: (SPLITS.index(i.record.split), i.record.pid, i.record.relative)
    )
    own = {i.record.pid for i in ordered if i.record.split == "train"}
    label = {pid: n for n, pid in enumerate(sorted(own if pids is None else pids))}
    below, infix = (f"shards/{version}", f"-{version}") if version else ("shards", "")
    plans = []
    for split, group in groupby(ordered, key=lambda image: image.record.split):
        labels = label if split == "train" else {}
        members = [
            ShardImage(image, f"{split}{infix}-{n:08d}", labels.get(image.record.pid, -1))
            for n, image in enumerate(group)
        ]
        for n, shard in enumerate(_fill(members, shard_bytes)):
            plans.append(ShardPlan(f"{below}/{split}-{n:06d}.tar", split, tuple(shard)))
    return plans


def write_shard(plan: ShardPlan, dataset: str, path: Path) -> tuple[ShardInfo, list[int]]:
    """Write one tar; return its entry in the manifest, and the offset of each image.

    It is a `SourceChanged` if an image has changed since it was scanned.
    """
    from webdataset.writer import TarWriter  # imports torch

    images, offsets, end = [member.image for member in plan.images], [], 0
    local = all(isinstance(image.record.path, Path) for image in images)
    same = {"user": "", "group": "", "mtime": 0}  # on every machine
    with disk_errors(path), path.open("wb") as file:
        with TarWriter(file, encoder=False, **same) as tar:
            for member, data in zip(
                plan.images, for_each(_reread, images, local=local), strict=True
            ):
                described = json.dumps(describe(dataset, member), ensure_ascii=False).encode()
                extension = _extension(member.image.record.relative)[1:]
                offsets.append(end + _BLOCK)
                # One by one, because the writer would sort them.
                for name, content in ((extension, data), ("json", described)):
                    tar.write({"__key__": member.key, name: content})
                    end += _BLOCK + _padded(len(content))
        size = file.tell()
    found = {"images": len(plan.images), "bytes": size, "sha256": file_sha256(path)}
    return ShardInfo.model_validate({"name": plan.name, "split": plan.split, **found}), offsets


def index_of(plans: Sequence[ShardPlan], offsets: Sequence[Sequence[int]]) -> Index:
    """The index of written shards; `offsets` has those of each shard's images."""
    rows = []
    for shard, (plan, places) in enumerate(zip(plans, offsets, strict=True)):
        for member, offset in zip(plan.images, places, strict=True):
            image, record = member.image, member.image.record
            where, who = (shard, offset, image.size), (record.pid, member.label, record.camid)
            rows.append((*where, *who, image.width, image.height, record.relative))
    return Index.from_columns(dict(zip(COLUMNS, zip(*rows, strict=True), strict=True)))


def describe(dataset: str, member: ShardImage) -> dict[str, Any]:
    """The content of an image's JSON member."""
    image, record = member.image, member.image.record
    who = {"pid": record.pid, "label": member.label, "camid": record.camid}
    where = {"split": record.split, "path": record.relative}
    return {"dataset": dataset, **who, **where, "width": image.width, "height": image.height}


def _fill(members: Sequence[ShardImage], shard_bytes: int) -> Iterator[list[ShardImage]]:
    shard, room = [], shard_bytes
    for _, group in groupby(members, key=lambda member: member.image.record.pid):
        identity = list(group)
        whole = sum(map(_tar_bytes, identity))
        if shard and whole > room:
            yield shard
            shard, room = [], shard_bytes
        for member in identity:
            if shard and _tar_bytes(member) > room:
                yield shard
                shard, room = [], shard_bytes
            shard.append(member)
            room -= _tar_bytes(member)
    if shard:
        yield shard


def _tar_bytes(member: ShardImage) -> int:
    return 2 * _BLOCK + _padded(member.image.size) + _JSON_BYTES


def _padded(size: int) -> int:
    """Bytes that a member of a tar takes after its header."""
    return -(-size // _BLOCK) * _BLOCK


def _extension(name: str) -> str:
    suffix = PurePosixPath(name).suffix.lower()
    plain = suffix.isascii() and suffix[1:].isalnum() and len(suffix) <= 8
    return suffix if plain and suffix != ".json" else ".image"


def _reread(image: ScannedImage) -> bytes:
    path = image.record.path
    try:
        data = path.read_bytes()
    except (ObjectMissing, FileNotFoundError):
        raise SourceChanged(f"{path} changed during the build (it is gone)") from None
    except OSError as error:
        raise DataError(f"{path} changed during the build: {error.strerror}") from None
    if image.sha256 and sha256(data) != image.sha256:
        raise SourceChanged(f"{path} changed during the build")
    return data
