"""From a folder of images to a sharded dataset, in four steps: read, survey, shard, seal.

Nothing is written before every image has been decoded. Each finished shard leaves a note under
`build/`, so that an interrupted build goes on where it was; the index and the manifest are written
last and once, and then the notes go. What identifies a build is a digest over all images and
labels: a different one never touches what is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import inspect
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from data_shards.building.parallel import cores, parallel_map
from data_shards.building.scan import SurveyedImage, survey
from data_shards.building.state import (
    ShardNote,
    begin,
    clean,
    read_note,
    standing,
    write_note,
    write_once,
)
from data_shards.building.writer import ShardPlan, plan_shards, write_shard
from data_shards.errors import ConfigError, DataError, StorageError
from data_shards.manifest import (
    COLUMNS,
    INDEX_NAME,
    MANIFEST_NAME,
    FileInfo,
    Index,
    LeftOut,
    Manifest,
    Split,
    SplitInfo,
    json_digest,
    sha256,
)
from data_shards.progress import Progress, silent
from data_shards.records import SHARD_BYTES, SPLITS, ImageRecord
from data_shards.sources import SOURCES
from data_shards.sources.layout import difference
from data_shards.storage import Storage, open_storage
from data_shards.storage.atomic import disk_errors

LOCK_NAME = "build.lock"
"""In the folder for tars, while a build runs; the lock goes with the process, however it ends."""


@dataclass(frozen=True)
class BuildResult:
    """What stands at the destination, and whether this build made it."""

    manifest: Manifest
    already_built: bool


def build(
    source: str,
    root: Path,
    out: str,
    *,
    name: str | None = None,
    options: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    allow_incomplete: bool = False,
    skip_unreadable: bool = False,
    jobs: int | None = None,
    work: Path | None = None,
    progress: Progress = silent,
) -> BuildResult:
    """Shard a dataset.

    Args:
        source: a key of `SOURCES`.
        root: the dataset's folder (for `csv` its file; for `synthetic` where to render).
        out: URL of an empty place, of an interrupted build of the same dataset, or of the same.
        name: the dataset's name in its shards; by default the source's.
        options: what the source's `read` takes.
        shard_bytes: bytes of a tar, roughly.
        allow_incomplete: go on with other than the published counts, and say so in the manifest.
        skip_unreadable: leave unreadable images out, and list them in the manifest.
        jobs: processes; by default one a core.
        work: folder for tars until they are uploaded; kept the same, it lets uploads resume.
        progress: called with ("decoding" or "sharding", images done, images in all).

    Raises:
        ConfigError: an unknown source or option, or one that cannot be; or such a build runs.
        DataError: the images are not what they should be, or something else is at `out`.
        StorageError: `out` cannot be reached or written.
    """
    options, jobs = _all_options(source, options or {}), jobs or cores()
    if shard_bytes < 1:
        raise ConfigError(f"shards of {shard_bytes} bytes cannot be; the default is {SHARD_BYTES}")
    storage = open_storage(out)
    storage.exists(MANIFEST_NAME)  # a wrong bucket or password shows now, not after the survey
    records = SOURCES[source].read(root, **options)
    shortfall = difference(SOURCES[source], records, root)
    if shortfall and not allow_incomplete:
        raise DataError(
            f"{shortfall}: is the archive complete? Pass --allow-incomplete to shard what is there"
        )
    images, left_out = survey(records, jobs, progress)
    if left_out and not skip_unreadable:
        raise DataError(_unreadable(left_out, root))
    _check([image.record for image in images], root)
    draft = _draft(name or source, source, options, shard_bytes, shortfall is None, images)
    with _work_folder(work, f"{draft['content']} {storage.url}") as folder:
        manifest = standing(storage, draft["content"])
        if manifest is not None:
            return BuildResult(manifest, already_built=True)
        begin(storage, draft["content"])
        plans = plan_shards(images, shard_bytes)
        notes = _write_shards(storage, plans, draft["name"], jobs, folder, progress)
        return BuildResult(_seal(storage, plans, notes, draft, left_out), already_built=False)


def _all_options(source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    if source not in SOURCES:
        raise ConfigError(f"no source {source!r}: choose one of {', '.join(SOURCES)}")
    signature = inspect.signature(SOURCES[source].read)
    known = [name for name in signature.parameters if name != "root"]
    if wrong := [name for name in options if name not in known]:
        has = f"its options are {', '.join(known)}" if known else "it has none"
        raise ConfigError(f"source {source!r} has no option {wrong[0]!r}: {has}")
    defaults = {name: signature.parameters[name].default for name in known}
    return defaults | dict(options)


def _unreadable(left_out: Sequence[LeftOut], root: Path) -> str:
    lines = "".join(f"\n  {item.path}: {item.reason}" for item in left_out)
    return (
        f"{len(left_out):,} images under {root} cannot be read; mend them, or pass"
        f" --skip-unreadable to go without:{lines}"
    )


def _check(records: Sequence[ImageRecord], root: Path) -> None:
    if not records:
        raise DataError(f"no images under {root}")
    identities = {record.pid for record in records if record.split == "train"}
    if len(identities) == 1:
        raise DataError(
            f"{root}: all train images are of one identity; to learn what tells people apart takes"
            " at least two"
        )
    for record in records:
        if not (0 <= record.pid < 1 << 63 and 0 <= record.camid < 1 << 31):
            raise DataError(
                f"{record.path}: pid {record.pid} or camid {record.camid} is out of range"
            )
        if not record.relative.isprintable():
            raise DataError(f"{record.relative!r} under {root} is not a name in plain UTF-8")


def _draft(
    name: str,
    source: str,
    options: Mapping[str, Any],
    shard_bytes: int,
    complete: bool,
    images: Sequence[SurveyedImage],
) -> dict[str, Any]:
    """What the manifest says before there are shards; nothing in it depends on this machine."""
    recorded = {key: value for key, value in options.items() if not isinstance(value, Path | None)}
    recorded["shard_bytes"] = shard_bytes
    draft = {"name": name, "source": source, "options": recorded, "complete": complete}
    rows = [
        [r.relative, r.pid, r.camid, r.split, image.sha256]
        for image in images
        for r in [image.record]
    ]
    return draft | {"content": json_digest([draft, sorted(rows)])}


def _write_shards(
    storage: Storage,
    plans: Sequence[ShardPlan],
    dataset: str,
    jobs: int,
    folder: Path,
    progress: Progress,
) -> list[ShardNote]:
    task = partial(_one_shard, storage, dataset, folder)
    total, notes = sum(len(plan.images) for plan in plans), list[ShardNote]()
    progress("sharding", 0, total)
    for note in parallel_map(task, plans, jobs):
        notes.append(note)
        progress("sharding", sum(note.info.images for note in notes), total)
    return notes


def _one_shard(storage: Storage, dataset: str, folder: Path, plan: ShardPlan) -> ShardNote:
    """Write and upload one shard, unless an earlier try did."""
    if (note := read_note(storage, plan)) is not None:
        return note
    path = folder / PurePosixPath(plan.name).name
    with disk_errors(path):
        # A new file: a process of a killed build may still have the old one open.
        path.unlink(missing_ok=True)
    try:
        info, offsets = write_shard(plan, dataset, path)
    except BaseException:  # half a tar is of no use, and the disk may be full of it
        path.unlink(missing_ok=True)
        raise
    storage.upload(plan.name, path)
    note = ShardNote(info=info, offsets=tuple(offsets))
    write_note(storage, note)
    path.unlink()
    return note


@contextlib.contextmanager
def _work_folder(work: Path | None, build: str) -> Iterator[Path]:
    """The folder for tars until they are uploaded; no other build's while the block runs."""
    # The same for the same build, so that a cut-off upload finds its file again.
    name = f"data-shards-{os.getuid()}-{sha256(build.encode())[:16]}"
    folder = work or Path(tempfile.gettempdir(), name)
    with disk_errors(folder):
        while (lock := _try_lock(folder)) is None:
            pass
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):  # a user's own folder may hold other things
            (folder / LOCK_NAME).unlink()
            folder.rmdir()
        os.close(lock)


