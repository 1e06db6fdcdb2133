"""What a run takes while it goes: sampled from outside, every few seconds.

Ray's processes are the driver's children, and stay in the list when their parent dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil

INTERVAL = 2.0
"""Seconds between samples."""
WORKER = "RayTrainWorker"
"""What Ray calls a training worker's process, at least to begin with."""


class Sample(NamedTuple):
    """A driver or a training worker at a time in seconds."""

    time: float
    role: str
    pid: int
    memory: int
    """Resident bytes."""
    handles: int
    """Open file descriptors."""
    threads: int


class Folders(NamedTuple):
    """Bytes in the folders that a run writes to, and its step."""

    time: float
    step: int
    cache: int
    run: int
    temporary: int


@dataclass
class Watch:
    """Samples in the background; `since` is the time that all others are counted from.

    Args:
        step: the run's last tracked step.
        sizes: bytes of the cache, the run's folder and temporary files.
    """

    step: Callable[[], int]
    sizes: Callable[[], tuple[int, int, int]]
    samples: list[Sample] = field(default_factory=list)
    folders: list[Folders] = field(default_factory=list)
    driver: psutil.Process | None = None
    known: dict[int, psutil.Process] = field(default_factory=dict)
    """Every process that is, or was, below a driver."""
    named: set[int] = field(default_factory=set)
    """Processes that Ray called training workers: it calls them after what they do, too."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Watch:
        self.since = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def save(self, path: Path, **more: str) -> None:
        """Keep what was seen, and more."""
        path.write_text(json.dumps({"samples": self.samples, "folders": self.folders} | more))

    def load(self, path: Path) -> None:
        """Have seen what another had."""
        seen = json.loads(path.read_text())
        self.samples = [Sample(*row) for row in seen["samples"]]
        self.folders = [Folders(*row) for row in seen["folders"]]

    def now(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.since

    def follow(self, pid: int) -> None:
        """Take this process for the driver from now on."""
        self.driver = psutil.Process(pid)

    def workers(self) -> list[psutil.Process]:
        """The training workers that live."""
        return [process for process in self._living() if self._role(process) == "worker"]

    def left(self, driver: int) -> list[psutil.Process]:
        """Processes that outlived a driver which is gone, those of the present one left out."""
        mine = {process.pid for process in self._below()}
        return [p for p in self._living() if p.pid not in mine and p.pid != driver]

    def _below(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            if self.driver is not None:
                return [self.driver, *self.driver.children(recursive=True)]
        return []

    def _living(self) -> list[psutil.Process]:
        with self._lock:
            known = {p.pid: p for p in self._below()} | self.known
            self.known = {pid: p for pid, p in known.items() if alive(p)}
            return list(self.known.values())

    def _role(self, process: psutil.Process) -> str:
        if process == self.driver:
            return "driver"
        with contextlib.suppress(psutil.Error):
            if WORKER in " ".join(process.cmdline()[:1]):
                self.named.add(process.pid)
        return "worker" if process.pid in self.named else ""

    def _work(self) -> None:
        while not self._ended.wait(INTERVAL):
            self.samples += self._look()
            self.folders.append(Folders(self.now(), self.step(), *self.sizes()))

    def _look(self) -> Iterator[Sample]:
        for process in self._living():
            with contextlib.suppress(psutil.Error), process.oneshot():
                name = self._role(process)
                if name:
                    memory = process.memory_info().rss
                    handles, threads = process.num_fds(), process.num_threads()
                    yield Sample(self.now(), name, process.pid, memory, handles, threads)


def alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended and was not waited for does not."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def bytes_below(folder: Path) -> int:
    """Bytes of all files below a folder, whatever comes and goes meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):  # passes over a folder that is gone by then
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(parent) / name).lstat().st_size
    return total
