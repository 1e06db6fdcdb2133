"""New versions of a dataset: images added, or people removed.

A version reuses the shards of the one before. `manifest.json` is always the newest version and is
replaced by one write; earlier manifests are kept under `versions/`, so that old runs can resume.
The plan in `build/` keeps two changes from running at once, and lets the same command continue an
interrupted one.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from data_shards.building import state
from data_shards.building.build import content_digest, work_folder, write_once, write_shards
from data_shards.building.numbering import LEAST, next_numbers, not_in, pids_of, renumbered
from data_shards.building.parallel import Cluster, cores, parallel_map
from data_shards.building.reading import read_images
from data_shards.building.scan import ScannedImage
from data_shards.building.writer import (
    ShardImage,
    ShardPlan,
    SourceChanged,
    index_of,
    plan_shards,
)
from data_shards.dataset import Dataset
from data_shards.errors import DataError, ObjectMissing, StorageError
from data_shards.index import Index, count_splits, split_of_rows
from data_shards.manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    VERSIONS,
    FileInfo,
    Manifest,
    Names,
    Origin,
    ShardInfo,
    json_digest,
    sha256,
    version_key,
)
from data_shards.progress import Progress, silent
from data_shards.records import SHARD_BYTES, SPLITS, ImageRecord
from data_shards.storage import LocalStorage, Storage
from data_shards.storage.atomic import TEMPORARY
from data_shards.storage.object_path import ObjectPath, Place

Rewrite = tuple[int, str, ShardInfo, ShardPlan]
"""A shard's position, the name of its dataset, the shard, and what is to be in the new one."""


@dataclass(frozen=True)
class Change:
    """The newest version, how many images the change concerned, and whether it was made before."""

    manifest: Manifest
    images: int
    already_made: bool = False
    known: int = 0  # images of the source that the dataset had before
    deleted: int = 0  # objects of earlier versions


def add(
    url: str,
    source: str,
    root: str | Place,
    *,
    ids: Literal["same", "new"] = "same",
    options: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    skip_unreadable: bool = False,
    jobs: int | None = None,
    address: str | None = None,
    work: Path | None = None,
    progress: Progress = silent,
) -> Change:
    """Add the images of a source to a dataset, as a new version of it.

    Args:
        url: of the dataset.
        ids: whether the source's pids and camids, or the names of people and cameras, are those of
            the dataset, or all of them are of other people and cameras, which then get the next
            numbers.
        source, root, options, shard_bytes, skip_unreadable, jobs, address, work, progress: as in
            `build`.

    Raises:
        ConfigError: people or cameras are named, and the dataset has numbers.
        DataError, StorageError: as `build` does.
    """
    dataset, cluster = Dataset.open(url), None if address is None else Cluster(address)
    old, jobs = dataset.manifest, jobs or (0 if cluster else cores())
    found = read_images(
        source,
        root,
        options=options,
        allow_incomplete=True,
        skip_unreadable=skip_unreadable,
        jobs=jobs,
        cluster=cluster,
        progress=progress,
    )
    if not found.images:
        raise DataError(f"no images under {root}: nothing was changed")
    storage, before, images = dataset.storage, old.options.get("added", []), list[ScannedImage]()
    assert isinstance(before, list)
    digest = content_digest({"ids": ids, "shard_bytes": shard_bytes}, found.images)
    free = _free_numbers(dataset)
    if digest not in before:
        images = not_in(dataset, renumbered(found.images, dataset, ids, free))
    if not images:
        state.remove_notes(storage, digest)
        return Change(old, len(found.images), already_made=True)
    pids = {image.record.pid for image in images if image.record.split == "train"}
    pids.update(dataset.identities.tolist())
    plans = plan_shards(images, shard_bytes, version=_version(old, digest), pids=pids)
    with work_folder(work, f"{digest} {storage.url}") as folder:
        _claim(storage, digest, old)
        try:
            notes = write_shards(storage, old.name, plans, folder, jobs, cluster, progress)
        except SourceChanged as error:
            state.remove_notes(storage, digest)
            raise DataError(f"{error}: run this again") from None
        added = index_of(plans, [note.offsets for note in notes])
        shards = [*(moved(old, shard) for shard in old.shards), *(note.info for note in notes)]
        manifest = commit(
            storage,
            old,
            shards,
            Index.concatenated([dataset.whole, shifted(added, len(old.shards))]),
            options=_options(old, free) | {"added": [*before, digest]},
            left_out=tuple(dict.fromkeys((*old.left_out, *found.left_out))),
            names=Names.joined([old.names, Names.of(image.record for image in images)]),
        )
        state.remove_notes(storage, digest)
    return Change(manifest, len(images), known=len(found.images) - len(images))


