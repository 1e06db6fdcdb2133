"""The search service over HTTP: speed beside the bare float32 product, memory, killed replicas.

    python tests/benchmarks/serve.py WORK
    python tests/benchmarks/serve.py WORK --sizes 10000 --minutes 0 --approximate

For each size of the gallery: the product that a search cannot do without, the index in this
process, and the service on Ray Serve. Clients search from images of the gallery (by `id`) and with
photos, which are embedded first, by a small network. Then, at the size `--killed-at`, the load is
kept up for `--minutes`, and every minute a replica that embeds, searches or answers is killed. An
answer of status 500 or more and a broken connection are asked again, as the page does; what fails
three times is an error.

The script can be stopped at any time: the same command skips what WORK/serve.json already has.
WORK/serve.md has the tables. The gallery's files in WORK are deleted after each size.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import torch
from PIL import Image
from safetensors.torch import save_file

from cluster.serve import command
from cluster.serve.index import Index
from cluster.serve.settings import Settings
from data_shards.ray_utils import prepare_ray
from data_shards.storage import open_storage
from reid_train.config import ImageConfig, ModelConfig, TrainConfig
from reid_train.evaluation.embedding_store import ROWS, EmbeddingTable, part_key, write_part
from reid_train.model.network import ReidNet

TOP, TRIES = 20, 3
REPLICAS = ("embedder", "searcher", "ingress")
PART = 1 << 17  # embeddings in a file
MODEL = TrainConfig(
    recipe="test",
    image=ImageConfig(height=32, width=16),
    model=ModelConfig(backbone="resnet18", weights="none", stripes=0),
)


def people(count: int, size: int) -> np.ndarray:
    """Unit vectors in clusters of ten, as embeddings of people are: (count, size) float32."""
    rng = np.random.default_rng(0)
    found = np.empty((count, size), np.float32)
    for first in range(0, count, ROWS):
        rows = found[first : first + ROWS]
        centre = rng.normal(size=(-(-len(rows) // 10), size))
        rows[:] = np.repeat(centre, 10, axis=0)[: len(rows)] + rng.normal(size=rows.shape)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return found


def figures(times: list[float], seconds: float) -> dict[str, float]:
    """Calls a second, and their milliseconds."""
    p50, p99 = np.percentile(times, [50, 99])
    return {"per_second": len(times) / seconds, "p50_ms": p50, "p99_ms": p99, "max_ms": max(times)}


def measured(function: Callable[[], object], seconds: float) -> dict[str, float]:
    """Call a function again and again for a time."""
    function()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        began = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - began))
    return figures(times, sum(times) / 1000)


def in_process(gallery: np.ndarray, seconds: float, approximate: bool) -> dict[str, Any]:
    """One query at a time: the product, the exact search, and perhaps the approximate one."""
    before = psutil.Process().memory_info().rss
    index = Index(gallery.shape[1], len(gallery))
    index.add(gallery)
    found: dict[str, Any] = {"index_mib": (psutil.Process().memory_info().rss - before) / 2**20}
    query, right = torch.from_numpy(gallery[:1].copy()), torch.from_numpy(gallery)
    found["product"] = measured(lambda: torch.mm(query, right.T), seconds)
    found["exact"] = measured(lambda: index.nearest(query.numpy(), TOP), seconds)
    if approximate:
        built = index.build_graph()
        found["hnsw"] = measured(lambda: index.nearest(query.numpy(), TOP), seconds)
        found["hnsw"] |= {"recall_at_10": built.recall, "build_seconds": built.seconds}
    return found


def write_gallery(gallery: np.ndarray, url: str) -> None:
    """Write embeddings as `reid_train embed` does."""
    storage = open_storage(url)
    for part, first in enumerate(range(0, len(gallery), PART)):
        rows = gallery[first : first + PART]
        numbers = np.arange(first, first + len(rows))
        split = np.full(len(rows), "gallery", object)
        paths = np.array([f"{number}.jpg" for number in numbers], object)
        table = EmbeddingTable(rows, numbers // 10, numbers % 6, split, paths)
        write_part(storage, part_key(part), table)


@contextmanager
def service(folder: Path, dimensions: int, **options: object) -> Iterator[str]:
    """The service on the embeddings in a folder; yields its address."""
    model = folder / "model"
    model.mkdir()
    network = ReidNet.from_config(MODEL, identities=2)
    assert network.embedding_size == dimensions, "the network's embeddings are as long as these"
    state = {k: v.contiguous() for k, v in network.state_dict().items()}
    save_file(state, model / "model.safetensors")
    (model / "config.json").write_text(MODEL.to_json())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"enrolled": str(folder / "enrolled"), "device": "cpu"} | options
    settings = Settings(str(model), str(folder / "gallery"), **given)  # type: ignore[arg-type]
    command.start(command.checked(settings), None, "127.0.0.1", port)
    import ray  # only now: it reads at its import what `prepare_ray` sets

    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        command.end()
        ray.shutdown()


@dataclass
class Load:
    """Clients that search all the time, each on a connection of its own."""

    url: str
    bodies: list[tuple[str, bytes]]  # content type and content of the requests, taken in turn
    times: list[float] = field(default_factory=list)
    retries: int = 0
    errors: list[str] = field(default_factory=list)

    def run(self, seconds: float, clients: int, during: Callable[[float], None]) -> dict[str, Any]:
        """Search for a time; `during` is called with the end until then."""
        end = time.monotonic() + seconds
        threads = [threading.Thread(target=self._client, args=(n, end)) for n in range(clients)]
        for thread in threads:
            thread.start()
        during(end)
        for thread in threads:
            thread.join()
        found: dict[str, Any] = figures(self.times, seconds)
        return found | {"asked_again": self.retries, "errors": len(self.errors)}

    def _client(self, number: int, end: float) -> None:
        place = urlsplit(self.url).netloc
        connection, turn = http.client.HTTPConnection(place, timeout=300), number
        while time.monotonic() < end:
            kind, body = self.bodies[turn % len(self.bodies)]
            turn += 1
            began = time.perf_counter()
            for attempt in range(TRIES):
                try:
                    connection.request("POST", "/search", body, {"Content-Type": kind})
                    answer = connection.getresponse()
                    text = answer.read()
                    if answer.status == 200:
                        break
                    problem = f"{answer.status} {text[:200]!r}"
                except (OSError, http.client.HTTPException) as error:
                    problem = repr(error)
                connection.close()  # the next request opens it again
                if attempt == TRIES - 1:
                    self.errors.append(problem)
                else:
                    self.retries += 1
                    time.sleep(0.5)
            self.times.append(1000 * (time.perf_counter() - began))


def by_id(url: str) -> list[tuple[str, bytes]]:
    """Searches from images of the gallery."""
    with urllib.request.urlopen(f"{url}/gallery?limit=200", timeout=300) as answer:
        ids = [image["id"] for image in json.load(answer)["images"]]
    return [("application/x-www-form-urlencoded", f"id={i}&top={TOP}".encode()) for i in ids]


def by_photo(count: int = 50) -> list[tuple[str, bytes]]:
    """Searches with photos of 128 × 64 pixels."""
    rng, bodies = np.random.default_rng(0), []
    for _ in range(count):
        file = io.BytesIO()
        coarse = rng.integers(0, 256, (8, 4, 3), np.uint8)
        Image.fromarray(coarse.repeat(16, 0).repeat(16, 1)).save(file, "JPEG")
        part = b'--mark\r\nContent-Disposition: form-data; name="photo"; filename="a.jpg"\r\n\r\n'
        top = b'\r\n--mark\r\nContent-Disposition: form-data; name="top"\r\n\r\n%d' % TOP
        bodies.append(
            ("multipart/form-data; boundary=mark", part + file.getvalue() + top + b"\r\n--mark--")
        )
    return bodies


def by_both(url: str) -> list[tuple[str, bytes]]:
    """Searches of both kinds, in turn."""
    return [body for two in zip(by_id(url), by_photo(), strict=False) for body in two]


def replicas(deployment: str) -> list[psutil.Process]:
    """The processes of a deployment."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if f"ServeReplica:reid:{deployment}" in " ".join(process.cmdline()):
                found.append(process)
    return found


