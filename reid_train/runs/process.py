"""A process of a run: the signals that stop its driver, and a worker's temporary files."""

import atexit
import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from data_shards.errors import Interrupted

_PREFIX = "reid-worker-"
_held: list[int] = []  # descriptors with locks that show that this process lives


class Stop:
    """Whether this process was asked to end, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def ask(self, number: int, _frame: object) -> None:
        """Handle a signal: the first asks for an orderly end, the second raises `Interrupted`."""
        if self.signal is not None:
            raise Interrupted("ended at once, by a second signal", number)
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Handle SIGTERM and SIGINT while the block runs. Only a main thread can."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {n: signal.signal(n, stop.ask) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def own_temporary_folder() -> None:
    """Make `tempfile` use a folder of this process, and remove those of processes that died.

    Checkpoints on their way to storage and back are in temporary files, hundreds of MB each. A
    worker that is killed leaves them, and the next worker on the machine removes them.
    """
    if _held:
        return
    parent = Path(tempfile.gettempdir())
    # What torch.compile compiles stays for the next process: making it takes a minute or more.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(parent / f"torchinductor_{os.getuid()}"))
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # its process lives, or it is another user's, or gone
            descriptor = _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)
    while not _held:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        with contextlib.suppress(FileNotFoundError):  # another removed it before it was locked
            descriptor = _locked(folder, fcntl.LOCK_EX)
            if folder.exists():
                _held.append(descriptor)
            else:
                os.close(descriptor)
    tempfile.tempdir = str(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _locked(folder: Path, how: int) -> int:
    """Return a descriptor that holds a folder's lock until it is closed or the process ends."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, how)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
