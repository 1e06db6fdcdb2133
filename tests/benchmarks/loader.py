"""Measure images/s of this loader, of a plain loader on the same files, and of decoding only.

    python tests/benchmarks/loader.py [--images 4000] [--workers 2] [--repeats 3]

All are measured in one run, because only ratios are comparable between machines. Each figure is the
best of the repeats. The plain loader is the usual one: a map-style dataset, Pillow, and transforms
of torchvision. It delivers augmented float32, while ours delivers uint8 and leaves augmentation to
the device. Most of the difference comes from that.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

from data_shards.building.build import build
from data_shards.cache import ShardCache
from data_shards.dataset import Dataset
from data_shards.loading.loader import train_batches
from data_shards.sampler import plan
from data_shards.storage import LocalStorage

HEIGHT, WIDTH = 384, 128
IDENTITIES, IMAGES, WINDOW, STEPS = 16, 4, 2, 200  # an epoch of the published recipe
PER_IDENTITY = 32
SHARD_BYTES = 8 << 20


@dataclass(frozen=True)
class RemoteFolder:
    """A folder that looks like a bucket: its shards have to be downloaded, which it notes."""

    root: Path

    @property
    def notes(self) -> Path:
        return self.root / "downloads.txt"

    @property
    def url(self) -> str:
        return str(self.root)

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> None:
        LocalStorage(self.root).download(key, path, sha256=sha256)
        with self.notes.open("a") as file:
            file.write(f"{key}\n")


def person(rng: np.random.Generator) -> np.ndarray:
    """An image with the size and spectrum of a pedestrian crop: body, background, texture, noise.

    About 19 kB at quality 90. Smoother images decode faster, while resizing costs the same: they
    leave any loader a smaller part of the decode limit.
    """
    height, width = int(rng.normal(350, 30)), int(rng.normal(136, 12))
    picture = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((3, 45), (9, 30), (27, 18), (70, 13), (height, 13)):
        noise = rng.normal(0, strength, (cells, max(2, cells * width // height), 3))
        size = (width, height)
        picture += cv2.resize(noise.astype(np.float32), size, interpolation=cv2.INTER_CUBIC)
    picture += rng.uniform(70, 170, 3)
    middle, half = width // 2, width // 4
    for top, bottom in ((0.16, 0.5), (0.5, 0.95)):
        area = slice(int(top * height), int(bottom * height)), slice(middle - half, middle + half)
        picture[area] = 0.4 * picture[area] + rng.uniform(0, 130, 3)
    return np.clip(picture, 0, 255).astype(np.uint8)


def render(folder: Path, count: int) -> list[Path]:
    """Write JPEGs of quality 90 and their list."""
    rng, rows = np.random.default_rng(0), []
    for number in range(count):
        name = f"{number:06d}.jpg"
        Image.fromarray(person(rng)).save(folder / name, quality=90)
        pid = number // PER_IDENTITY
        rows.append({"path": name, "pid": pid, "camid": number % 7, "split": "train"})
    with (folder / "list.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return [folder / row["path"] for row in rows]


class Plain(TorchDataset):
    """The loader of most re-identification code bases."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        mean = (0.485, 0.456, 0.406)
        self.transform = transforms.Compose(
            [
                transforms.Resize((HEIGHT, WIDTH)),
                transforms.RandomHorizontalFlip(),
                transforms.Pad(10),
                transforms.RandomCrop((HEIGHT, WIDTH)),
                transforms.ToTensor(),
                transforms.Normalize(mean, (0.229, 0.224, 0.225)),
                transforms.RandomErasing(value=mean),  # type: ignore[arg-type]
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.open(self.paths[i]).convert("RGB")), i


def rate(images: int, run: Callable[[], Iterable[object]]) -> float:
    """Images per second from the call to the last batch, including the start of the workers."""
    began = time.perf_counter()
    for _ in run():
        pass
    return images / (time.perf_counter() - began)


def decode_limit(paths: list[Path]) -> float:
    """libjpeg-turbo on one core: from memory into one fixed buffer."""
    images = [path.read_bytes() for path in paths]
    buffer = bytearray(1 << 20)
    began = time.perf_counter()
    for data in images:
        simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=buffer)
    return len(images) / (time.perf_counter() - began)