def memory() -> dict[str, float]:
    """MiB of the replica that searches: all, without what it shares, and the most that it had."""
    while not (found := replicas("searcher")):
        time.sleep(0.2)  # it was killed
    process = found[0]
    status = Path(f"/proc/{process.pid}/status").read_text()
    most = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    now = process.memory_full_info()
    return {"all_mib": now.rss / 2**20, "own_mib": now.uss / 2**20, "most_mib": int(most) / 2**10}


def killing(every: float, killed: list[str]) -> Callable[[float], None]:
    """Kill a replica of each deployment in turn; `killed` gets their names."""

    def until(end: float) -> None:
        due = time.monotonic() + every
        while time.monotonic() < end:
            time.sleep(0.2)
            name = REPLICAS[len(killed) % len(REPLICAS)]
            if time.monotonic() > due and (found := replicas(name)):
                os.kill(found[0].pid, signal.SIGKILL)
                killed.append(name)
                due += every

    return until


def idle(_: float) -> None:
    """Do nothing while the load runs."""


class Results:
    """What was measured, in WORK/serve.json and WORK/serve.md."""

    def __init__(self, work: Path) -> None:
        self.path = work / "serve.json"
        self.of: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            self.of = json.loads(self.path.read_text())

    def keep(self, size: int, **found: object) -> None:
        """Add what was found of a size, and print it."""
        self.of.setdefault(str(size), {}).update(found)
        for path, text in ((self.path, json.dumps(self.of, indent=1)), (self._tables, self.text())):
            path.with_suffix(".part").write_text(text + "\n")
            path.with_suffix(".part").replace(path)
        print(f"{size:,}: {', '.join(found)} written to {self.path}")

    @property
    def _tables(self) -> Path:
        return self.path.with_suffix(".md")

    def text(self) -> str:
        """The tables."""
        head = ["gallery", "product, p50", "index, p50", "ratio"]
        lines = [[*head, "index, p99", "HNSW, p50", "recall@10", "memory"]]
        for size, found in self.of.items():
            product, exact = found["product"], found["exact"]
            ratio = exact["p50_ms"] / product["p50_ms"]
            row = [f"{int(size):,}", f"{product['p50_ms']:.2f} ms", f"{exact['p50_ms']:.2f} ms"]
            row += [f"{ratio:.2f}", f"{exact['p99_ms']:.2f} ms"]
            graph = found.get("hnsw")
            row += (
                [f"{graph['p50_ms']:.2f} ms", f"{graph['recall_at_10']:.4f}"]
                if graph
                else ["–"] * 2
            )
            lines.append([*row, f"{found['index_mib']:,.0f} MiB"])
        tables = [lines]
        head = ["gallery", "requests", "clients", "a second", "p50", "p99", "longest", "kills"]
        tables.append([[*head, "asked again", "errors", "searcher's memory", "its most"]])
        for size, found in self.of.items():
            for name, load in found.get("loads", {}).items():
                row = [f"{int(size):,}", *name.split(", "), f"{load['per_second']:.1f}"]
                row += [f"{load[f'{key}_ms']:.1f} ms" for key in ("p50", "p99", "max")]
                row += [str(n) for n in (len(load["killed"]), load["asked_again"], load["errors"])]
                held = found["memory"]
                tables[-1].append(
                    [*row, *(f"{held[f'{k}_mib']:,.0f} MiB" for k in ("own", "most"))]
                )
        return "\n\n".join(map(_table, tables))


