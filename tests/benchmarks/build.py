"""Throughput of a build on Ray by the number of workers, from S3 to S3 or from folder to folder.

    python tests/benchmarks/build.py --images 1200 --workers 1 2 4
    python tests/benchmarks/build.py --images 4000 --workers 1 2 4 --folders

Pictures of noise, about 22 kB each, are on a real S3 server of this machine, which shares its cores
with the workers. With `--folders` they are on the disk, so that the cores do nothing but build. The
first line is a build in one process without Ray; every build must write the same bytes. `scan`
decodes and digests all images, `write` reads them again and stores the shards.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import ray
from ray.cluster_utils import Cluster as Nodes
from rich.console import Console
from rich.table import Table

from cluster.local.s3_server import S3Server
from data_shards.building.build import build
from data_shards.storage import open_storage

BUCKET, PER_PERSON = "s3://bench", 20


def store_pictures(images: int, raw: str) -> int:
    """Store pictures and their CSV file below `raw`; return the bytes of the pictures."""
    storage, lines = open_storage(raw), ["path,pid,camid,split"]
    for n in range(images):
        person, number = divmod(n, PER_PERSON)
        split = "train" if person % 2 else "gallery" if number else "query"
        lines.append(f"{n}.jpg,{person},{number % 4},{split}")
    storage.write("people.csv", "\n".join(lines).encode())

    def put(number: int) -> int:
        noise = np.random.default_rng(number).integers(0, 256, (192, 96, 3), np.uint8)
        data = cv2.imencode(".jpg", noise)[1].tobytes()
        storage.write(f"{number}.jpg", data)
        return len(data)

    with ThreadPoolExecutor(8) as pool:
        return sum(pool.map(put, range(images)))


@contextmanager
def servers(folder: Path, cpus: int) -> Iterator[str]:
    """An S3 server and a Ray cluster of one node; the address of the cluster."""
    with S3Server(folder / "s3") as server:
        os.environ.update(server.environment(), RAY_ADDRESS="")
        server.create_bucket(BUCKET.removeprefix("s3://"))
        nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": cpus})
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        try:
            yield nodes.address
        finally:
            ray.shutdown()
            nodes.shutdown()


def seconds_of(root: str, out: str, shard_bytes: int, **where: object) -> dict[str, float]:
    """Build from `root`/raw to `root`/`out`; return the seconds of each stage."""
    began, ended = dict[str, float](), dict[str, float]()

    def progress(stage: str, done: int, total: int) -> None:
        began.setdefault(stage, time.monotonic())
        ended[stage] = time.monotonic()

    given = {"name": "people", "shard_bytes": shard_bytes, "progress": progress} | where
    csv = f"{root}/raw/people.csv"
    build("csv", csv, f"{root}/{out}", **given)  # pyright: ignore[reportArgumentType]
    return {stage: ended[stage] - began[stage] for stage in ("scanning", "writing")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--shard-bytes", type=int, default=4_000_000)
    parser.add_argument("--folders", action="store_true", help="on the disk, without S3")
    args = parser.parse_args()
    table = Table("", "scan, images/s", "write, images/s", "all, MB/s", "all, relative")
    with (
        tempfile.TemporaryDirectory() as name,
        servers(Path(name), max(args.workers)) as address,
    ):
        root = f"{name}/disk" if args.folders else BUCKET
        size, first, digests = store_pictures(args.images, f"{root}/raw"), 0.0, set[str]()
        ways: dict[str, dict[str, object]] = {"one process": {"jobs": 1}}
        for workers in args.workers:
            ways[f"{workers} on Ray"] = {"address": address, "jobs": workers}
        # Ray starts a worker process for each CPU, which then imports the package: not measured.
        seconds_of(root, "warm", args.shard_bytes, address=address, jobs=max(args.workers))
        for number, (way, where) in enumerate(ways.items()):
            took = seconds_of(root, str(number), args.shard_bytes, **where)
            digests.add(open_storage(f"{root}/{number}").read("manifest.json").hex())
            total = sum(took.values())
            first = first or total
            rates = (args.images / took[stage] for stage in ("scanning", "writing"))
            cells = [f"{rate:,.0f}" for rate in rates]
            table.add_row(way, *cells, f"{size / total / 1e6:.1f}", f"{first / total:.2f}")
    Console(width=100).print(f"{args.images:,} images of {size / args.images / 1e3:.0f} kB", table)
    assert len(digests) == 1, "the builds differ"


if __name__ == "__main__":
    main()
