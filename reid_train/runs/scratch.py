"""Temporary files of a training worker: they go when it is gone, also when it was killed.

Checkpoints on their way to storage and back are written to the temporary folder first, hundreds of
MB each. A worker that is killed leaves its own, so the next one on the machine removes them.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "reid-worker-"
_held: list[int] = []  # descriptors whose locks say that this process lives


def own_temporary_folder() -> None:
    """Have `tempfile` use a folder of this process's own; remove those of processes that died."""
    if _held:
        return
    parent = Path(tempfile.gettempdir())
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # it lives, it is another user's, or it is gone already
            descriptor = _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)
    while not _held:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        with contextlib.suppress(FileNotFoundError):  # removed by another before it was locked
            descriptor = _locked(folder, fcntl.LOCK_EX)
            if folder.exists():
                _held.append(descriptor)
            else:
                os.close(descriptor)
    tempfile.tempdir = str(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _locked(folder: Path, how: int) -> int:
    """A descriptor of a folder that holds its lock, until it is closed or the process ends."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, how)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
