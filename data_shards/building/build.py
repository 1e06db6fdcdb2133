"""From a folder of images to a sharded dataset: read the source, scan, write shards, finish.

Nothing is written before every image has been decoded. Each finished shard leaves a note under
`build/`, so that an interrupted build can resume; the index and the manifest are written last and
once, and then the notes are removed. A digest over all images and labels identifies a build: one
with another digest never changes what is at the destination.
"""

import contextlib
import fcntl
import inspect
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from data_shards.building import state
from data_shards.building.parallel import cores, parallel_map
from data_shards.building.scan import ScannedImage, scan
from data_shards.building.writer import ShardPlan, count_splits, index_of, plan_shards, write_shard
from data_shards.dataset import why_not_measurable
from data_shards.errors import ConfigError, DataError, StorageError
from data_shards.manifest import INDEX_NAME, FileInfo, Index, Manifest, json_digest, sha256
from data_shards.progress import Progress, silent
from data_shards.records import EVALUATED, NO_CAMERA, SHARD_BYTES, ImageRecord
from data_shards.sources import SOURCES
from data_shards.sources.layout import difference
from data_shards.sources.split import split_off
from data_shards.storage import Storage, open_storage
from data_shards.storage.atomic import disk_errors

log = logging.getLogger(__name__)

LOCK_NAME = "build.lock"  # in the work folder; locked until the build's process ends

# MLflow refuses / and : in registered models' names, and . % " and ' in logged models' names.
_NOT_IN_NAMES = re.compile(r"""[/:.%"'\\\s]""")
# Control characters, line ends, and bytes that are not UTF-8 (which Python reads as surrogates).
_NOT_IN_PATHS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class BuildResult:
    """The dataset at the destination, and whether it was complete before this build."""

    manifest: Manifest
    already_built: bool


def build(
    source: str,
    root: Path,
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
    work: Path | None = None,
    progress: Progress = silent,
) -> BuildResult:
    """Shard a dataset; `data_shards.cli.build_command` describes the other arguments.

    Args:
        source: a key of `SOURCES`.
        out: URL of an empty place, of an interrupted build of this dataset, or of this dataset.
        options: keyword arguments of the source's `read`.
        work: folder for tars until they are uploaded; keep it the same to resume uploads.
        progress: called with the stages "scanning" and "writing" and counts of images.

    Raises:
        ConfigError: an unknown source or option, a value out of range, or the same build runs.
        DataError: the images are not what they should be, or something else is at `out`.
        StorageError: `out` cannot be reached or written.
    """
    options, jobs = _all_options(source, options or {}), jobs or cores()
    if shard_bytes < 1:
        raise ConfigError(f"--shard-bytes must be positive, not {shard_bytes}")
    if name is None:
        own = {"csv": root.stem, "folders": root.absolute().name}
        name = _sanitized(own[source]) if source in own else source
    else:
        _check_name(name)
    storage = open_storage(out)
    storage.exists(state.PLAN)  # shows a wrong bucket or password now, not after the scan
    records = SOURCES[source].read(root, **options)
    _check_records(records, root)
    if validation is not None:
        if any(record.split in EVALUATED["validation"] for record in records):
            raise ConfigError(f"{root} has a validation split of its own: leave out --validation")
        take = partial(
            split_off,
            flag="--validation",
            fraction=validation,
            seed=validation_seed,
            into="validation",
        )
        take(records)  # shows what is wrong before the scan
    shortfall = difference(SOURCES[source], records, root)
    if shortfall and not allow_incomplete:
        raise DataError(
            f"{shortfall}: is the archive complete? Pass --allow-incomplete to shard what is there"
        )
    images, left_out = scan(records, jobs, progress)
    if left_out and not skip_unreadable:
        raise DataError(
            f"{len(left_out):,} images under {root} cannot be read; repair them, or pass"
            " --skip-unreadable to leave them out:"
            + "".join(f"\n  {item.path}: {item.reason}" for item in left_out)
        )
    records = _numbered([image.record for image in images], [image.sha256 for image in images])
    if validation is not None:
        records = take(records)
    images = [replace(image, record=r) for image, r in zip(images, records, strict=True)]
    _check_identities(records, root)
    # What the manifest says before there are shards. Nothing in it depends on this machine.
    recorded = {key: value for key, value in options.items() if not isinstance(value, Path | None)}
    recorded["shard_bytes"] = shard_bytes
    if validation is not None:
        recorded |= {"validation": validation, "validation_seed": validation_seed}
    draft = {"name": name, "source": source, "options": recorded, "complete": shortfall is None}
    content = _content_digest(draft, images)
    with _work_folder(work, f"{content} {storage.url}") as folder:
        manifest = state.find_finished(storage, content)
        if manifest is not None:
            return BuildResult(manifest, already_built=True)
        state.claim(storage, content)
        plans = plan_shards(images, shard_bytes)
        write, counts = partial(_write, storage, name, folder), [len(p.images) for p in plans]
        notes = parallel_map(write, plans, jobs, counts, partial(progress, "writing"))
        data = index_of(plans, [note.offsets for note in notes]).to_parquet()
        manifest = Manifest(
            **draft,
            content=content,
            splits=count_splits(plans),
            shards=tuple(note.info for note in notes),
            index=FileInfo(name=INDEX_NAME, bytes=len(data), sha256=sha256(data)),
            left_out=tuple(left_out),
        )
        Index.from_parquet(data, manifest)
        state.finish(storage, manifest, data)
        return BuildResult(manifest, already_built=False)


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