def _table(lines: list[list[str]]) -> str:
    head, *rows = lines
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def measure(size: int, given: argparse.Namespace, results: Results) -> None:
    """Measure all of one size that was not measured yet."""
    known = results.of.get(str(size), {})
    killed_at = size == given.killed_at and given.minutes > 0
    loads = {
        **{f"by id, {n}": (by_id, n, given.seconds) for n in (1, given.clients)},
        f"by photo, {given.clients}": (lambda _: by_photo(), given.clients, given.seconds),
    }
    if killed_at:
        both = f"both for {given.minutes:g} min, {given.clients}"
        loads[both] = (by_both, given.clients, 60 * given.minutes)
    done = dict(known.get("loads", {}))
    missing = {name: load for name, load in loads.items() if name not in done}
    without_index = "exact" not in known or (given.approximate and "hnsw" not in known)
    if not without_index and (given.no_service or not missing):
        return
    folder = given.work / "gallery"
    shutil.rmtree(folder, ignore_errors=True)
    gallery = people(size, given.dimensions)
    try:
        if without_index:
            results.keep(size, **in_process(gallery, given.seconds, given.approximate))
        if given.no_service or not missing:
            return
        write_gallery(gallery, str(folder / "gallery"))
        dimensions = gallery.shape[1]
        del gallery
        began = time.monotonic()
        with service(folder, dimensions, search_replicas=given.search_replicas) as url:
            results.keep(size, start_seconds=time.monotonic() - began, memory=memory())
            for name, (bodies, clients, seconds) in missing.items():
                killed: list[str] = []
                dying = bodies is by_both
                during = killing(given.kill_every, killed) if dying else idle
                load = Load(url, bodies(url))
                load.run(2, clients, idle)  # to warm up
                load = Load(url, load.bodies)
                done[name] = load.run(seconds, clients, during)
                done[name] |= {"killed": killed, "problems": load.errors[:5]}
                print(name, done[name])
                results.keep(size, loads=done, memory=memory())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(size: int, given: argparse.Namespace) -> None:
    """Measure one size in a process of its own."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    prepare_ray()
    measure(size, given, Results(given.work))


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("work", type=Path, help="folder for the results")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--search-replicas", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10, help="of load with killed replicas")
    parser.add_argument("--killed-at", type=int, default=100_000, help="size of that gallery")
    parser.add_argument("--kill-every", type=float, default=60, help="seconds")
    parser.add_argument("--approximate", action="store_true", help="measure HNSW, too")
    parser.add_argument("--no-service", action="store_true", help="only the index")
    given = parser.parse_args()
    given.work = given.work.absolute()
    given.work.mkdir(parents=True, exist_ok=True)
    failed = []
    for size in given.sizes:  # a process for each: memory and Ray are new, and one may fail
        process = multiprocessing.get_context("spawn").Process(target=run, args=(size, given))
        process.start()
        process.join()
        failed += [size] if process.exitcode else []
    print(Results(given.work).text())
    if failed:
        sys.exit(
            f"sizes that ended with an error: {failed}; the same command measures what is left"
        )


if __name__ == "__main__":
    main()
