"""Where a run's checkpoints are kept, as Ray Train sees it: a pyarrow filesystem over `Storage`.

pyarrow's own S3 gives up after two seconds, and with it Ray's controller and the run. Through this
one, the snapshot, uploads and downloads go as everything else does: tried again for as long as
`data_shards/storage/retry.py` says, and whole or not at all.
"""

from __future__ import annotations

import io
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import compress
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystemHandler, FileType, PyFileSystem
from ray.train import Checkpoint as RayCheckpoint
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

from data_shards.errors import DataError, ObjectMissing
from data_shards.storage import LocalStorage, Storage, open_storage
from data_shards.storage.s3 import S3Storage
from reid_train.runs.run_lock import Claim
from reid_train.training.checkpoint import FILES, SEAL, Checkpoint

logger = logging.getLogger(__name__)


def ray_storage(url: str, claim: Claim | None = None) -> dict[str, Any]:
    """The arguments by which Ray Train keeps runs in a folder or at an s3:// URL.

    With a claim, nothing is written or deleted once it does not stand any more.
    """
    path, filesystem = _place(url, claim)
    return {"storage_path": path, "storage_filesystem": filesystem}


def ray_checkpoint(url: str, claim: Claim | None = None) -> RayCheckpoint:
    """The checkpoint in a folder or at an s3:// URL, for Ray Train; the claim as above."""
    return RayCheckpoint(*_place(url, claim))


def _place(url: str, claim: Claim | None = None) -> tuple[str, PyFileSystem]:
    storage = open_storage(url)
    root = LocalStorage(Path("/"))
    path = storage.url
    if isinstance(storage, S3Storage):
        root = S3Storage(storage.bucket, "")
        path = f"{storage.bucket}/{storage.prefix}".rstrip("/")
    return path, PyFileSystem(_Handler(root, claim))


def upload(
    run: str, checkpoint: RayCheckpoint, name: str, *, claim: Claim | None = None
) -> RayCheckpoint:
    """Copy a checkpoint from a folder of this machine to `<run>/<name>`, its seal last.

    Raises:
        ReidError: the claim does not stand any more.
    """
    storage = open_storage(run).child(name)
    for file in (*FILES, SEAL):
        if claim is not None and file in (FILES[0], SEAL):
            claim.require()
        storage.upload(file, Path(checkpoint.path, file))
    return ray_checkpoint(f"{run}/{name}", claim)


@contextmanager
def opened(checkpoint: RayCheckpoint) -> Iterator[Path]:
    """A folder of this machine with a checkpoint, fetched once more if it arrived damaged.

    Raises:
        DataError: it is not whole, or not there.
    """
    for last_try in (False, True):
        with ExitStack() as stack:
            try:
                folder = Path(stack.enter_context(checkpoint.as_directory()))
                Checkpoint.open(folder)
            except (FileNotFoundError, ObjectMissing) as error:
                raise DataError(f"checkpoint {checkpoint.path} is not there any more") from error
            except DataError:
                if last_try:
                    raise
                continue
            yield folder
            return


def first_whole(checkpoints: Sequence[RayCheckpoint]) -> RayCheckpoint:
    """The first of some checkpoints that is whole; says which ones it passed over.

    Args:
        checkpoints: of one run, in the order of preference.

    Raises:
        DataError: none of them is whole.
    """
    for checkpoint in checkpoints:
        try:
            with opened(checkpoint):
                return checkpoint
        except DataError as error:
            # The error names the copy on this machine.
            name = PurePosixPath(checkpoint.path).name
            logger.warning("passing over %s, which is damaged, for the next best: %s", name, error)
    raise _none_left([PurePosixPath(checkpoint.path).name for checkpoint in checkpoints])


def forget_missing(run: str) -> None:
    """Strike checkpoints that are gone off Ray's list of them: with those, it refuses to start.

    Args:
        run: the run's folder or URL; it may be a new one.

    Raises:
        DataError: none of those listed is there.
    """
    storage = open_storage(run)
    try:
        listed = json.loads(storage.read(CHECKPOINT_MANAGER_SNAPSHOT_FILENAME))
        results, indices = listed["checkpoint_results"], listed["checkpoint_report_indices"]
        names = [result["checkpoint_dir_name"] for result in results]
    except ObjectMissing:
        return
    except (ValueError, LookupError, TypeError):
        return  # another Ray's list: Ray says so itself
    there = [next(storage.child(name).list(), None) is not None for name in names]
    if all(there):
        return
    gone = [name for name, found in zip(names, there, strict=True) if not found]
    if not any(there):
        raise _none_left(gone)
    logger.warning("passing over checkpoints that were deleted: %s", ", ".join(gone))
    kept = list(compress(zip(indices, results, strict=True), there))
    listed["checkpoint_report_indices"], listed["checkpoint_results"] = map(
        list, zip(*kept, strict=True)
    )
    _, listed["latest_checkpoint_result"] = max(kept, key=lambda entry: entry[0])
    storage.write(CHECKPOINT_MANAGER_SNAPSHOT_FILENAME, json.dumps(listed).encode())