def _check_name(name: str) -> None:
    if not name or not name.isprintable() or _NOT_IN_NAMES.search(name):
        raise ConfigError(
            f"--name {name!r} cannot be the name of a dataset, because MLflow names its models"
            f" after it: use letters, digits, - and _, such as --name {_sanitized(name)}"
        )


def _sanitized(name: str) -> str:
    return re.sub(r"[^\w-]+", "-", name).strip("-") or "people"


def _check_records(records: Sequence[ImageRecord], root: Path) -> None:
    """Check what the source says, before the images are read."""
    seen = set[str]()
    for record in records:
        if record.relative in seen:
            raise DataError(f"{record.relative} is listed twice under {root}: remove one entry")
        seen.add(record.relative)
        for name, value, bits in (("pid", record.pid, 63), ("camid", record.camid, 30)):
            unknown = name == "camid" and value == NO_CAMERA
            if not (0 <= value < 1 << bits or unknown):
                raise DataError(f"{record.path}: {name} {value} is not from 0 to 2^{bits} - 1")
        if _NOT_IN_PATHS.search(record.relative):
            raise DataError(
                f"{record.relative!r} under {root}: rename this file; its name has control"
                " characters or is not UTF-8"
            )


def _check_identities(records: Sequence[ImageRecord], root: Path) -> None:
    """Check whether the readable images can be trained on, and warn if they cannot be measured."""
    if not records:
        raise DataError(f"no images under {root}")
    if len({record.pid for record in records if record.split == "train"}) == 1:
        raise DataError(
            f"{root}: all train images are of one identity; training needs at least two"
        )
    for evaluated, splits in EVALUATED.items():
        query, gallery = ([(r.pid, r.camid) for r in records if r.split == s] for s in splits)
        if evaluated == "validation" and not query + gallery:
            continue  # most datasets have none
        if (reason := why_not_measurable(query, gallery)) is not None:
            on = "its validation split" if evaluated == "validation" else "this dataset"
            log.warning("%s: models cannot be measured on %s: %s", root, on, reason)


def _numbered(records: Sequence[ImageRecord], contents: Sequence[str]) -> list[ImageRecord]:
    """Give each image without a camera the number of its content (`NO_CAMERA`)."""
    unknown = {c for r, c in zip(records, contents, strict=True) if r.camid == NO_CAMERA}
    number = {content: NO_CAMERA + n for n, content in enumerate(sorted(unknown))}
    return [
        replace(record, camid=number[content]) if record.camid == NO_CAMERA else record
        for record, content in zip(records, contents, strict=True)
    ]


def _content_digest(draft: Mapping[str, Any], images: Sequence[ScannedImage]) -> str:
    pairs = ((image.record, image.sha256) for image in images)
    rows = [[r.relative, r.pid, r.camid, r.split, digest] for r, digest in pairs]
    return json_digest([draft, sorted(rows)])


def _write(storage: Storage, dataset: str, folder: Path, plan: ShardPlan) -> state.ShardNote:
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
def _work_folder(work: Path | None, build: str) -> Iterator[Path]:
    """Lock the folder for tars that are not uploaded yet; no other build uses it meanwhile."""
    # The same name for the same build, so that an interrupted upload finds its file again.
    name = f"data-shards-{os.getuid()}-{sha256(build.encode())[:16]}"
    folder = work or Path(tempfile.gettempdir(), name)
    with disk_errors(folder):
        while (lock := _try_lock(folder)) is None:
            pass
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):  # the user's own folder may hold other files
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
