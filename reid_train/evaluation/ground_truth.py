"""Ground truth: which gallery images match each query, by identity and camera."""

from dataclasses import dataclass

import numpy as np

from data_shards.errors import DataError


@dataclass(frozen=True)
class Labels:
    """Identity and camera of every query and every gallery image.

    Args:
        query_pid, query_camid: (Q,) integers ≥ 0.
        gallery_pid, gallery_camid: (G,) integers ≥ 0.

    Raises:
        DataError: another shape, type or range.
    """

    query_pid: np.ndarray
    query_camid: np.ndarray
    gallery_pid: np.ndarray
    gallery_camid: np.ndarray

    def __post_init__(self) -> None:
        for name, values in dict(vars(self)).items():
            object.__setattr__(self, name, _checked(name, values))
        for split in ("query", "gallery"):
            pids, cameras = (len(getattr(self, f"{split}_{name}")) for name in ("pid", "camid"))
            if pids != cameras:
                raise DataError(
                    f"{split}_pid has {pids} identities but {split}_camid {cameras} cameras"
                )
            if pids == 0:
                raise DataError(f"the {split} is empty: nothing can be measured")


def as_array(name: str, values: object, shape: str) -> np.ndarray:
    """`values` as an array of any shape. Raises `DataError` that says which is wanted."""
    try:
        return np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{name} must be an array of shape {shape}: {error}") from None


def _checked(name: str, values: object) -> np.ndarray:
    """Labels as (N,) int64. Raises `DataError` that names the array and what is wanted."""
    labels = as_array(name, values, "(N,)")
    if labels.ndim != 1 or (len(labels) and labels.dtype.kind not in "iu"):
        raise DataError(
            f"{name} must be integers of shape (N,), one an image, "
            f"not {labels.dtype} of shape {labels.shape}"
        )
    if len(labels) == 0:
        return labels.astype(np.int64)  # of any type: `np.array([])` is of floats
    wrong = np.flatnonzero((labels < 0) | (labels > np.iinfo(np.int64).max))
    if len(wrong):
        raise DataError(
            f"{name} must be integers from 0 up, but entry {wrong[0]} of {len(labels)} is "
            f"{labels[wrong[0]]}: leave its image out of embeddings, identities and cameras. −1 "
            "marks junk (false detections) in Market-1501; distractors have identities from 0 up"
        )
    return labels.astype(np.int64, copy=False)


def read_only(owner: object, *names: str) -> None:
    """Replace arrays of a frozen dataclass by views that cannot be written.

    Ray shares arrays between processes as read-only ones, which are another type to the compiled
    loops: with all of them read-only, each loop is compiled once.
    """
    for name in names:
        view = getattr(owner, name).view()
        view.flags.writeable = False
        object.__setattr__(owner, name, view)


@dataclass(frozen=True)
class GroundTruth:
    """Gallery images of each query's own identity, as rows of a compressed sparse matrix.

    Those of another camera are the query's positives. The others are junk and not counted. Without
    cameras each image counts as its own camera (`NO_CAMERA`), so only the same image is junk.
    """

    start: np.ndarray  # (Q + 1,) int64; query q has the entries `start[q]:start[q + 1]`
    index: np.ndarray  # (M,) int64 gallery indices, ascending for each query
    positive: np.ndarray  # (M,) bool

    def __post_init__(self) -> None:
        read_only(self, "start", "index", "positive")

    @property
    def row(self) -> np.ndarray:
        """(M,) int64: the query that each entry belongs to."""
        return np.repeat(np.arange(len(self.start) - 1), np.diff(self.start))

    def positives(self) -> np.ndarray:
        """(Q + 1,) int64: where each query's positives start when junk is left out."""
        return np.concatenate([[0], np.cumsum(self.positive)])[self.start]

    def within(self, first: int, count: int) -> np.ndarray:
        """Entries with an index in a block of the gallery."""
        return np.flatnonzero((self.index >= first) & (self.index < first + count))


def find_ground_truth(labels: Labels) -> GroundTruth:
    """Positives and junk of every query. Raises `DataError` if no query has any positive."""
    by_pid = np.argsort(labels.gallery_pid, kind="stable")
    pids = labels.gallery_pid[by_pid]
    left = np.searchsorted(pids, labels.query_pid, side="left")
    count = np.searchsorted(pids, labels.query_pid, side="right") - left
    start = np.concatenate([[0], np.cumsum(count)])
    row = np.repeat(np.arange(len(count)), count)
    index = by_pid[np.arange(start[-1]) - start[row] + left[row]]
    positive = labels.gallery_camid[index] != labels.query_camid[row]
    if not positive.any():
        raise DataError(
            "no valid query: none has an image of its identity from another camera (without "
            "cameras: another image) in the gallery; are query and gallery of the same dataset, "
            "and are the camera ids right?"
        )
    return GroundTruth(start, index, positive)
