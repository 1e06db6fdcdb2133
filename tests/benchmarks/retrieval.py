"""What the ranking and re-ranking benchmarks share: data, the product's floor, child processes."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from reid_train.evaluation.ground_truth import Labels

SIZES = {
    "small": (1_000, 5_000, 250),
    "medium": (2_000, 8_000, 400),
    "market1501": (3_368, 15_913, 750),
    "market1501_all": (3_368, 19_732, 750),
    "msmt17": (11_659, 82_161, 3_060),
}
"""Queries, gallery images, identities."""


@dataclass(frozen=True)
class Problem:
    """Random embeddings around a center for each identity, and labels with 15 cameras."""

    query: np.ndarray
    gallery: np.ndarray
    labels: Labels

    @classmethod
    def draw(cls, size: str, dimensions: int = 2048) -> Problem:
        queries, gallery, pids = SIZES[size]
        draw = np.random.default_rng(0)
        center = draw.standard_normal((pids, dimensions), dtype=np.float32)
        pid = draw.integers(0, pids, queries), draw.integers(0, pids, gallery)
        embeddings = []
        for of in pid:
            rows = draw.standard_normal((len(of), dimensions), dtype=np.float32)
            rows *= 4
            for first in range(0, len(of), 4096):
                rows[first : first + 4096] += center[of[first : first + 4096]]
            embeddings.append(rows)
        camid = draw.integers(0, 15, queries), draw.integers(0, 15, gallery)
        return cls(*embeddings, Labels(pid[0], camid[0], pid[1], camid[1]))


def multiply(left: np.ndarray, right: np.ndarray, every: int = 1, device: str = "cpu") -> float:
    """`torch.mm` over all pairs in chunks: what ranking was held to be bounded by.

    Args:
        every: take one chunk of so many only.

    Returns:
        What share of the rows was taken.
    """
    a, b = torch.from_numpy(left).to(device), torch.from_numpy(right).to(device)
    out, taken = torch.empty(512, len(b), device=device), 0
    for first in range(0, len(a), 512 * every):
        part = a[first : first + 512]
        torch.mm(part, b.T, out=out[: len(part)])
        taken += len(part)
    if device != "cpu":
        torch.cuda.synchronize()
    return taken / len(a)


class Stopwatch:
    """Adds up the time spent in a function of a module while it is replaced.

    Where threads call it at once, on one core each, the seconds are the mean over threads.
    """

    def __init__(self, module: object, name: str) -> None:
        self.seconds, self.cpu, self._call = 0.0, 0.0, getattr(module, name)
        self._threads, self._lock = torch.get_num_threads(), threading.Lock()
        setattr(module, name, self)

    def __call__(self, *arguments, **keywords):
        alone = threading.current_thread() is threading.main_thread()
        clock = time.process_time if alone else time.thread_time
        started, cpu = time.perf_counter(), clock()
        result = self._call(*arguments, **keywords)
        seconds, cpu = time.perf_counter() - started, clock() - cpu
        with self._lock:
            self.seconds += seconds if alone else seconds / self._threads
            self.cpu += cpu
        return result


def timed(function: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What a function found, its seconds, and the process's peak memory in GB.

    `cpu` adds up all threads: other programs on the machine distort it less than wall-clock time.
    Where it says that it did a share of the work only, both are scaled up to the whole.
    """
    started, cpu = time.perf_counter(), time.process_time()
    found = function()
    share = found.get("share", 1)
    found["seconds"] = (time.perf_counter() - started) / share
    found["cpu"] = (time.process_time() - cpu) / share
    found["GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return found


def line(way: str, found: dict[str, float]) -> str:
    """A way's figures as a line of the table."""
    text = f"  {way:10}{found['seconds']:8.2f} s {found['cpu']:8.2f} CPU s {found['GB']:6.2f} GB"
    if "product cpu" in found:
        rest = found["seconds"] - found["product"], found["cpu"] - found["product cpu"]
        text += f"  all but products {rest[0]:.2f} s, {rest[1]:.2f} CPU s"
    if found.get("share", 1) < 1:
        text += f"  estimated from {found['share']:.1%} of the rows"
    return text + (f"  mAP {found['mAP']:.8f}" if "mAP" in found else "")


def in_child(script: str, *arguments: str) -> dict[str, float]:
    """Figures that a fresh process of a script prints as JSON in its last line."""
    command = [sys.executable, script, "--child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
