"""Open an index and plan an epoch: processor time and memory, by the number of images.

    python tests/benchmarks/index.py 1000000 10000000

Each measurement has a process of its own. "Before" copies the rows of each split, as `Dataset.open`
did until versions came.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.dataset import Dataset
from data_shards.manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    FileInfo,
    Index,
    Manifest,
    ShardInfo,
    _check_index,
    count_splits,
    sha256,
    split_of_rows,
)
from data_shards.records import SPLITS
from data_shards.sampler import plan

PER_SHARD, PER_PERSON, BYTES = 10_000, 25, 8_192


def write(images: int, folder: Path) -> None:
    """A manifest and an index of people by the hundred thousand; there are no shards."""
    number = np.arange(images)
    shard, names = number // PER_SHARD, ["train"] * (-(-images // PER_SHARD))
    names[-len(names) // 5 :] = ["gallery"] * (len(names) // 5 + (len(names) % 5 > 0))
    names[-1] = "query"
    split = np.array(names)[shard]
    pid = number // PER_PERSON
    train = split == "train"
    label = np.full(images, -1)
    label[train] = np.unique(pid[train], return_inverse=True)[1]
    index = Index.from_columns(
        {
            "shard": shard,
            "offset": number % PER_SHARD * 2 * BYTES,
            "size": np.full(images, BYTES),
            "pid": pid,
            "label": label,
            "camid": number % 12,
            "width": np.full(images, 128),
            "height": np.full(images, 256),
            "path": [f"person-{n // PER_PERSON}/day-17/{n:09}.jpg" for n in range(images)],
        }
    )
    counts = np.bincount(shard).tolist()
    shards = [
        ShardInfo(
            name=f"shards/{n:06d}.tar",
            bytes=2 * BYTES * PER_SHARD,
            sha256="0" * 64,
            split=name,  # pyright: ignore[reportArgumentType]
            images=count,
        )
        for n, (name, count) in enumerate(zip(names, counts, strict=True))
    ]
    data = index.to_parquet()
    manifest = Manifest(
        name="large",
        source="csv",
        options={},
        complete=True,
        content="0" * 64,
        splits=count_splits(index, shards),
        shards=tuple(shards),
        index=FileInfo(name=INDEX_NAME, bytes=len(data), sha256=sha256(data)),
    )
    (folder / INDEX_NAME).write_bytes(data)
    (folder / MANIFEST_NAME).write_bytes(manifest.to_json())


def before(folder: str) -> None:
    data = Path(folder, INDEX_NAME).read_bytes()
    manifest = Manifest.from_json(Path(folder, MANIFEST_NAME).read_bytes())
    table = pq.read_table(pa.BufferReader(data))
    index = Index(**{n: table[n].to_numpy(zero_copy_only=False) for n in table.column_names})
    _check_index(index, manifest)
    split = split_of_rows(index, manifest.shards)
    parts = {name: index.select(split == i) for i, name in enumerate(SPLITS)}
    report("before", len(parts["train"]))


def now(folder: str) -> None:
    dataset = Dataset.open(folder)
    report("now", len(dataset.index("train")))


def planned(folder: str) -> None:
    dataset = Dataset.open(folder)
    began = time.process_time()
    settings = {"identities": 16, "images": 4, "window": 16}
    rows = plan(dataset.index("train"), seed=0, epoch=0, steps=200, **settings)
    some = time.process_time() - began
    whole = plan(dataset.index("train"), seed=0, epoch=0, **settings)
    seconds = time.process_time() - began - some
    print(
        f"plan: {some:.1f} s for {len(rows)} steps, {seconds:.1f} s for all {len(whole):,}", end=""
    )
    report("", len(dataset.index("train")))


def report(what: str, images: int) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{what} {images:,} train images: {time.process_time():.1f} s, {peak:.2f} GB", flush=True)


def main(amounts: list[int]) -> None:
    for images in amounts:
        with tempfile.TemporaryDirectory() as folder:
            write(images, Path(folder))
            size = Path(folder, INDEX_NAME).stat().st_size
            print(f"{images:,} images, index of {size / 1e6:.0f} MB", flush=True)
            for what in ("before", "now", "planned"):
                subprocess.run([sys.executable, __file__, what, folder], check=True)


if __name__ == "__main__":
    if sys.argv[1] in ("before", "now", "planned"):
        {"before": before, "now": now, "planned": planned}[sys.argv[1]](sys.argv[2])
    else:
        main([int(word) for word in sys.argv[1:]])
