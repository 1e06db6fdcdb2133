"""Open an index and plan an epoch: seconds and memory, by the number of images.

    python tests/benchmarks/index.py 1000000 10000000

Each line is from a process of its own: "at once" reads all columns into memory and copies the rows
of each split; "first" is the first process of a node, which makes the columns that all others map;
"later" is any other; "paths" reads the paths of 4,096 neighbours, as `embed` does, and of 64 images
anywhere. "own" memory is the process's own when it ends, the rest of "at most" is mostly of files
that all processes share, and which the system takes back when it needs memory.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_shards.dataset import Dataset
from data_shards.index import Index, split_of_rows
from data_shards.index_file import COLUMNS
from data_shards.manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    FileInfo,
    Manifest,
    ShardInfo,
    SplitInfo,
)
from data_shards.records import SPLITS
from data_shards.sampler import plan
from data_shards.storage.atomic import file_sha256

PER_SHARD, PER_PERSON, CAMERAS, BYTES = 10_000, 25, 12, 8_192
ROW_GROUP = 1 << 17


def write(images: int, folder: Path) -> None:
    """A manifest and an index of people by the hundred thousand; there are no shards."""
    shards = -(-images // PER_SHARD)
    names = ["train"] * (shards - shards // 5 - 1) + ["gallery"] * (shards // 5) + ["query"]
    is_train = np.array([name == "train" for name in names])
    schema = pa.schema([(name, kind) for name, kind in COLUMNS.items()])
    with pq.ParquetWriter(folder / INDEX_NAME, schema, compression="zstd") as writer:
        for first in range(0, images, ROW_GROUP):
            number = np.arange(first, min(first + ROW_GROUP, images))
            shard, pid = number // PER_SHARD, number // PER_PERSON
            person, digits = (pc.cast(pa.array(n), pa.string()) for n in (pid, number))
            columns = {
                "shard": shard,
                "offset": number % PER_SHARD * 2 * BYTES,
                "size": np.full(len(number), BYTES),
                "pid": pid,
                "label": np.where(is_train[shard], pid, -1),
                "camid": number % CAMERAS,
                "width": np.full(len(number), 128),
                "height": np.full(len(number), 256),
            }
            names_of_files = pc.binary_join_element_wise(
                "person-", person, "/day-17/", pc.utf8_lpad(digits, 9, "0"), ".jpg", ""
            )
            cells = [pa.array(columns[name], COLUMNS[name]) for name in columns]
            writer.write_table(pa.table([*cells, names_of_files], schema), ROW_GROUP)
    counts = np.full(shards, PER_SHARD)
    counts[-1] = images - PER_SHARD * (shards - 1)
    infos = [
        ShardInfo(
            name=f"shards/{n:06d}.tar",
            bytes=2 * BYTES * PER_SHARD,
            sha256="0" * 64,
            split=name,  # pyright: ignore[reportArgumentType]
            images=int(count),
        )
        for n, (name, count) in enumerate(zip(names, counts, strict=True))
    ]
    of_split = {n: int(counts[[name == n for name in names]].sum()) for n in set(names)}
    path = folder / INDEX_NAME
    manifest = Manifest(
        name="large",
        source="csv",
        options={},
        complete=True,
        content="0" * 64,
        splits={  # pyright: ignore[reportArgumentType]
            name: SplitInfo(images=n, identities=n // PER_PERSON, cameras=CAMERAS)
            for name, n in of_split.items()
        },
        shards=tuple(infos),
        index=FileInfo(name=INDEX_NAME, bytes=path.stat().st_size, sha256=file_sha256(path)),
    )
    (folder / MANIFEST_NAME).write_bytes(manifest.to_json())


def at_once(folder: Path) -> str:
    manifest = Manifest.from_json((folder / MANIFEST_NAME).read_bytes())
    table = pq.read_table(pa.BufferReader((folder / INDEX_NAME).read_bytes()))
    index = Index(**{n: table[n].to_numpy(zero_copy_only=False) for n in table.column_names})
    split = split_of_rows(index, manifest.shards)
    parts = {name: index.select(split == i) for i, name in enumerate(SPLITS)}
    return f"{len(parts['train']):,} train images"


def opened(folder: Path) -> Dataset:
    return Dataset.open(str(folder), cache=(folder / "cache", 10**12))


def first(folder: Path) -> str:
    return f"{len(opened(folder).identities):,} people"


def planned(folder: Path) -> str:
    index, settings = opened(folder).index("train"), {"identities": 16, "images": 4, "window": 16}
    began = time.process_time()
    rows = plan(index, seed=0, epoch=0, steps=200, **settings)
    some = time.process_time() - began
    whole = plan(index, seed=0, epoch=0, **settings)
    seconds = time.process_time() - began - some
    return f"{some:.2f} s for {len(rows)} steps, {seconds:.1f} s for all {len(whole):,}"


def paths(folder: Path) -> str:
    path, rng = opened(folder).index("train").path, np.random.default_rng(0)
    began = time.process_time()
    near = np.asarray(path[np.arange(4096)])
    some = time.process_time() - began
    far = np.asarray(path[rng.integers(len(path), size=64)])
    seconds = time.process_time() - began - some
    return f"{some:.2f} s for {len(near):,} neighbours, {seconds:.2f} s for {len(far)} anywhere"


MEASURED = {"at once": at_once, "first": first, "later": first, "planned": planned, "paths": paths}


def measure(what: str, folder: Path) -> None:
    before, began = time.process_time(), time.monotonic()
    found = MEASURED[what](folder)
    cpu, seconds = time.process_time() - before, time.monotonic() - began
    status = Path("/proc/self/status").read_text()
    own = int(re.findall(r"RssAnon:\s+(\d+)", status)[0]) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    times = f"{cpu:6.1f} s of a core, {seconds:6.1f} s"
    print(f"{what:8} {times}, {peak:5.2f} GB at most, {own:5.2f} GB own; {found}", flush=True)


def main(amounts: list[int]) -> None:
    for images in amounts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write(images, folder)
            size = (folder / INDEX_NAME).stat().st_size
            print(f"{images:,} images, index of {size / 1e6:,.0f} MB", flush=True)
            for what in MEASURED:
                if what == "at once" and images > 20_000_000:
                    continue  # would take more memory than most machines have
                subprocess.run([sys.executable, __file__, what, name], check=True)
            kept = sum(path.stat().st_size for path in folder.glob("cache/*.columns"))
            print(f"columns of {kept / 1e6:,.0f} MB in the cache", flush=True)


if __name__ == "__main__":
    if sys.argv[1] in MEASURED:
        measure(sys.argv[1], Path(sys.argv[2]))
    else:
        main([int(word) for word in sys.argv[1:]])
