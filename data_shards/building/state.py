"""What an unfinished build leaves at its destination, and what it does with what it finds there.

`build/plan.json` says which dataset is being built; `build/<shard>.json` that a shard is finished.
All of it goes when the manifest is written.
"""

from __future__ import annotations

import json
import logging
from pathlib import PurePosixPath

from pydantic import BaseModel, ConfigDict, ValidationError

from data_shards.building.writer import ShardPlan
from data_shards.errors import DataError, ObjectExists, ObjectMissing
from data_shards.manifest import MANIFEST_NAME, Manifest, ShardInfo
from data_shards.storage import Storage

log = logging.getLogger(__name__)

FOLDER = "build/"
PLAN = FOLDER + "plan.json"


class ShardNote(BaseModel):
    """A finished shard: what the manifest will say, and each image's offset in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    info: ShardInfo
    offsets: tuple[int, ...]


def standing(storage: Storage, content: str) -> Manifest | None:
    """The finished dataset at the destination, if it is the one that would be built.

    Raises:
        DataError: a different one is there.
    """
    try:
        manifest = Manifest.from_json(storage.read(MANIFEST_NAME))
    except ObjectMissing:
        return None
    if manifest.content != content:
        raise DataError(
            f"{storage.url} holds another dataset ({manifest.name}, {_images(manifest)} images),"
            " or the same with other options; it stays as it is: choose another --out"
        )
    clean(storage)
    return manifest


def begin(storage: Storage, content: str) -> None:
    """Claim the destination for one dataset, or find it claimed for the same.

    Raises:
        DataError: it is claimed for another, or holds shards that no build accounts for.
    """
    plan = json.dumps({"content": content}).encode()
    try:
        found = storage.read(PLAN)
    except ObjectMissing:
        if next(iter(storage.list("shards/")), None) is not None:
            raise DataError(
                f"{storage.url}/shards holds something already; choose another --out, or empty it"
            ) from None
        storage.write(PLAN, plan, create_once=True)
        return
    if found != plan:
        raise DataError(
            f"an unfinished build of another dataset is at {storage.url}: choose another --out, or"
            " delete what is there"
        )
    log.info("going on with the build at %s", storage.url)


def read_note(storage: Storage, plan: ShardPlan) -> ShardNote | None:
    """The note of a shard, if an earlier try finished it and it is still there."""
    try:
        note = ShardNote.model_validate_json(storage.read(_note_key(plan.name)))
        whole = storage.size(plan.name) == note.info.bytes
    except (ObjectMissing, ValidationError):
        return None
    return note if whole and len(note.offsets) == len(plan.images) else None


def write_note(storage: Storage, note: ShardNote) -> None:
    """Note that a shard is finished."""
    storage.write(_note_key(note.info.name), note.model_dump_json().encode())


def write_once(storage: Storage, key: str, data: bytes) -> None:
    """Write what no one may replace; the same bytes, from an earlier try, are fine."""
    try:
        storage.write(key, data, create_once=True)
    except ObjectExists:
        if storage.read(key) != data:
            raise


def clean(storage: Storage) -> None:
    """Remove all notes, the plan last: without it, the rest would mean nothing."""
    keys = [key for key, _ in storage.list(FOLDER)]
    for key in sorted(keys, key=lambda key: key == PLAN):
        storage.delete(key)


def _note_key(shard: str) -> str:
    return f"{FOLDER}{PurePosixPath(shard).name}.json"


def _images(manifest: Manifest) -> str:
    return f"{sum(info.images for info in manifest.splits.values()):,}"
