"""The faults of a soak: what each does, and in which order a seed deals them out."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
from proxy import (
    Fault,
    S3Proxy,
    flip_answer,
    flip_request,
    lose_answer,
    refuse,
    reset,
    stall,
    truncate,
)

SHARDS, CHECKPOINTS = r"people/shards/", r"runs/[^/]*/checkpoint_"
GONE_SECONDS = 120.0
"""How long Ray's processes may outlive their driver."""


class Driven(Protocol):
    """The run as faults see it."""

    @property
    def pid(self) -> int:
        """The driver's."""
        ...

    def workers(self) -> list[psutil.Process]:
        """Its training workers."""
        ...

    def end(self) -> int:
        """Wait for the driver's end; its exit code."""
        ...

    def resume(self) -> None:
        """Give the command again."""
        ...

    def left(self) -> list[psutil.Process]:
        """Processes that outlived their driver."""
        ...


@dataclass
class Scene:
    """What a fault can reach."""

    rng: random.Random
    proxy: S3Proxy
    cache: Path
    run: Driven
    waiting: list[Fault] = field(default_factory=list)
    """Faults of requests, of the event that is under way."""

    def on_request(self, act: Callable[..., None], **options: Any) -> str:
        """Have something happen to the next requests that match."""
        fault = self.proxy.add(act, **options)
        self.waiting.append(fault)
        what = fault.method or "any request"
        place = {SHARDS: "shards", CHECKPOINTS: "a checkpoint"}.get(fault.path, "the bucket")
        return f"{fault.times} × {what} of {place}"

    def shard(self) -> Path:
        """One of the cached shards, drawn."""
        while not (shards := sorted(self.cache.glob("*.tar"))):
            time.sleep(0.1)
        return self.rng.choice(shards)


def kill_worker(scene: Scene) -> str:
    """SIGKILL to a training worker."""
    victim = scene.rng.choice(sorted(scene.run.workers(), key=lambda process: process.pid))
    victim.kill()
    return "one of two training workers"


def kill_driver(scene: Scene) -> str:
    """SIGKILL to the driver, and at once the same command with `--resume`."""
    _kill_driver(scene)
    scene.run.resume()
    return "resumed at once"


def stop_driver(scene: Scene) -> str:
    """SIGTERM to the driver, and the same command with `--resume` when it has ended."""
    psutil.Process(scene.run.pid).send_signal(signal.SIGTERM)
    code = scene.run.end()
    assert code in (0, 128 + signal.SIGTERM), f"SIGTERM ended the driver with exit {code}"
    if code:
        scene.run.resume()
    return f"exit {code}"


def delete_shard(scene: Scene) -> str:
    """A cached shard is gone."""
    scene.shard().unlink(missing_ok=True)
    return "one of the cached shards"


def damage_shard(scene: Scene) -> str:
    """Bytes of a cached shard change while it is in use, so that no image in it decodes.

    Pixels that change and still decode are not noticed before the next process opens the shard
    (docs/FAULTS.md): the result could not be the same.
    """
    while True:
        try:
            with scene.shard().open("r+b") as file:
                content = file.read()
                start = images = 0
                while (start := content.find(b"\xff\xd8\xff", start)) >= 0:
                    file.seek(start)
                    file.write(b"\0\0\0")
                    start, images = start + 3, images + 1
            return f"{images} images of one shard"
        except FileNotFoundError:  # the cache made room
            continue


def damage_between(scene: Scene) -> str:
    """SIGKILL to the driver, a bit of every cached shard flips, and the command again."""
    _kill_driver(scene)
    deadline = time.monotonic() + GONE_SECONDS
    while scene.run.left() and time.monotonic() < deadline:
        time.sleep(0.2)
    shards = sorted(scene.cache.glob("*.tar"))
    for path in shards:
        with path.open("r+b") as file:
            place = scene.rng.randrange(path.stat().st_size)
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << scene.rng.randrange(8)]))
    scene.run.resume()
    return f"{len(shards)} shards"


def outage(scene: Scene) -> str:
    """The S3 server refuses connections for a while."""
    seconds = scene.rng.uniform(5, 20)
    with scene.proxy.down():
        time.sleep(seconds)
    return f"{seconds:.0f} s"


def _kill_driver(scene: Scene) -> None:
    psutil.Process(scene.run.pid).kill()
    scene.run.end()


def _get(act: Callable[..., None], **options: Any) -> Callable[[Scene], str]:
    return lambda scene: scene.on_request(act, method="GET", path=SHARDS, **options)


def _put(act: Callable[..., None], **options: Any) -> Callable[[Scene], str]:
    return lambda scene: scene.on_request(act, method="PUT", path=CHECKPOINTS, **options)


FAULTS: dict[str, Callable[[Scene], str]] = {
    "worker: SIGKILL": kill_worker,
    "driver: SIGKILL": kill_driver,
    "driver: SIGTERM": stop_driver,
    "cached shard deleted": delete_shard,
    "cached shard damaged in use": damage_shard,
    "driver: SIGKILL, cached shards damaged": damage_between,
    "S3: outage": outage,
    "S3: 500": lambda scene: scene.on_request(refuse, status=500, code="InternalError", times=3),
    "S3: 503 SlowDown": _put(refuse, status=503, code="SlowDown", times=3),
    "S3: reset in a download": _get(reset, after=20_000, times=2),
    "S3: reset in an upload": _put(reset, times=2),
    "S3: answer lost after a write": _put(lose_answer, times=2),
    "S3: stall of 30 s": _get(stall, after=10_000, seconds=30.0),
    "S3: truncated": _get(truncate, after=10_000, times=2),
    "S3: flipped on the way here": _get(flip_answer),
    "S3: flipped on the way there": _put(flip_request),
}


def dealt(rng: random.Random) -> Iterator[str]:
    """Names of faults without end: all of them in a drawn order, and then again in another."""
    while True:
        yield from rng.sample(sorted(FAULTS), len(FAULTS))
