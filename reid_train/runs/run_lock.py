"""One driver a run: whoever trains a run holds a lease in its folder.

The lease is an object `lease/<number>.json`, created once by the driver that takes it, rewritten by
it every few seconds, and deleted at the end. One that has stopped changing belongs to a driver that
is gone: the next number may be taken, and of several that try, one creates it. No two machines'
clocks are compared: whoever wants the run watches the lease for as long as it may stay silent.

Numbers begin again once nobody has the run, so a number alone says nothing: before each rewriting
the holder looks whether the lease is there and still its own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from data_shards.errors import ConfigError, ObjectExists, ObjectMissing, ReidError
from data_shards.storage import Storage

logger = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
"""Between two rewritings of a lease."""
SILENT_SECONDS = 60.0
"""How long a lease must stay unchanged before it may be taken over."""
LOST = 2
"""Exit code of a driver whose run was taken over."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lease, and how often it has said so."""

    host: str
    boot: str
    pid: int
    started: float
    beats: int = 0

    @classmethod
    def here(cls) -> Owner:
        """This process."""
        pid = os.getpid()
        return cls(platform.node(), _boot(), pid, _started(pid))

    def lives(self) -> bool | None:
        """Whether the process is there; None where another machine's cannot be known."""
        if (self.host, self.boot) != (platform.node(), _boot()):
            return None
        try:
            process = psutil.Process(self.pid)
            same = abs(_started(self.pid) - self.started) < 1
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


@dataclass(frozen=True)
class Claim:
    """A lease, as the run's other processes are given it: they may outlive its owner.

    Whoever writes into the run's folder asks first. Ray's workers go on for a minute where nobody
    tells them that their driver is gone, and another may have the run by then.
    """

    leases: Storage
    number: int
    owner: Owner

    def stands(self) -> bool:
        """Whether the lease is there and its owner's, and not another's who got the same number."""
        try:
            found = _owner(self.leases.read(_key(self.number)))
        except ObjectMissing:
            return False
        return found is not None and replace(found, beats=self.owner.beats) == self.owner

    def require(self) -> None:
        """Raise `ReidError` if another driver has the run, or nobody."""
        if not self.stands():
            raise ReidError(
                f"the lease {self.leases.url}/{_key(self.number)} is gone: another driver took the"
                " run over, and the workers of this one write nothing any more"
            )


@contextlib.contextmanager
def held(
    run: Storage,
    name: str,
    *,
    beat: float = BEAT_SECONDS,
    silent: float = SILENT_SECONDS,
    lost: Callable[[], None] = lambda: os._exit(LOST),
) -> Iterator[Claim]:
    """Hold a run's lease while the block runs.

    Args:
        run: the run's folder.
        name: the run's, for messages.
        beat: seconds between signs of life.
        silent: seconds without one after which another driver may take the run.
        lost: called when another has: this process was silent for too long, and must stop at once.

    Raises:
        ConfigError: another driver trains the run.
    """
    leases = run.child("lease")
    owner = Owner.here()
    claim = Claim(leases, _take(leases, name, owner, beat, silent), owner)
    done = threading.Event()
    arguments = (claim, name, beat, done, lost)
    thread = threading.Thread(target=_beat, args=arguments, name="lease", daemon=True)
    thread.start()
    try:
        yield claim
    finally:
        done.set()
        thread.join(beat)
        with contextlib.suppress(ReidError):
            if claim.stands():
                leases.delete(_key(claim.number))


def _take(leases: Storage, name: str, owner: Owner, beat: float, silent: float) -> int:
    while True:
        number, data = _newest(leases)
        if data is not None:
            _require_dead(leases, name, number, data, beat, silent)
        try:
            leases.write(_key(number + 1), _json(owner), create_once=True)
        except ObjectExists:
            continue  # another driver was quicker
        if data is not None:
            leases.delete(_key(number))
        return number + 1


def _require_dead(
    leases: Storage, name: str, number: int, data: bytes, beat: float, silent: float
) -> None:
    owner = _owner(data)
    alive = owner.lives() if owner else None
    if alive is False:
        return
    if alive is None:
        who = f"process {owner.pid} on {owner.host}" if owner else "another driver"
        logger.warning("run %s is held by %s: waiting %.0f s for a sign of life", name, who, silent)
        deadline = time.monotonic() + silent
        while time.monotonic() < deadline:
            time.sleep(min(1.0, beat / 2))
            now, latest = _newest(leases)
            if latest is None:
                return
            if (now, latest) != (number, data):
                alive, owner = True, _owner(latest)
                break
    if alive:
        who = f"process {owner.pid} on {owner.host}" if owner else "another driver"
        raise ConfigError(
            f"run {name} is being trained by {who}: let it, or stop it first and then --resume"
        )


def _beat(
    claim: Claim, name: str, interval: float, done: threading.Event, lost: Callable[[], None]
) -> None:
    leases, number, beats = claim.leases, claim.number, 0
    while not done.wait(interval):
        beats += 1
        try:
            newest, _ = _newest(leases)
            if newest > number or not claim.stands():
                logger.error(
                    "run %s was taken over by another driver, or its lease %s/%s was deleted: this"
                    " driver stops; where no other has the run, --resume goes on",
                    name,
                    leases.url,
                    _key(number),
                )
                lost()
                return
            leases.write(_key(number), _json(replace(claim.owner, beats=beats)))
        except ReidError as error:
            logger.warning("lease of run %s not renewed, trying again: %s", name, error)


def _newest(leases: Storage) -> tuple[int, bytes | None]:
    """Number and content of the newest lease; 0 and None where there is none."""
    while keys := [key for key, _ in leases.list() if key.endswith(".json")]:
        with contextlib.suppress(ObjectMissing):  # released or followed meanwhile: look again
            return int(Path(keys[-1]).stem), leases.read(keys[-1])
    return 0, None


def _key(number: int) -> str:
    return f"{number:06}.json"


def _json(owner: Owner) -> bytes:
    return json.dumps(asdict(owner)).encode()


def _owner(data: bytes) -> Owner | None:
    try:
        return Owner(**json.loads(data))
    except (ValueError, TypeError):
        return None


def _started(pid: int) -> float:
    """When a process began: clock ticks since the machine started, where the system tells."""
    with contextlib.suppress(OSError):  # not Linux; or it is gone, and psutil says so
        # The fields after the name, which may itself hold spaces and brackets; the 22nd of all.
        return float(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    return psutil.Process(pid).create_time()  # seconds since 1970: moves when the clock is set


def _boot() -> str:
    """What a process number belongs to: this start of the machine, and this container of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return str(psutil.boot_time())
