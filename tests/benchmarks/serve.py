"""The search service: speed beside the bare float32 product, memory, and killed replicas.

    python tests/benchmarks/serve.py --sizes 10000 100000 1000000
    python tests/benchmarks/serve.py --sizes 10000 --minutes 10

For each size: the index in this process, the product that it cannot do without, and the service on
Ray Serve, asked over HTTP to search from images of its gallery. With `--minutes` the load is kept
up, and a replica that embeds, searches or answers is killed every minute. An answer of status 500
or more, and a broken connection, are asked again, as the page does; what fails three times is an
error.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch
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


def measured(function, seconds: float) -> str:
    """Milliseconds of calls of a function, and calls a second."""
    times, end = [], time.perf_counter() + seconds
    function()
    while time.perf_counter() < end or len(times) < 5:
        began = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - began))
    return _figures(times, sum(times) / 1000)


def _figures(times: list[float], seconds: float) -> str:
    p50, p99 = np.percentile(times, [50, 99])
    return f"{len(times) / seconds:9.1f}/s   p50 {p50:8.2f} ms   p99 {p99:8.2f} ms"


def in_process(gallery: np.ndarray, seconds: float, approximate: bool) -> None:
    """One query at a time: the product, the exact search, and perhaps the approximate one."""
    before = psutil.Process().memory_info().rss
    index = Index(gallery.shape[1])
    index.add(gallery)
    memory = (psutil.Process().memory_info().rss - before) / 2**20
    query, right = torch.from_numpy(gallery[:1].copy()), torch.from_numpy(gallery)
    print(f"  product alone    {measured(lambda: torch.mm(query, right.T), seconds)}")
    exact = measured(lambda: index.nearest(query.numpy(), TOP), seconds)
    print(f"  index, exact     {exact}   {memory:,.0f} MiB")
    if approximate:
        built = index.build_graph()
        found = measured(lambda: index.nearest(query.numpy(), TOP), seconds)
        print(f"  index, HNSW      {found}   recall@10 {built.recall:.4f}, {built.seconds:.0f} s")


@contextmanager
def service(gallery: np.ndarray, folder: Path, **options: object) -> Iterator[str]:
    """The service on embeddings; yields its address."""
    storage = open_storage(str(folder / "gallery"))
    for part, first in enumerate(range(0, len(gallery), 1 << 17)):
        rows = gallery[first : first + (1 << 17)]
        numbers, split = np.arange(len(rows)), np.full(len(rows), "gallery", object)
        paths = np.array([f"{first + n}.jpg" for n in numbers], object)
        table = EmbeddingTable(rows, numbers, numbers % 6, split, paths)
        write_part(storage, part_key(part), table)
    model = folder / "model"
    model.mkdir()
    state = ReidNet.from_config(MODEL, identities=2).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, model / "model.safetensors")
    (model / "config.json").write_text(MODEL.to_json())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"enrolled": str(folder / "enrolled"), "device": "cpu"} | options
    settings = Settings(str(model), str(folder / "gallery"), **given)  # type: ignore[arg-type]
    try:
        command.start(command.checked(settings), None, "127.0.0.1", port)
        yield f"http://127.0.0.1:{port}"
    finally:
        command.end()


def load(url: str, seconds: float, threads: int, kill_every: float | None = None) -> str:
    """Search from images of the gallery for a time; requests a second, times, and errors."""
    with urllib.request.urlopen(f"{url}/gallery?limit=200") as answer:
        ids = [image["id"] for image in json.load(answer)["images"]]
    times: list[float] = []
    retries, errors, kills = [], [], 0
    end = time.monotonic() + seconds

    def search(number: int) -> None:
        rng = np.random.default_rng(number)
        while time.monotonic() < end:
            body = f"id={rng.choice(ids)}&top={TOP}".encode()
            began = time.perf_counter()
            for attempt in range(TRIES):
                try:
                    urllib.request.urlopen(f"{url}/search", body, timeout=300).read()
                    break
                except (OSError, urllib.error.HTTPError) as error:
                    (errors if attempt == TRIES - 1 else retries).append(error)
                    time.sleep(0.5)
            times.append(1000 * (time.perf_counter() - began))

    workers = [threading.Thread(target=search, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    next_kill = time.monotonic() + (kill_every or float("inf"))
    while any(worker.is_alive() for worker in workers):
        time.sleep(0.2)
        if time.monotonic() > next_kill and time.monotonic() < end:
            next_kill += kill_every or 0
            kills += kill(("embedder", "searcher", "ingress")[kills % 3])
    text = _figures(times, seconds)
    killed = f"   {kills} kills, {len(retries)} asked again, {len(errors)} errors"
    return text + (killed if kill_every else f"   {len(errors)} errors")


def kill(deployment: str) -> int:
    """End a replica at once."""
    for process in psutil.Process().children(recursive=True):
        if f"ServeReplica:reid:{deployment}" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
            return 1
    return 0


def memory() -> str:
    """Resident memory of the replicas that search."""
    sizes = [
        process.memory_info().rss / 2**20
        for process in psutil.Process().children(recursive=True)
        if "ServeReplica:reid:searcher" in " ".join(process.cmdline())
    ]
    return ", ".join(f"{size:,.0f} MiB" for size in sizes)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=0, help="of load with killed replicas")
    parser.add_argument("--approximate", action="store_true", help="measure HNSW, too")
    parser.add_argument("--no-service", action="store_true", help="only the index")
    given = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    prepare_ray()
    for size in given.sizes:
        gallery = people(size, given.dimensions)
        print(f"{size:,} × {given.dimensions}, {torch.get_num_threads()} threads")
        in_process(gallery, given.seconds, given.approximate)
        if given.no_service:
            continue
        with tempfile.TemporaryDirectory() as folder, service(gallery, Path(folder)) as url:
            found = load(url, given.seconds, given.threads)
            print(f"  service          {found}   {memory()}")
            if given.minutes:
                found = load(url, 60 * given.minutes, given.threads, kill_every=60)
                print(f"  {given.minutes:g} minutes       {found}")


if __name__ == "__main__":
    main()
