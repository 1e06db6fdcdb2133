"""From a folder of images to a sharded dataset: read the source, scan, write shards, finish.

Nothing is written before every image has been decoded. Each finished shard leaves a note under
`build/`, so that an interrupted build can resume; the index and the manifest are written last and
once, and then the notes are removed. A digest over all images and labels identifies a build: one
with another digest never changes what is at the destination.
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from data_shards.building import state
from data_shards.building.parallel import Cluster, cores, parallel_map
from data_shards.building.reading import check_identities, check_name, read_images
from data_shards.building.scan import ScannedImage
from data_shards.building.writer import (
    ShardPlan,
    SourceChanged,
    index_of,
    plan_shards,
    write_shard,
)
from data_shards.errors import ConfigError, DataError, StorageError
from data_shards.index import Index, count_splits
from data_shards.manifest import INDEX_NAME, FileInfo, Manifest, Names, json_digest, sha256
from data_shards.progress import Progress, silent
from data_shards.records import SHARD_BYTES
from data_shards.storage import LocalStorage, Storage, expand_home, open_storage
from data_shards.storage.atomic import TEMPORARY, disk_errors
from data_shards.storage.object_path import Place

LOCK_NAME = "build.lock"  # in the work folder; locked until the build's process ends


@dataclass(frozen=True)
class BuildResult:
    """The dataset at the destination, and whether it was complete before this build."""

    manifest: Manifest
    already_built: bool
    wide: Sequence[str]
    """The images that are wider than tall, by path: rarely crops of people."""


def build(
    source: str,
    root: str | Place,
    out: str,
    *,
    name: str | None = None,
    options: Mapping[str, Any] | None = None,
    validation: float | None = None,
    validation_seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    allow_incomplete: bool = False,
    skip_unreadable: bool = False,
    jobs: int | None = None,
    address: str | None = None,
    work: Path | None = None,
    progress: Progress = silent,
) -> BuildResult:
    """Shard a dataset; `data_shards.cli.build_command` describes the other arguments.

    Args:
        source: a key of `SOURCES`.
        root: a path of this machine, or `s3://bucket/prefix`; for csv the file.
        out: URL of an empty place, of an interrupted build of this dataset, or of this dataset.
        options: keyword arguments of the source's `read`.
        jobs: processes, by default one per core; on Ray tasks, by default one per CPU.
        address: of a Ray cluster that scans and writes, HOST:PORT; "local" starts one.
        work: folder for tars until they are uploaded; keep it the same to resume uploads.
        progress: called with the stages "scanning" and "writing" and counts of images.

    Raises:
        ConfigError: an unknown source or option, a value out of range, or the same build runs.
        DataError: the images are not what they should be, or something else is at `out`.
        StorageError: `out` cannot be reached or written.
    """
    if shard_bytes < 1:
        raise ConfigError(f"--shard-bytes must be positive, not {shard_bytes}")
    if name is not None:
        check_name(name)
    cluster = None if address is None else Cluster(address)
    jobs = jobs or (0 if cluster else cores())
    storage = open_storage(out)
    storage.exists(state.PLAN)  # shows a wrong bucket or password now, not after the scan
    found = read_images(
        source,
        root,
        options=options,
        validation=validation,
        validation_seed=validation_seed,
        allow_incomplete=allow_incomplete,
        skip_unreadable=skip_unreadable,
        jobs=jobs,
        cluster=cluster,
        progress=progress,
    )
    check_identities([image.record for image in found.images], root)
    # What the manifest says before there are shards. Nothing in it depends on this machine.
    recorded = found.options | {"shard_bytes": shard_bytes}
    draft = {"name": name or found.name, "source": source, "options": recorded}
    draft["complete"] = found.complete
    content = content_digest(draft, found.images)
    wide = [image.record.relative for image in found.images if image.width > image.height]
    with work_folder(work, f"{content} {storage.url}") as folder:
        manifest = state.find_finished(storage, content)
        if manifest is not None:
            return BuildResult(manifest, True, wide)
        state.claim(storage, content)
        plans = plan_shards(found.images, shard_bytes)
        try:
            notes = write_shards(storage, draft["name"], plans, folder, jobs, cluster, progress)
        except SourceChanged as error:
            raise DataError(
                f"{error}: choose another --out, or delete what is in {storage.url}, and try again"
            ) from None
        index, shards = (
            index_of(plans, [note.offsets for note in notes]),
            tuple(note.info for note in notes),
        )
        data = index.to_parquet()
        manifest = Manifest(
            **draft,
            content=content,
            splits=count_splits(index, shards),
            shards=shards,
            index=FileInfo(name=INDEX_NAME, bytes=len(data), sha256=sha256(data)),
            left_out=tuple(found.left_out),
            names=Names.of(image.record for image in found.images),
        )
        Index.from_parquet(data, manifest)
        state.finish(storage, manifest, data)
        return BuildResult(manifest, False, wide)


def content_digest(draft: Mapping[str, Any], images: Sequence[ScannedImage]) -> str:
    pairs = ((image.record, image.sha256) for image in images)
    rows = [[r.relative, r.pid, r.camid, r.split, digest] for r, digest in pairs]
    return json_digest([draft, sorted(rows)])


def write_shards(
    storage: Storage,
    dataset: str,
    plans: Sequence[ShardPlan],
    folder: Path,
    jobs: int,
    cluster: Cluster | None,
    progress: Progress,
) -> list[state.ShardNote]:
    """Write and upload all shards that an earlier build did not; `folder` is for their tars."""
    counts, write = (
        [len(plan.images) for plan in plans],
        partial(write_once, storage, dataset, folder),
    )
    if cluster is not None:
        shared = (storage.root / state.PLAN,) if isinstance(storage, LocalStorage) else ()
        cluster, write = replace(cluster, shared=shared), partial(_write_apart, storage, dataset)
    return parallel_map(write, plans, jobs, counts, partial(progress, "writing"), cluster)


def _write_apart(storage: Storage, dataset: str, plan: ShardPlan) -> state.ShardNote:
    """Write a shard on any node of a cluster, where another task may be writing the same."""
    with tempfile.TemporaryDirectory(prefix="data-shards-", ignore_cleanup_errors=True) as folder:
        return write_once(storage, dataset, Path(folder), plan)


def write_once(storage: Storage, dataset: str, folder: Path, plan: ShardPlan) -> state.ShardNote:
    """Write and upload one shard, unless an earlier build did."""
    if (note := state.read_note(storage, plan)) is not None:
        return note
    path = folder / PurePosixPath(plan.name).name
    with disk_errors(path):
        # Write a new file: a process of a killed build may still have the old one open.
        path.unlink(missing_ok=True)
    try:
        info, offsets = write_shard(plan, dataset, path)
    except BaseException:  # half a tar is useless, and the disk may be full of it
        path.unlink(missing_ok=True)
        raise
    storage.upload(plan.name, path)
    note = state.ShardNote(info=info, offsets=tuple(offsets))
    state.write_note(storage, note)
    path.unlink()
    return note


@contextlib.contextmanager
def work_folder(work: Path | None, build: str) -> Iterator[Path]:
    """Lock the folder for tars that are not uploaded yet; no other build uses it meanwhile."""
    # The same name for the same build, so that an interrupted upload finds its file again.
    name = f"data-shards-{os.getuid()}-{sha256(build.encode())[:16]}"
    folder = expand_home(work) if work else Path(tempfile.gettempdir(), name)
    with disk_errors(folder):
        while (lock := _try_lock(folder)) is None:
            pass
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):  # the user's own folder may hold other files
            if work is None:  # a download that was killed leaves images
                for left in folder.glob(f"{TEMPORARY}*"):
                    left.unlink()
            (folder / LOCK_NAME).unlink()
            folder.rmdir()
        os.close(lock)


def _try_lock(folder: Path) -> int | None:
    """Make and lock a folder: a descriptor, or None if a build that ended removed it meanwhile."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.ExitStack() as on_failure, contextlib.suppress(FileNotFoundError):
        if folder.stat().st_uid != os.getuid():
            raise StorageError(f"{folder} belongs to another user: choose a folder with --work")
        lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
        on_failure.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another build, of the same data or with the same --work, is running in {folder}:"
                " wait for it, or stop it and run this command again"
            ) from None
        if os.path.samestat(os.fstat(lock), (folder / LOCK_NAME).stat()):
            on_failure.pop_all()
            return lock
    return None
