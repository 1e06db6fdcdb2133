"""What a build finds at its destination, and the notes that let an interrupted build resume.

`build/plan.json` says which dataset is being built; `build/<shard>.json` says that a shard is
finished. All of them are removed when the manifest is written.
"""

import contextlib
import json
import logging
from pathlib import PurePosixPath

from pydantic import BaseModel, ConfigDict, ValidationError

from data_shards.building.writer import ShardPlan
from data_shards.errors import DataError, ObjectExists, ObjectMissing
from data_shards.manifest import INDEX_NAME, MANIFEST_NAME, Manifest, ShardInfo
from data_shards.storage import Storage

log = logging.getLogger(__name__)

FOLDER = "build/"
PLAN = FOLDER + "plan.json"


class ShardNote(BaseModel):
    """A finished shard: its entry in the manifest, and the offset of each image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    info: ShardInfo
    offsets: tuple[int, ...]


def find_finished(storage: Storage, content: str) -> Manifest | None:
    """The manifest at the destination, if there is one; a `DataError` if of another dataset."""
    try:
        manifest = Manifest.from_json(storage.read(MANIFEST_NAME))
    except ObjectMissing:
        return None
    if manifest.content != content:
        images = sum(info.images for info in manifest.splits.values())
        raise DataError(
            f"{storage.url} holds another dataset ({manifest.name}, {images:,} images), or the same"
            " one with another --name or other options; it was not changed: choose another --out"
        )
    remove_notes(storage, content)
    return manifest


def claim(storage: Storage, content: str, *, empty: bool = True) -> None:
    """Reserve the destination, or resume; a `DataError` if it holds another or unknown build.

    Unless it should be `empty`, it holds a dataset of which a new version is made.
    """
    plan = _plan(content)
    try:
        found = storage.read(PLAN)
        log.info("found an unfinished build at %s", storage.url)
    except ObjectMissing:
        if empty and next(iter(storage.list("shards/")), None) is not None:
            raise DataError(
                f"{storage.url}/shards is not empty: choose another --out, or delete what is there"
            ) from None
        with contextlib.suppress(ObjectExists):  # another machine was first
            storage.write(PLAN, plan, create_once=True)
        found = storage.read(PLAN)  # some servers overwrite what is to be created once
    if found != plan:
        raise DataError(
            f"{storage.url} holds an unfinished build of another dataset: choose another --out, or"
            " delete what is there"
            if empty
            else f"{storage.url} is being changed by another add or remove: wait for it, or repeat"
            f" that command to finish it; delete {storage.url}/{PLAN} to give it up"
        )


def read_note(storage: Storage, plan: ShardPlan) -> ShardNote | None:
    """The note of a shard, if an earlier build finished it and it still exists."""
    try:
        note = ShardNote.model_validate_json(storage.read(_note_key(plan.name)))
        whole = storage.size(plan.name) == note.info.bytes
    except (ObjectMissing, ValidationError):
        return None
    return note if whole and len(note.offsets) == len(plan.images) else None


def write_note(storage: Storage, note: ShardNote) -> None:
    """Record that a shard is finished."""
    storage.write(_note_key(note.info.name), note.model_dump_json().encode())


def finish(storage: Storage, manifest: Manifest, index: bytes) -> None:
    """Write the index and the manifest, once, and remove the notes."""
    for key, data in ((INDEX_NAME, index), (MANIFEST_NAME, manifest.to_json())):
        try:
            storage.write(key, data, create_once=True)
        except ObjectExists:
            if storage.read(key) != data:  # the same bytes are of an earlier build
                raise
    remove_notes(storage, manifest.content)


def is_claimed(storage: Storage, content: str) -> bool:
    """Whether this build or change was interrupted here, or is running."""
    try:
        return storage.read(PLAN) == _plan(content)
    except ObjectMissing:
        return False


def remove_notes(storage: Storage, content: str) -> None:
    """Remove the notes of this build or change; the plan last, because the others belong to it."""
    if not is_claimed(storage, content):
        return
    keys = [key for key, _ in storage.list(FOLDER)]
    for key in sorted(keys, key=lambda key: key == PLAN):
        storage.delete(key)


def _plan(content: str) -> bytes:
    return json.dumps({"content": content}).encode()


def _note_key(shard: str) -> str:
    return f"{FOLDER}{PurePosixPath(shard).name}.json"