def remove(
    url: str,
    people: Sequence[int | str],
    *,
    delete_old: bool = False,
    jobs: int | None = None,
    work: Path | None = None,
    progress: Progress = silent,
) -> Change:
    """Remove people from a dataset: write their shards anew without them, as a new version.

    Args:
        url: of the dataset.
        people: their pids, or their names where the dataset has names; in all splits.
        delete_old: delete every earlier version that has them, and check that it is gone.
        jobs, work, progress: as in `build`.

    Raises:
        DataError: no version has one of them, or too few people would be left to train on.
        StorageError: an object could not be deleted.
    """
    dataset = Dataset.open(url)
    old, storage, index = dataset.manifest, dataset.storage, dataset.whole
    earlier_ones = _versions(storage)
    pids, *pids_before = pids_of(people, [old, *earlier_ones], url)
    wanted, gone = {*pids}.union(*pids_before), np.isin(index.pid, pids)
    token = json_digest(["remove", sorted(wanted)])
    found, having, manifest = set(index.pid[gone].tolist()), list[Manifest](), old
    for earlier, theirs in zip(earlier_ones, pids_before, strict=True):
        try:
            there = _index(storage, earlier).pid
        except ObjectMissing:  # an interrupted command was deleting this version
            having.append(earlier)
            continue
        if (hit := np.isin(there, theirs)).any():
            having.append(earlier)
            found.update(there[hit].tolist())
    missing = sorted(wanted - found)
    if missing and not state.is_claimed(storage, token):
        raise DataError(f"{url} has no pid {', '.join(map(str, missing))}: nothing was changed")
    tasks = _rewrites(dataset, index, gone, _version(old, token)) if gone.any() else []
    with work_folder(work, f"{token} {storage.url}") as folder:
        _claim(storage, token, old)
        if gone.any():
            shards, kept = _without(dataset, index, gone, tasks, folder, jobs or cores(), progress)
            # Images of these people can be added again. Paths of unreadable ones may be of them.
            options = _options(old, _free_numbers(dataset))
            options.pop("added", None)
            manifest = commit(storage, old, shards, kept, options=options, left_out=())
            having.append(old)
        deleted = _delete(storage, manifest, having) if delete_old else 0
        state.remove_notes(storage, token)
    return Change(manifest, int(gone.sum()), already_made=not gone.any(), deleted=deleted)


def commit(
    storage: Storage,
    old: Manifest | None,
    shards: Sequence[ShardInfo],
    index: Index,
    **changes: Any,
) -> Manifest:
    """Write a version's index, then its manifest: what a reader sees changes with that last write.

    `changes` are fields of the manifest; by default they are those of the `old` one.
    """
    train = split_of_rows(index, shards) == SPLITS.index("train")
    label = np.full(len(index), -1, np.int64)
    label[train] = np.unique(index.pid[train], return_inverse=True)[1]
    data = replace(index, label=label).to_parquet()
    fields = {f: getattr(old, f) for f in Manifest.model_fields} if old else dict[str, Any]()
    if old is not None:
        fields["content"] = json_digest([old.content, [[s.name, s.sha256] for s in shards]])
    fields |= changes | {"shards": tuple(shards), "splits": count_splits(index, shards)}
    if fields.get("names") is not None:  # no name stays of people who are removed
        fields["names"] = fields["names"].of_people(index.pid)
    name = f"index-{fields['content'][:16]}.parquet" if old else INDEX_NAME
    fields["index"] = FileInfo(name=name, bytes=len(data), sha256=sha256(data))
    manifest = Manifest(**fields)
    Index.from_parquet(data, manifest)
    if old is None:
        state.finish(storage, manifest, data)
        return manifest
    _require_newest(storage, old)
    storage.write(version_key(old.digest), old.to_json())
    storage.write(name, data)
    storage.write(MANIFEST_NAME, manifest.to_json())
    return manifest


