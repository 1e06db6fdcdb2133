"""The checkpoints of a run: `<run>/checkpoint_<time>/`, written, found again, and deleted.

The run's folder is the only record of them. Kept are the newest checkpoint and the two best by mAP.
A checkpoint is uploaded with its seal last, so one without a seal is not complete and is ignored.
"""

import json
import logging
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data_shards.errors import DataError, ObjectMissing
from data_shards.storage import LocalStorage, open_storage
from reid_train.runs.run_lock import RunLock
from reid_train.training.checkpoint import FILES, PROGRESS, SEAL, UNMEASURED, Checkpoint

if TYPE_CHECKING:
    from reid_train.training.history import History

logger = logging.getLogger(__name__)

KEPT_BEST = 2  # checkpoints kept for their mAP, besides the newest


class Stored(NamedTuple):
    """A checkpoint in a run's folder. They sort by how far the run had come, then by time."""

    step: int
    name: str
    epoch: int


def stored_checkpoints(run: str) -> list[Stored]:
    """Return the checkpoints of a run that have a seal, the newest first.

    Here and below `run` is the run's folder or s3:// URL. It may not exist yet.
    """
    storage = open_storage(run)
    found = []
    for key, _ in storage.list("checkpoint_"):
        name, _, file = key.partition("/")
        if file == SEAL:
            try:
                progress = json.loads(storage.read(f"{name}/{PROGRESS}"))["progress"]
                found.append(Stored(int(progress["global_step"]), name, int(progress["epoch"])))
            except (ObjectMissing, ValueError, LookupError, TypeError):
                found.append(Stored(-1, name, -1))  # damaged: the last one to try
    return sorted(found, reverse=True)


def upload(run: str, folder: Path, name: str, *, lock: RunLock | None = None) -> None:
    """Copy a checkpoint to `<run>/<name>`, its seal last. The lock has to be held."""
    storage = open_storage(run).child(name)
    for file in (*FILES, SEAL):
        if lock is not None and file in (FILES[0], SEAL):
            lock.require()
        storage.upload(file, folder / file)


@contextmanager
def opened(place: str, name: str) -> Iterator[Checkpoint]:
    """Download a checkpoint to a temporary folder of this name, check it, and open it."""
    with tempfile.TemporaryDirectory(prefix="reid-checkpoint-") as temporary:
        folder = Path(temporary, name)
        download(place, folder)
        yield Checkpoint.open(folder, verify=False)


def newest_whole(run: str) -> AbstractContextManager[Checkpoint | None]:
    """Open a copy of the newest checkpoint of a run that is not damaged; None if it has none.

    The copy's folder has the checkpoint's name, and is deleted when the block ends. It is a
    `DataError` if all checkpoints of the run are damaged.
    """
    return first_whole(run, [stored.name for stored in stored_checkpoints(run)])


@contextmanager
def first_whole(run: str, names: list[str]) -> Iterator[Checkpoint | None]:
    """As `newest_whole`, for the first of these checkpoints that is not damaged."""
    with tempfile.TemporaryDirectory(prefix="reid-checkpoint-") as temporary:
        for name in names:
            folder = Path(temporary, name)
            try:
                download(f"{run}/{name}", folder)
                found = Checkpoint.open(folder, verify=False)
            except DataError as error:
                logger.warning("passing over %s, which is damaged: %s", name, error)
                shutil.rmtree(folder, ignore_errors=True)
            else:
                yield found
                return
        if names:
            raise DataError(
                f"no checkpoint of the run {run} is whole ({', '.join(names)}): restore one, or "
                "start a new run under another --name"
            )
        yield None


def download(place: str, folder: Path) -> None:
    """Copy a checkpoint into a folder of this machine, and check its digests on the way.

    A file that arrives damaged is fetched once more. If it stays so, it is a `DataError`.
    """
    storage = open_storage(place)
    try:
        storage.download(SEAL, folder / SEAL)
        seal = json.loads((folder / SEAL).read_text())
        for file in FILES:
            storage.download(file, folder / file, sha256=seal[file])
    except (ObjectMissing, ValueError, LookupError, TypeError) as error:
        raise DataError(f"checkpoint {place} is incomplete or damaged: {error}") from error