def _try_lock(folder: Path) -> int | None:
    """Make a folder and lock it: a descriptor, or None if a build that ended has removed it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.ExitStack() as on_failure, contextlib.suppress(FileNotFoundError):
        if folder.stat().st_uid != os.getuid():
            raise StorageError(f"{folder} is another user's: name a folder with --work")
        lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
        on_failure.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another build, of the same data or with the same --work, is running in {folder}:"
                " let it end, or stop it and give this command again"
            ) from None
        if os.path.samestat(os.fstat(lock), (folder / LOCK_NAME).stat()):
            on_failure.pop_all()
            return lock
    return None


def _seal(
    storage: Storage,
    plans: Sequence[ShardPlan],
    notes: Sequence[ShardNote],
    draft: Mapping[str, Any],
    left_out: Sequence[LeftOut],
) -> Manifest:
    """Write the index and then the manifest, which makes the dataset be there."""
    data = _index(plans, notes).to_parquet()
    manifest = Manifest(
        **draft,
        splits=_count(plans),
        shards=tuple(note.info for note in notes),
        index=FileInfo(name=INDEX_NAME, bytes=len(data), sha256=sha256(data)),
        left_out=tuple(left_out),
    )
    Index.from_parquet(data, manifest)
    write_once(storage, INDEX_NAME, data)
    write_once(storage, MANIFEST_NAME, manifest.to_json())
    clean(storage)
    return manifest


def _index(plans: Sequence[ShardPlan], notes: Sequence[ShardNote]) -> Index:
    rows = [
        (
            shard,
            offset,
            m.image.size,
            r.pid,
            m.label,
            r.camid,
            m.image.width,
            m.image.height,
            r.relative,
        )
        for shard, (plan, note) in enumerate(zip(plans, notes, strict=True))
        for m, offset in zip(plan.images, note.offsets, strict=True)
        for r in [m.image.record]
    ]
    return Index.from_columns(dict(zip(COLUMNS, zip(*rows, strict=True), strict=True)))


def _count(plans: Sequence[ShardPlan]) -> dict[Split, SplitInfo]:
    splits: dict[Split, SplitInfo] = {}
    for split in SPLITS:
        records = [m.image.record for plan in plans if plan.split == split for m in plan.images]
        if records:
            splits[split] = SplitInfo(
                images=len(records),
                identities=len({record.pid for record in records}),
                cameras=len({record.camid for record in records}),
            )
    return splits