def _claim(storage: Storage, change: str, old: Manifest) -> None:
    """Reserve the dataset for a change of this version, which must still be the newest."""
    state.claim(storage, change, empty=False)
    _require_newest(storage, old)


def _require_newest(storage: Storage, old: Manifest) -> None:
    if Manifest.from_json(storage.read(MANIFEST_NAME)).digest != old.digest:
        raise DataError(f"{storage.url} was changed meanwhile by another command: run this again")


def _free_numbers(dataset: Dataset) -> tuple[int, int]:
    """The first pid and camid that nobody has had in any version."""
    old, indices = dataset.manifest, [dataset.whole]
    if LEAST[0] not in old.options:  # no version has recorded them
        for earlier in _versions(dataset.storage):
            with contextlib.suppress(ObjectMissing):
                indices.append(_index(dataset.storage, earlier))
    return next_numbers(old, indices)


def _options(old: Manifest, free: tuple[int, int]) -> dict[str, Any]:
    return old.options | dict(zip(LEAST, free, strict=True))


def _version(old: Manifest, change: str) -> str:
    """What sets the names of a version's new shards apart."""
    return json_digest([old.content, change])[:8]


def _versions(storage: Storage) -> list[Manifest]:
    return [Manifest.from_json(storage.read(key)) for key, _ in storage.list(VERSIONS)]


def _index(storage: Storage, manifest: Manifest) -> Index:
    info = manifest.index
    return Index.from_parquet(storage.read(info.name, sha256=info.sha256), manifest)


def moved(manifest: Manifest, shard: ShardInfo, pid: int = 0, camid: int = 0) -> ShardInfo:
    """A shard as another version or dataset lists it, with larger pids and camids."""
    was = shard.origin or Origin(dataset=manifest.name, pid=0, camid=0)
    origin = Origin(dataset=was.dataset, pid=was.pid + pid, camid=was.camid + camid)
    return shard.model_copy(update={"origin": origin})


def shifted(index: Index, first: int, pid: int = 0, camid: int = 0) -> Index:
    """An index whose shards start at `first`."""
    columns = {"shard": index.shard + np.int32(first), "pid": index.pid + pid}
    return replace(index, **columns, camid=index.camid + np.int32(camid))


def _rewrites(dataset: Dataset, index: Index, gone: np.ndarray, version: str) -> list[Rewrite]:
    """The shards to write anew because they have some of the images that go."""
    old, split = dataset.manifest, split_of_rows(index, dataset.manifest.shards)
    train = np.unique(index.pid[~gone & (split == SPLITS.index("train"))])
    if gone.all() or len(train) == 1:
        raise DataError(f"{dataset.url} would have too few people left: delete all of it instead")
    label, numbers = {int(p): n for n, p in enumerate(train)}, dict[str, int]()
    tasks = list[Rewrite]()
    for position in np.unique(index.shard[gone]).tolist():
        shard, members = old.shards[position], list[ShardImage]()
        for row in np.flatnonzero((index.shard == position) & ~gone).tolist():
            number = numbers[shard.split] = numbers.get(shard.split, -1) + 1
            span = int(index.offset[row]), int(index.size[row])
            who = int(index.pid[row]), int(index.camid[row])
            path = ObjectPath(dataset.storage, shard.name, span)
            record = ImageRecord(path, str(index.path[row]), *who, shard.split)
            pixels = int(index.width[row]), int(index.height[row])
            mine = label[who[0]] if shard.split == "train" else -1
            key = f"{shard.split}-{version}-{number:08d}"
            members.append(ShardImage(ScannedImage(record, span[1], "", *pixels), key, mine))
        if members:
            name = f"shards/{version}/{shard.split}-{position:06d}.tar"
            plan = ShardPlan(name, shard.split, tuple(members))
            tasks.append((position, old.dataset_of(shard), shard, plan))
    return tasks


