"""A process of a run: the signals that stop its driver, a worker's memory and temporary files."""

import atexit
import contextlib
import ctypes
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
# Options of glibc's mallopt, see malloc.h. Only its first arena can grow without limit.
_KEEP_MEMORY = {-1: -1, -4: 0, -8: 1}  # M_TRIM_THRESHOLD: never, M_MMAP_MAX, M_ARENA_MAX
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


def keep_freed_memory() -> None:
    """Keep freed memory for the next training step, instead of giving it back to the kernel.

    The C library maps each large tensor anew, and the kernel fills it with zeros page by page. In
    training on a CPU that takes a tenth of the time and more. It can be set in glibc only; with
    another C library nothing changes.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return
    for option, value in _KEEP_MEMORY.items():
        set_option(option, value)


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