def decode_limit_of_all(paths: list[Path], workers: int) -> float:
    """The same on `workers` cores at once, per core: the speed of a shared machine."""
    with ProcessPoolExecutor(workers) as pool:
        return float(np.mean(list(pool.map(decode_limit, [paths] * workers))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), args.images, args.workers, args.repeats)


def measure(folder: Path, images: int, workers: int, repeats: int) -> None:
    """Render, shard, measure everything `repeats` times in turn, and print the table."""
    (folder / "images").mkdir()
    paths = render(folder / "images", images)
    built = build(
        "csv", folder / "images" / "list.csv", str(folder / "data"), shard_bytes=SHARD_BYTES, jobs=1
    )
    local = Dataset.open(str(folder / "data"))
    bucket = RemoteFolder(folder / "data")
    remote = replace(local, storage=bucket)  # type: ignore[arg-type]
    options = {"identities": IDENTITIES, "images": IMAGES, "window": WINDOW}
    index = local.index("train")
    began = time.perf_counter()
    rows = plan(index, seed=0, epoch=0, steps=STEPS, **options)  # type: ignore[arg-type]
    planned = time.perf_counter() - began
    shards = [shard.bytes for shard in built.manifest.shards]

    def plain() -> Iterable[object]:
        return DataLoader(Plain(paths), batch_sampler=rows.tolist(), num_workers=workers)

    def ours(dataset: Dataset, cache: ShardCache) -> Callable[[], Iterable[object]]:
        size = {"height": HEIGHT, "width": WIDTH}
        return lambda: train_batches(dataset, cache, rows, **size, workers=workers)

    two_windows = 2 * WINDOW * max(shards)
    warm = ShardCache(remote.storage, folder / "warm", 2 * sum(shards))
    for shard in built.manifest.shards:
        warm.path(shard)
    cold = warm
    figures: dict[str, list[float]] = {}
    for _ in range(repeats):
        shutil.rmtree(folder / "cold", ignore_errors=True)
        bucket.notes.unlink(missing_ok=True)
        cold = ShardCache(remote.storage, folder / "cold", two_windows)
        for name, figure in (
            ("limit", lambda: decode_limit(paths)),
            ("limit, all busy", lambda: decode_limit_of_all(paths, workers)),
            ("plain", lambda: rate(rows.size, plain)),
            ("warm", lambda: rate(rows.size, ours(remote, warm))),
            ("cold", lambda: rate(rows.size, ours(remote, cold))),  # noqa: B023
        ):
            figures.setdefault(name, []).append(figure())
    show({name: max(values) for name, values in figures.items()}, workers)
    downloads = len(bucket.notes.read_text().split())
    size = np.mean([path.stat().st_size for path in paths]) / 1000
    Console().print(
        f"{images:,} JPEGs of about 136 × 350, {size:.1f} kB each, in {len(shards)} shards;"
        f" {len(rows)} batches of {rows.shape[1]} at {HEIGHT} × {WIDTH}; {os.cpu_count()} cores."
        f" Planned in {1000 * planned:.0f} ms. Cold: {downloads} downloads,"
        f" a cache of {cold.max_bytes / sum(shards):.0%}.\n"
        "The plain loader delivers augmented float32, ours uint8 for the device to augment."
    )


def show(best: dict[str, float], workers: int) -> None:
    """Print figures and ratios."""
    limit = best["limit"] * workers
    table = Table(title=f"images a second, {workers} worker processes")
    table.add_column("")
    for column in ("images/s", "× plain", "of the decode limit"):
        table.add_column(column, justify="right")
    for label, value in (
        ("decode limit, one core alone", best["limit"]),
        (f"decode limit, {workers} cores busy, all", best["limit, all busy"] * workers),
        ("plain Pillow + torchvision v1", best["plain"]),
        ("data_shards, cache warm", best["warm"]),
        ("data_shards, cold, two windows fit", best["cold"]),
    ):
        of_limit = f"{value / limit:.2f}"
        table.add_row(label, f"{value:,.0f}", f"{value / best['plain']:.2f}", of_limit)
    Console().print(table)
    for what, ratio, least in (
        ("warm / plain", best["warm"] / best["plain"], 4.0),
        (f"warm / ({workers} × decode limit)", best["warm"] / limit, 0.5),
    ):
        Console().print(
            f"{what}: {ratio:.2f} (at least {least}): {'ok' if ratio >= least else 'MISSED'}"
        )


if __name__ == "__main__":
    main()