def _without(
    dataset: Dataset,
    index: Index,
    gone: np.ndarray,
    tasks: Sequence[Rewrite],
    folder: Path,
    jobs: int,
    progress: Progress,
) -> tuple[list[ShardInfo], Index]:
    """Write shards anew; return the shards and the index without the images that go."""
    old = dataset.manifest
    rewrite, counts = partial(_rewrite, dataset.storage, folder), [len(t[3].images) for t in tasks]
    notes = parallel_map(rewrite, tasks, jobs, counts, partial(progress, "writing"))
    made = {task[0]: note for task, note in zip(tasks, notes, strict=True)}
    kept, shards = index.select(~gone), list[ShardInfo]()
    numbering, offset = np.full(len(old.shards), -1, np.int32), kept.offset.copy()
    for position, shard in enumerate(old.shards):
        rows = kept.shard == position
        if not rows.any():
            continue
        numbering[position] = len(shards)
        if position in made:
            offset[rows] = made[position].offsets
            origin = Origin(dataset=old.dataset_of(shard), pid=0, camid=0)
            shards.append(made[position].info.model_copy(update={"origin": origin}))
        else:
            shards.append(moved(old, shard))
    return shards, replace(kept, shard=numbering[kept.shard], offset=offset)


def _rewrite(storage: Storage, folder: Path, task: Rewrite) -> state.ShardNote:
    """Write one shard from the images of an older one, whose digest is checked."""
    _, dataset, old, plan = task
    path = folder / f"old-{PurePosixPath(plan.name).name}"
    try:
        if (note := state.read_note(storage, plan)) is not None:
            return note
        storage.download(old.name, path, sha256=old.sha256)
        local, members = LocalStorage(folder), list[ShardImage]()
        for member in plan.images:
            place = member.image.record.path
            assert isinstance(place, ObjectPath)
            record = replace(member.image.record, path=ObjectPath(local, path.name, place.span))
            members.append(replace(member, image=replace(member.image, record=record)))
        return write_once(storage, dataset, folder, replace(plan, images=tuple(members)))
    finally:
        path.unlink(missing_ok=True)


def _delete(storage: Storage, newest: Manifest, having: Sequence[Manifest]) -> int:
    """Delete these earlier versions, and all objects that no version that is left needs."""
    doomed = {manifest.digest for manifest in having}
    kept = [newest, *(m for m in _versions(storage) if m.digest not in doomed)]
    needed = {version_key(m.digest) for m in kept[1:]} | {m.index.name for m in kept}
    needed.update(shard.name for manifest in kept for shard in manifest.shards)

    def unneeded() -> list[str]:
        keys = [key for key, _ in storage.list() if key not in needed]
        ours = ("shards/", VERSIONS)
        return [
            key
            for key in keys
            if key.startswith(ours) or (key.startswith("index") and key.endswith(".parquet"))
        ]

    if isinstance(storage, LocalStorage):  # a copy that was killed is not listed
        for folder in ("", VERSIONS, "shards/**/"):
            for path in list(storage.root.glob(f"{folder}{TEMPORARY}*")):
                storage.erase(path.relative_to(storage.root).as_posix())
    keys = sorted(unneeded(), key=lambda key: key.startswith(VERSIONS))  # manifests last
    for key in keys:
        storage.erase(key)
    if left := unneeded():
        raise StorageError(f"{storage.url}/{left[0]} is still there after it was deleted")
    return len(keys)
