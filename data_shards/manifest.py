"""The format of a sharded dataset: `manifest.json` and `index.parquet`.

The manifest lists every shard with its bytes and SHA-256, and counts its images. The index has one
row per image, so that any image can be read by offset without scanning a tar. Both are validated
in full when they are read: a `Manifest` or an `Index` that exists is valid.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

import numpy as np
import pydantic
from pydantic import AfterValidator, Field, JsonValue

from data_shards.errors import DataError
from data_shards.records import EVALUATED, NO_CAMERA, ImageRecord

MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.parquet"
VERSIONS = "versions/"  # the manifests of earlier versions


def _inside(name: str) -> str:
    """Refuse a name that could lead out of the dataset's folder."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is not a name inside the dataset")
    return name


Name = Annotated[str, AfterValidator(_inside)]
Count = Annotated[int, Field(ge=0, lt=1 << 62)]  # so that sums of several fit into 64 bits
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Split = Literal["train", "val", "query", "gallery", "validation_query", "validation_gallery"]


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)


class SplitInfo(_Model):
    """How many images, identities and cameras a split has."""

    images: Count
    identities: Count
    cameras: Count


class Names(_Model):
    """The names that pids and camids stand for, if the source had names and not numbers."""

    people: dict[Count, str] = {}
    cameras: dict[Count, str] = {}

    @classmethod
    def of(cls, records: Iterable[ImageRecord]) -> Self | None:
        """The names in some records; None if there are none."""
        named = [record for record in records if record.named]
        people = {r.pid: r.person for r in named if r.person}
        return cls.joined(
            [cls(people=people, cameras={r.camid: r.camera for r in named if r.camera})]
        )

    @classmethod
    def joined(cls, parts: Iterable[Self | None]) -> Self | None:
        """All names of several parts; None if there are none."""
        people, cameras = dict[int, str](), dict[int, str]()
        for part in parts:
            if part is not None:
                people |= part.people
                cameras |= part.cameras
        return cls(people=people, cameras=cameras) if people or cameras else None

    def number(self, what: Literal["person", "camera"], given: int | str) -> int:
        """The number that a name stands for. A number stands for itself.

        Raises:
            DataError: nobody, or more than one, has this name.
        """
        if str(given).isdecimal():
            return int(given)
        known = self.people if what == "person" else self.cameras
        found = [number for number, name in known.items() if name == given]
        if len(found) != 1:
            several = f"numbers {', '.join(map(str, found))} are" if found else f"no {what} is"
            hint = "a number"
            if what == "person" and known and not found:
                hint += f"; those up to {max(known)} belong to people with names"
            if what == "camera" and known:
                hint += f", or one of {', '.join(sorted(set(known.values())))}"[:200]
            raise DataError(f"{several} named {str(given)[:60]!r}: give {hint}")
        return found[0]

    def person(self, pid: int) -> str:
        """A person's name, or `pid 7`."""
        return self.people.get(pid) or f"pid {pid}"

    def camera(self, camid: int) -> str:
        """A camera's name, or `cam 2`; empty if the camera is not known."""
        return self.cameras.get(camid) or (f"cam {camid}" if camid < NO_CAMERA else "")

    def shifted(self, pid: int, camid: int) -> Self:
        """The names with larger pids and camids."""
        return type(self)(
            people={number + pid: name for number, name in self.people.items()},
            cameras={number + camid: name for number, name in self.cameras.items()},
        )

    def of_people(self, pids: np.ndarray) -> Self:
        """The names without people whose pid is not among these."""
        there = set(np.unique(pids).tolist())
        return self.model_copy(
            update={"people": {pid: name for pid, name in self.people.items() if pid in there}}
        )


class FileInfo(_Model):
    """A file of the dataset; `name` is its key under the dataset's URL."""

    name: Name
    bytes: Count
    sha256: Sha256


class Origin(_Model):
    """Where a shard's JSON members come from: another dataset, or an earlier version."""

    dataset: str  # its name, in those members
    pid: Count  # what the index adds to their pids
    camid: Count  # and to their camids; their labels are not used


class ShardInfo(FileInfo):
    """A tar of images of one split, such as `shards/train-000000.tar`."""

    split: Split
    images: Count
    origin: Origin | None = None  # None if its JSON members agree with the index

    @pydantic.model_serializer(mode="wrap")
    def _without_none(self, dump: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        # So that the digests of datasets without origins are what they always were.
        return {key: value for key, value in dump(self).items() if value is not None}


class LeftOut(_Model):
    """An image of the source that is in no shard, and the reason."""

    path: str
    reason: str


class Manifest(_Model):
    """What a sharded dataset consists of.

    `content` is a SHA-256 over all images and their labels: a build to a URL that already holds a
    dataset must have the same.
    """

    schema_version: Literal[1] = 1
    name: str  # also in each image's JSON member
    source: str  # the parser that read it, such as `msmt17`
    options: dict[str, JsonValue]  # of the parser, and `shard_bytes`
    complete: bool  # whether all published counts were met
    content: Sha256
    splits: dict[Split, SplitInfo]  # those that have images
    shards: Annotated[tuple[ShardInfo, ...], Field(min_length=1, strict=False)]
    index: FileInfo
    left_out: Annotated[tuple[LeftOut, ...], Field(strict=False)] = ()  # the user's choice
    names: Names | None = None

    @pydantic.model_serializer(mode="wrap")
    def _without_no_names(self, dump: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        # So that the digests of datasets without names are what they always were.
        return {k: v for k, v in dump(self).items() if k != "names" or v is not None}

    @pydantic.model_validator(mode="after")
    def _counts_agree(self) -> Self:
        names = Counter(shard.name for shard in self.shards)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"shard {twice[0]} is listed twice")
        images = Counter[str]()
        for shard in self.shards:
            images[shard.split] += shard.images
        if dict(images) != {split: info.images for split, info in self.splits.items()}:
            raise ValueError("the shards' images do not add up to the splits'")
        return self

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of everything in the manifest. It identifies the dataset."""
        return json_digest(self.model_dump(mode="json"))

    def dataset_of(self, shard: ShardInfo) -> str:
        """The name of the dataset that a shard's images come from."""
        return self.name if shard.origin is None else shard.origin.dataset

    @property
    def evaluation_digest(self) -> str:
        """SHA-256, in hex, of the query and gallery shards, which are all that a test sees.

        Datasets with different train images and the same test images share it.
        """
        return self._digest_of("test")

    @property
    def validation_digest(self) -> str:
        """SHA-256, in hex, of the shards of the validation split."""
        return self._digest_of("validation")

    def _digest_of(self, evaluated: str) -> str:
        seen = [s for s in self.shards if s.split in EVALUATED[evaluated]]
        return json_digest([[s.split, s.images, s.bytes, s.sha256] for s in seen])

    def to_json(self) -> bytes:
        """The bytes of `manifest.json`."""
        return (json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Read `manifest.json`; a `DataError` if it is not valid in every field."""
        try:
            return cls.model_validate_json(data)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the document"
            raise DataError(
                f"manifest.json is not valid: {where}: {first['msg']}. It was edited, or written by"
                " another version: build the dataset again"
            ) from None


def version_key(digest: str) -> str:
    """Where the manifest of an earlier version is."""
    return f"{VERSIONS}{digest[:16]}.json"


def sha256(data: bytes) -> str:
    """SHA-256 of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256, in hex, of a JSON value in its canonical form."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return sha256(canonical.encode())
