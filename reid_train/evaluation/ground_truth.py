"""Who is whose match: positives and junk of every query, from identities and cameras alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_shards.errors import DataError


@dataclass(frozen=True)
class Labels:
    """Identity and camera of every query and every gallery item.

    Args:
        query_pid, query_camid: (Q,) integers.
        gallery_pid, gallery_camid: (G,) integers.
    """

    query_pid: np.ndarray
    query_camid: np.ndarray
    gallery_pid: np.ndarray
    gallery_camid: np.ndarray

    def __post_init__(self) -> None:
        for side in ("query", "gallery"):
            for name in (f"{side}_pid", f"{side}_camid"):
                values = np.asarray(getattr(self, name))
                if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
                    raise DataError(f"{name} must be one integer an image, not {values.dtype}")
                object.__setattr__(self, name, values.astype(np.int64, copy=False))
            pid, camid = getattr(self, f"{side}_pid"), getattr(self, f"{side}_camid")
            if len(pid) != len(camid):
                raise DataError(f"{side}: {len(pid)} identities but {len(camid)} cameras")
            if len(pid) == 0:
                raise DataError(f"the {side} is empty: nothing can be measured")


def read_only(owner: object, *names: str) -> None:
    """Replace arrays of a frozen dataclass by views that cannot be written.

    Another process gets them that way from shared memory, and what cannot be written is another
    type to the compiled loops: so they are compiled for that one only.
    """
    for name in names:
        view = getattr(owner, name).view()
        view.flags.writeable = False
        object.__setattr__(owner, name, view)


@dataclass(frozen=True)
class Matches:
    """Gallery items of each query's own identity, as rows of a compressed sparse matrix.

    Those seen by another camera are its positives, the others junk: neither right nor wrong.

    Args:
        start: (Q + 1,) int64; query q has the entries `start[q]:start[q + 1]`.
        index: (M,) int64 gallery indices, ascending for each query.
        positive: (M,) bool.
    """

    start: np.ndarray
    index: np.ndarray
    positive: np.ndarray

    def __post_init__(self) -> None:
        read_only(self, "start", "index", "positive")

    @property
    def row(self) -> np.ndarray:
        """(M,) int64: the query that each entry belongs to."""
        return np.repeat(np.arange(len(self.start) - 1), np.diff(self.start))

    def positives(self) -> np.ndarray:
        """(Q + 1,) int64: where each query's positives start when junk is left out."""
        counted = np.concatenate([[0], np.cumsum(self.positive)])
        return counted[self.start]


def find_matches(labels: Labels) -> Matches:
    """Positives and junk of every query (METHOD §6). Raises `DataError` if no query has any."""
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
            "no valid query: none has an image of its identity from another camera in the "
            "gallery; are query and gallery of the same dataset, and are the camera ids right?"
        )
    return Matches(start, index, positive)