def unlisted(run: str) -> str | None:
    """The newest whole checkpoint of a run whose list of them is gone, which Ray keeps beside them.

    Args:
        run: the run's folder or URL; it may be a new one.

    Returns:
        The checkpoint's folder or URL; None if there is a list, or no sealed checkpoint at all.

    Raises:
        DataError: there are checkpoints, and none is whole: the run does not begin anew unasked.
    """
    storage = open_storage(run)
    if storage.exists(CHECKPOINT_MANAGER_SNAPSHOT_FILENAME):
        return None
    sealed = [PurePosixPath(key) for key, _ in storage.list() if key.endswith(f"/{SEAL}")]
    if not sealed:
        return None
    names = sorted((str(key.parent) for key in sealed), reverse=True)  # they begin with the time
    found = PurePosixPath(first_whole([ray_checkpoint(f"{run}/{name}") for name in names]).path)
    logger.warning("the run's list of checkpoints is gone: going on from %s", found.name)
    return f"{run}/{found.name}"


def _none_left(names: Sequence[str]) -> DataError:
    return DataError(
        f"no checkpoint of the run is whole ({', '.join(names)}): restore one, or start a new run"
        " under another --name"
    )


@dataclass(frozen=True)
class _Handler(FileSystemHandler):
    """The calls that Ray Train makes, answered by a storage.

    Args:
        storage: a whole bucket, whose name then begins every path, or all local folders.
        claim: has to stand whenever something is written or deleted, if there is one.
    """

    storage: Storage
    claim: Claim | None = None

    def _require_claim(self) -> None:
        if self.claim is not None:
            self.claim.require()

    def _key(self, path: str) -> str:
        bucket = self.storage.bucket if isinstance(self.storage, S3Storage) else ""
        return path.removeprefix(bucket).strip("/")

    def _inside(self, path: str) -> Iterator[tuple[str, int]]:
        """Keys below a folder and their bytes, but for objects that stand for folders."""
        for key, size in self.storage.child(self._key(path)).list():
            if key and not key.endswith("/"):
                yield key, size

    def get_type_name(self) -> str:
        return "reid"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        return [self._info(path) for path in paths]

    def _info(self, path: str) -> FileInfo:
        if self.storage.exists(self._key(path)):
            return FileInfo(path, FileType.File, size=self.storage.size(self._key(path)))
        there = next(self._inside(path), None) is not None
        return FileInfo(path, FileType.Directory if there else FileType.NotFound)

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        return [
            FileInfo(f"{selector.base_dir}/{key}", FileType.File, size=size)
            for key, size in self._inside(selector.base_dir)
            if selector.recursive or "/" not in key
        ]

    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing to do: a bucket has no folders, and a file's folder is made with it."""

    def open_input_stream(self, path: str) -> pa.NativeFile:
        with tempfile.TemporaryDirectory(prefix="reid-object-") as folder:
            file = Path(folder, "object")
            self.storage.download(self._key(path), file)
            return pa.OSFile(str(file))  # stays readable without its name

    open_input_file = open_input_stream

    def open_output_stream(self, path: str, metadata: object) -> pa.NativeFile:
        self._require_claim()
        return pa.PythonFile(_Output(self.storage, self._key(path)), mode="w")

    def delete_dir(self, path: str) -> None:
        self._require_claim()
        folder = self.storage.child(self._key(path))
        for key, _ in list(folder.list()):
            folder.delete(key)

    def delete_file(self, path: str) -> None:
        self._require_claim()
        self.storage.delete(self._key(path))

    def _unused(self, *_: object) -> Any:
        raise NotImplementedError

    open_append_stream = copy_file = move = _unused
    delete_dir_contents = delete_root_dir_contents = _unused


class _Output(io.BytesIO):
    """What is written becomes an object when it is closed; only Ray's small notes go this way."""

    def __init__(self, storage: Storage, key: str) -> None:
        super().__init__()
        self._place = storage, key

    def close(self) -> None:
        if not self.closed:
            storage, key = self._place
            storage.write(key, self.getvalue())
        super().close()