def stored_evaluations(run: str) -> list[dict[str, Any]]:
    """Return the metrics of all of a run's evaluations, with `epoch`, `step` and `checkpoint`.

    `checkpoint` is empty for those that were deleted since.
    """
    with newest_whole(run) as newest:
        if newest is None:
            return []
        history = newest.history()
    names = {step: entry.name for step, entry in newest_by_step(stored_checkpoints(run)).items()}
    epochs = map(int, history.evaluations.get("epoch", ()))
    rows = zip(history.evaluation_steps, epochs, history.evaluation_rows(), strict=False)
    return [
        row | {"epoch": epoch, "step": step, "checkpoint": names.get(step, "")}
        for step, epoch, row in rows
    ]


def measured(history: "History") -> dict[int, float]:
    """Return the mAP of each evaluation, by the global step of its checkpoint."""
    return dict(zip(history.evaluation_steps, history.evaluations.get("mAP", []), strict=False))


def newest_by_step(stored: Iterable[Stored]) -> dict[int, Stored]:
    """Return each step's newest checkpoint: one saved before the evaluation is not measured."""
    return {entry.step: entry for entry in sorted(stored)}


def by_score(stored: list[Stored], scores: Mapping[int, float]) -> list[Stored]:
    """Return the checkpoints with a mAP in `scores`, the best first; of equal ones the newer."""
    known = [entry for step, entry in newest_by_step(stored).items() if step in scores]
    return sorted(known, key=lambda entry: (scores[entry.step], entry), reverse=True)


class Keeper:
    """Uploads a run's checkpoints on rank 0 and deletes those that are no longer kept.

    The lock has to be held whenever something is written or deleted; a sweep's trials have none.
    `resumed` is the checkpoint that the run resumed from, if any.
    """

    def __init__(self, run: str, lock: RunLock | None, resumed: Checkpoint | None) -> None:
        self._run, self._lock = run, lock
        self._guard = threading.Lock()  # Ray uploads in threads
        self._scores: dict[int, float] = {}
        self._stored: list[Stored] = []
        if resumed is not None:
            self._scores = measured(resumed.history())
            # Damaged ones, which it passed over, stay for a person to look at until the run ends.
            newest = resumed.progress.global_step
            self._stored = [s for s in stored_checkpoints(run) if 0 <= s.step <= newest]

    def keep(self, folder: Path, name: str, metrics: Mapping[str, float]) -> None:
        """Upload a checkpoint with its reported metrics, then delete those that it supersedes."""
        upload(self._run, folder, name, lock=self._lock)
        with self._guard:
            entry = Stored(int(metrics["step"]), name, int(metrics["epoch"]))
            self._stored.append(entry)
            if metrics["mAP"] > UNMEASURED:
                self._scores[entry.step] = metrics["mAP"]
            kept = kept_checkpoints(self._stored, self._scores)
            for old in set(self._stored) - set(kept):
                if self._lock is not None:
                    self._lock.require()
                _delete(self._run, old.name)
            self._stored = kept


def kept_checkpoints(stored: list[Stored], scores: Mapping[int, float]) -> list[Stored]:
    """Return the newest checkpoint and the best two; those without an mAP count as the worst."""
    ordered = sorted(stored, reverse=True)
    best = [*by_score(ordered, scores), *(s for s in ordered if s.step not in scores)]
    return sorted({*ordered[:1], *best[:KEPT_BEST]}, reverse=True)


def delete_stale_checkpoints(run: str, scores: Mapping[int, float]) -> None:
    """Delete the checkpoints that a run which has ended does not keep, and parts of uploads."""
    kept = kept_checkpoints(stored_checkpoints(run), scores)
    delete_checkpoints(run, {entry.name for entry in kept})


def delete_checkpoints(run: str, kept: Set[str]) -> None:
    """Delete the checkpoints of a run that has ended, except for those named."""
    storage = open_storage(run)
    names = {key.partition("/")[0] for key, _ in storage.list("checkpoint_") if "/" in key}
    if isinstance(storage, LocalStorage):  # a copy that was killed is not listed
        names |= {path.name for path in storage.root.glob("checkpoint_*") if path.is_dir()}
    for name in names - kept:
        _delete(run, name)


def _delete(run: str, name: str) -> None:
    """Delete a checkpoint, its seal first: what is left after a failure is not a checkpoint."""
    storage = open_storage(run)
    folder = storage.child(name)
    folder.delete(SEAL)
    for key, _ in list(folder.list()):
        folder.delete(key)
    if isinstance(storage, LocalStorage):
        shutil.rmtree(storage.root / name, ignore_errors=True)
