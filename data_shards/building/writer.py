"""Images to WebDataset tars: the same images, the same bytes, on any machine.

A shard holds, for each image, its file as it was and a JSON member with what is known of it. Keys
are `<split>-<number>`, so that the stock `webdataset` reader pairs them.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath

from data_shards.building.scan import SurveyedImage
from data_shards.errors import DataError
from data_shards.manifest import ShardInfo, sha256
from data_shards.records import SPLITS
from data_shards.storage.atomic import disk_errors, file_sha256

_BLOCK = tarfile.BLOCKSIZE
_JSON_BYTES = 512  # a member's, nearly always; the plan needs no more than a good estimate


@dataclass(frozen=True, slots=True)
class ShardImage:
    """An image with its sample's key in the dataset, and its label (-1 outside train)."""

    image: SurveyedImage
    key: str
    label: int


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """What a shard is to hold, in order."""

    name: str
    split: str
    images: tuple[ShardImage, ...]


def plan_shards(images: Iterable[SurveyedImage], shard_bytes: int) -> list[ShardPlan]:
    """Deal images to shards: by split, then identity, then path.

    An identity's images are contiguous in one shard; only one that is larger than a shard is cut.

    Args:
        images: in any order.
        shard_bytes: bytes of a tar, roughly, and at most but for one image larger than that.
    """
    ordered = sorted(
        images, key=lambda i: (SPLITS.index(i.record.split), i.record.pid, i.record.relative)
    )
    pids = sorted({i.record.pid for i in ordered if i.record.split == "train"})
    label = {pid: n for n, pid in enumerate(pids)}
    plans = []
    for split, group in groupby(ordered, key=lambda image: image.record.split):
        members = [
            ShardImage(
                image, f"{split}-{n:08d}", label[image.record.pid] if split == "train" else -1
            )
            for n, image in enumerate(group)
        ]
        for n, shard in enumerate(_fill(members, shard_bytes)):
            plans.append(ShardPlan(f"shards/{split}-{n:06d}.tar", split, tuple(shard)))
    return plans


def write_shard(plan: ShardPlan, dataset: str, path: Path) -> tuple[ShardInfo, list[int]]:
    """Write one tar.

    Args:
        plan: what goes in.
        dataset: its name, for the JSON members.
        path: the file to write.

    Returns:
        What the manifest says of it, and each image's offset in it.

    Raises:
        DataError: an image is no longer what it was when it was surveyed.
        StorageError: the disk is full, or fails.
    """
    offsets = []
    with disk_errors(path), path.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for member in plan.images:
                data = _reread(member.image)
                offsets.append(file.tell() + _BLOCK)
                _add(tar, member.key + _extension(member.image.record.relative), data)
                _add(tar, member.key + ".json", describe(member, dataset))
        size = file.tell()
    info = ShardInfo(
        name=plan.name,
        split=plan.split,  # type: ignore[arg-type]
        images=len(plan.images),
        bytes=size,
        sha256=file_sha256(path),
    )
    return info, offsets


def describe(member: ShardImage, dataset: str) -> bytes:
    """The JSON member of an image."""
    record = member.image.record
    fields = {
        "dataset": dataset,
        "pid": record.pid,
        "label": member.label,
        "camid": record.camid,
        "split": record.split,
        "path": record.relative,
        "width": member.image.width,
        "height": member.image.height,
    }
    return json.dumps(fields, ensure_ascii=False).encode()


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
    return 2 * _BLOCK + -(-member.image.size // _BLOCK) * _BLOCK + _JSON_BYTES


def _extension(name: str) -> str:
    suffix = PurePosixPath(name).suffix.lower()
    plain = suffix.isascii() and suffix[1:].isalnum() and len(suffix) <= 8
    return suffix if plain and suffix != ".json" else ".image"


def _reread(image: SurveyedImage) -> bytes:
    path = image.record.path
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} changed during the build: {error.strerror}") from None
    if sha256(data) != image.sha256:
        raise DataError(f"{path} changed during the build: start it again")
    return data


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # its owner is no one, its time 1970: nothing of this machine
    member.size = len(data)
    member.mode = 0o444
    tar.addfile(member, io.BytesIO(data))
