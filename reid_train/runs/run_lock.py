"""One driver a run: the driver that trains a run holds the lock in its folder.

The lock is an object `lease/<number>.json`. The driver that takes the run creates it, rewrites it
every few seconds, and deletes it at the end. If it stops changing, its driver is gone and another
may take the run by creating the next number; of several that try, one succeeds. The clocks of two
machines are never compared: a driver that wants the run watches the object for `SILENT_SECONDS`.

Numbers start again from 1 once nobody holds the run, so a number does not identify a holder. Before
each rewriting the holder therefore reads the object and checks that it is still its own.
"""

import contextlib
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

import psutil

from data_shards.errors import ConfigError, ObjectExists, ObjectMissing, ReidError
from data_shards.storage import Storage

logger = logging.getLogger(__name__)

BEAT_SECONDS = 10.0  # between two rewritings of a lock
SILENT_SECONDS = 60.0  # a lock must stay unchanged so long before another driver may take it
LOST = 2  # exit code of a driver whose run was taken by another


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock, and how often it has rewritten it."""

    host: str
    boot: str
    pid: int
    started: float
    beats: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @classmethod
    def here(cls) -> Self:
        """Return this process."""
        pid = os.getpid()
        return cls(platform.node(), _boot(), pid, _started(pid))

    def to_json(self) -> bytes:
        """Return what a lock contains."""
        return json.dumps(asdict(self)).encode()

    def lives(self) -> bool | None:
        """Return whether the process is running; None if it is on another machine."""
        if (self.host, self.boot) != (platform.node(), _boot()):
            return None
        try:
            process = psutil.Process(self.pid)
            same = abs(_started(self.pid) - self.started) < 1
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


@dataclass(frozen=True)
class RunLock:
    """A run's lock. It is passed to the run's workers, which may outlive their driver.

    Whoever writes into the run's folder checks the lock first. Ray's workers may run for a minute
    after their driver was killed, and another driver may have the run by then.
    """

    storage: Storage
    number: int
    owner: Owner

    def is_held(self) -> bool:
        """Return whether the lock is there and belongs to this owner."""
        with contextlib.suppress(ObjectMissing):
            return _owner(self.storage.read(_key(self.number))) == self.owner
        return False

    def require(self) -> None:
        """Raise `ReidError` if the lock is not held: another driver may have the run."""
        if not self.is_held():
            raise ReidError(
                f"the lock {self.storage.url}/{_key(self.number)} is gone: another driver took the "
                "run, so the workers of this one stop writing"
            )


@contextlib.contextmanager
def held(
    run: Storage,
    name: str,
    *,
    beat: float = BEAT_SECONDS,
    silent: float = SILENT_SECONDS,
    lost: Callable[[], None] = lambda: os._exit(LOST),
) -> Iterator[RunLock]:
    """Hold the lock in a run's folder while the block runs; raise if another driver holds it.

    `lost` is called when another driver took the run because this process did not rewrite the lock
    in time; it must end the process at once.
    """
    storage, owner = run.child("lease"), Owner.here()
    while True:
        number, data = _newest(storage)
        if data is not None:
            _require_dead(storage, name, number, data, silent)
        try:
            storage.write(_key(number + 1), owner.to_json(), create_once=True)
        except ObjectExists:
            continue  # another driver was quicker
        if data is not None:
            storage.delete(_key(number))
        break
    lock, done = RunLock(storage, number + 1, owner), threading.Event()
    arguments = (lock, name, beat, done, lost)
    thread = threading.Thread(target=_rewrite, args=arguments, name="run-lock", daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        done.set()
        thread.join(beat)
        with contextlib.suppress(ReidError):
            if lock.is_held():
                storage.delete(_key(lock.number))


def _require_dead(storage: Storage, name: str, number: int, data: bytes, silent: float) -> None:
    """Raise if the driver that wrote a lock is alive: on another machine, if the lock changes."""
    owner = _owner(data)
    alive = owner.lives() if owner else None
    if alive is None:
        logger.warning(
            "run %s is locked by %s: waiting %.0f s to see whether it is alive",
            *(name, owner or "another driver", silent),
        )
        deadline = time.monotonic() + silent
        while not alive and time.monotonic() < deadline:
            time.sleep(min(1.0, silent / 12))
            now, latest = _newest(storage)
            if latest is None:
                return
            if (now, latest) != (number, data):
                alive, owner = True, _owner(latest)
    if alive:
        raise ConfigError(
            f"run {name} is being trained by {owner or 'another driver'}: wait for it, or stop it "
            "first and then continue: a run with --resume, a sweep with the same command"
        )


def _rewrite(
    lock: RunLock, name: str, interval: float, done: threading.Event, lost: Callable[[], None]
) -> None:
    """Rewrite the lock every `interval` seconds until `done`."""
    storage, key, beats = lock.storage, _key(lock.number), 0
    while not done.wait(interval):
        beats += 1
        try:
            newest, _ = _newest(storage)
            if newest > lock.number or not lock.is_held():
                logger.error(
                    "run %s was taken by another driver, or its lock %s/%s was deleted: this driver"
                    " stops. If no other driver has it, continue: a run with --resume, a sweep with"
                    " the same command",
                    *(name, storage.url, key),
                )
                lost()
                return
            storage.write(key, replace(lock.owner, beats=beats).to_json())
        except ReidError as error:
            logger.warning("lock of run %s not renewed, trying again: %s", name, error)


def _newest(storage: Storage) -> tuple[int, bytes | None]:
    """Return number and content of the newest lock; 0 and None if there is none."""
    while keys := [key for key, _ in storage.list() if key.endswith(".json")]:
        with contextlib.suppress(ObjectMissing):  # released or replaced meanwhile: look again
            return int(Path(keys[-1]).stem), storage.read(keys[-1])
    return 0, None


def _key(number: int) -> str:
    return f"{number:06}.json"


def _owner(data: bytes) -> Owner | None:
    try:
        return Owner(**json.loads(data))
    except (ValueError, TypeError):
        return None


def _started(pid: int) -> float:
    """Return when a process began: on Linux in clock ticks since the machine started."""
    with contextlib.suppress(OSError):  # not Linux, or the process is gone: psutil tells
        # The fields after the name, which may itself hold spaces and brackets; the 22nd of all.
        return float(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    return psutil.Process(pid).create_time()  # seconds since 1970: moves when the clock is set


def _boot() -> str:
    """Return what process numbers are relative to: this boot of the machine and its container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return str(psutil.boot_time())
